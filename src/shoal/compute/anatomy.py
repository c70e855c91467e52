"""Where a decoder family keeps its layers, its per-layer lists and its layer numbers.

The cut in split.py needs three facts about a model it has never seen: which `ModuleList` is the stack of layers, which
lists in the configuration have one entry per layer, and which attributes hold a layer's number. They are found here,
by structure and not by family.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from shoal.errors import CannotSplit

# `layer_idx`, `layer_id`, `_layer_number`, ...: the slot of the cache that a module writes to.
_LAYER_NUMBER = re.compile(r"_?layer_?(idx|index|id|num|number)")
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
DEFAULT_CONTEXT = 2048
# Lists that may have as many entries as there are layers by coincidence, and mean something else.
_NOT_PER_LAYER = re.compile(
    r"architectures|.*token_ids?|.*rope.*|.*mrope.*|.*_section|keys_to_ignore.*|.*window_pattern"
)


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model that a cut touches.

    Attributes:
        decoder: the module whose forward makes masks and rotary tables and runs the layers (no head).
        owner, attribute: the layers are `getattr(owner, attribute)`, a ModuleList.
        prefix: name of that ModuleList in the whole model, for example "model.layers".
        others: names of models beside the decoder (a vision tower), which text never passes through.
    """

    decoder: PreTrainedModel
    owner: nn.Module
    attribute: str
    prefix: str
    others: tuple[str, ...]

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(self.owner, self.attribute)

    def hosts(self, name: str, blocks: range) -> bool:
        """Whether the parameter `name` belongs to one of the layers `blocks`."""
        if not name.startswith(self.prefix + "."):
            return False
        number = name[len(self.prefix) + 1 :].partition(".")[0]
        return number.isdigit() and int(number) in blocks

    def at_the_ends(self, name: str) -> bool:
        """Whether the parameter `name` is used before the first or after the last layer."""
        return not any(name.startswith(part + ".") for part in (self.prefix, *self.others))

    def replace_layers(self, layers: list[nn.Module]) -> None:
        setattr(self.owner, self.attribute, nn.ModuleList(layers))


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a configuration that describes the text decoder (the whole of it for a text-only model)."""
    return config.get_text_config(decoder=True)


def depth(config: PretrainedConfig) -> int:
    """Number of layers. Raises CannotSplit when the configuration names none."""
    count = getattr(text_config(config), "num_hidden_layers", None)
    if not isinstance(count, int) or count < 1:
        raise CannotSplit(f"The {config.model_type!r} configuration does not say how many layers the decoder has.")
    return count


def context_length(config: PretrainedConfig) -> int:
    """Tokens the model was made for; DEFAULT_CONTEXT where the family sets no limit (ALiBi, recurrent ones)."""
    values = (getattr(text_config(config), name, None) for name in _CONTEXT_NAMES)
    return next((value for value in values if isinstance(value, int)), DEFAULT_CONTEXT)


def examine(model: PreTrainedModel) -> Anatomy:
    """Find the stack of layers of a causal language model. Raises CannotSplit when there is not exactly one."""
    count = depth(model.config)
    names = {module: name for name, module in model.named_modules()}
    text_model = model.get_decoder()
    if not isinstance(text_model, PreTrainedModel):  # some families call their output layer "decoder"
        text_model = model
    stacks = [
        module
        for name, module in text_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and not _inside_a_stack(name)
    ]
    stacks = [
        stack for stack in stacks if all(isinstance(layer, GradientCheckpointingLayer) for layer in stack)
    ] or stacks
    if len(stacks) != 1:
        raise CannotSplit(
            f"{type(model).__name__} has {len(stacks)} stacks of {count} layers "
            f"({', '.join(names[stack] for stack in stacks)}); a cut needs exactly one."
        )
    prefix = names[stacks[0]]
    owner_name, _, attribute = prefix.rpartition(".")
    models = {name: module for module, name in names.items() if isinstance(module, PreTrainedModel)}
    home = max((name for name in models if not name or prefix.startswith(name + ".")), key=len)
    others = tuple(name for name in models if not (home + ".").startswith(name + ".") and not _within(name, home))
    return Anatomy(models[home], model.get_submodule(owner_name), attribute, prefix, others)


def _within(name: str, home: str) -> bool:
    return not name or not home or name.startswith(home + ".")


def _inside_a_stack(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


class PerLayerConfig:
    """All per-layer lists of a model's configuration objects, and its depth; `show(a, b)` makes them those of a..b-1.

    The family's forward picks masks, windows and cache kinds by `config.layer_types[local index]` and the like. If the
    lists stay whole, Gemma 2/3, gpt-oss and Cohere 2 answer with wrong logits and without an error.
    """

    def __init__(self, model: PreTrainedModel, count: int) -> None:
        self._count = count
        self._lists: list[tuple[dict[str, Any], str, list[Any] | tuple[Any, ...]]] = []
        self._depths: list[tuple[dict[str, Any], str]] = []
        seen: set[int] = set()
        configs = [getattr(module, "config", None) for module in model.modules()]
        for config in [*configs, text_config(model.config)]:
            # Modules may hold copies of the configuration: each distinct object is treated once.
            if not isinstance(config, PretrainedConfig) or id(config) in seen:
                continue
            if getattr(config, "num_hidden_layers", None) != count:
                continue
            seen.add(id(config))
            self._collect(config)

    def _collect(self, config: PretrainedConfig) -> None:
        self._freeze_computed_lists(config)
        values = vars(config)
        # Written through __dict__: setattr would validate list lengths against a depth that changes one line later.
        depth_name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        self._depths.append((values, depth_name))
        for name, value in values.items():
            if isinstance(value, list | tuple) and len(value) == self._count and not _NOT_PER_LAYER.fullmatch(name):
                self._lists.append((values, name, value))

    def _freeze_computed_lists(self, config: PretrainedConfig) -> None:
        """Turn properties that compute a per-layer list (Jamba: every n-th layer attends) into plain lists.

        Computed at a stage's depth they would start counting at the stage's first layer.
        """
        cls = type(config)
        computed = {}
        for name in set(dir(cls)) - set(dir(PretrainedConfig)):
            if isinstance(getattr(cls, name), property):
                value = getattr(config, name, None)
                if isinstance(value, list | tuple) and len(value) == self._count:
                    computed[name] = list(value)
        if computed:
            config.__class__ = type(cls.__name__, (cls,), dict.fromkeys(computed))
            vars(config).update(computed)

    def show(self, start: int, end: int) -> None:
        for values, name, whole in self._lists:
            values[name] = whole[start:end]
        for values, name in self._depths:
            values[name] = end - start


class LayerNumbers:
    """The attributes in which modules keep the absolute number of their layer; `rebase(start)` subtracts `start`.

    The number is the slot of the cache a layer writes to. Without re-basing, every cached prefill of a stage that does
    not begin at layer 0 fails or reads another layer's keys.
    """

    def __init__(self, layers: list[nn.Module], first: int) -> None:
        """`layers` are those of a stage; the absolute number of the first one is `first`."""
        self._numbers: list[tuple[dict[str, Any], str, int]] = [
            (vars(module), name, number)
            for number, layer in enumerate(layers, start=first)
            for module in layer.modules()
            for name, value in vars(module).items()
            if type(value) is int and value == number and _LAYER_NUMBER.fullmatch(name)
        ]

    def rebase(self, start: int) -> None:
        for values, name, number in self._numbers:
            values[name] = number - start
