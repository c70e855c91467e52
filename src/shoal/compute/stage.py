"""Cuts any decoder of the transformers library at layer borders.

A `Stage` holds some consecutive layers of a model and computes what the whole model computes between two borders; the
`Ends` are what remains: embedding before the first layer, norm and head after the last. Chained, they give the whole
model's numbers, bit for bit in fp32:

    ends.embed -> stage 0:2 -> stage 2:5 -> stage 5:6 -> ends.logits

No family is re-written. The model is built on the `meta` device at full depth (options that depend on a layer's
absolute number are fixed at construction), all layers but the stage's own are dropped, and the family's own forward
runs: it makes masks, rotary tables and ALiBi. Three things turn it into a stage, and each has a test that breaks when
it is taken out:

- the hidden state that arrives replaces what the forward would feed to the first kept layer (a pre-hook), because some
  families add position embeddings or a LayerNorm between embedding and layer 0;
- layer numbers are re-based to the slots of the stage's own cache;
- per-layer lists in the configuration are sliced to the kept layers.

The forward stops at the last kept layer: norm and head of the family are never reached on a server.

Weights that a part does not read (embedding and head on a server, layers at the ends) are NaN behind one shared
element: they cost no memory, and if a family should use them after all, the answer is NaN and not quietly wrong.

Shapes: B sequences, T new tokens, P cached tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ContextManagers

from shoal.compute import quirks
from shoal.compute.anatomy import (
    Anatomy,
    LayerNumbers,
    PerLayerConfig,
    context_length,
    depth,
    examine,
    text_config,
)
from shoal.compute.hybrid import HybridStageCache
from shoal.compute.shortcut import embedding_table, norm_and_head
from shoal.errors import CannotSplit, ModelError, UsageError
from shoal.spec.ids import BlockRange


class _Reached(Exception):
    """Unwinds the family's forward at the border where a part ends; carries the hidden state."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class Body:
    """The modules of one part. Several stages (views of different ranges) may share a body; one is shown at a time."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, blocks: BlockRange) -> None:
        """Reduce `model` to the layers of `blocks`. Its buffers must be computed already: some depend on the number
        that a layer has at full depth."""
        self.model = model
        self.anatomy = anatomy
        self.blocks = blocks
        self.layers: list[nn.Module] = list(anatomy.layers)[blocks.start : blocks.end]
        self.borders = quirks.cut_points(text_config(model.config), len(anatomy.layers))
        self.config_lists = PerLayerConfig(model, len(anatomy.layers))
        self.layer_numbers = LayerNumbers(self.layers, blocks.start)
        anatomy.replace_layers(self.layers)
        accepted = inspect.signature(anatomy.decoder.forward).parameters
        self.cache_name = "cache_params" if "cache_params" in accepted else "past_key_values"
        if self.cache_name not in accepted:
            raise CannotSplit(f"{type(model).__name__} keeps no cache, so it cannot go on token by token.")
        self.takes_position_ids = "position_ids" in accepted
        self.incoming: torch.Tensor | None = None
        self._shown: BlockRange | None = None
        self._hooks: list[Any] = []

    def show(self, blocks: BlockRange) -> None:
        """Make the family's forward run exactly `blocks`. Costs nothing when they are shown already."""
        if blocks == self._shown:
            return
        kept = self.layers[blocks.start - self.blocks.start : blocks.end - self.blocks.start]
        self.anatomy.replace_layers(kept)
        self.config_lists.show(blocks.start, blocks.end)
        self.layer_numbers.rebase(blocks.start)
        for hook in self._hooks:
            hook.remove()
        self._hooks = [
            kept[0].register_forward_pre_hook(self._inject, with_kwargs=True),
            kept[-1].register_forward_hook(self._extract),
        ]
        self._shown = blocks

    def _inject(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (self.incoming, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.incoming}

    def _extract(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        raise _Reached(output[0] if isinstance(output, tuple | list) else output)

    def run(
        self, hidden: torch.Tensor, position_ids: torch.Tensor | None, cache: Any, arguments: dict[str, Any]
    ) -> torch.Tensor:
        arguments[self.cache_name] = cache
        arguments["use_cache"] = cache is not None
        if self.takes_position_ids:
            arguments["position_ids"] = position_ids
        self.incoming = hidden
        try:
            # The forward wants embeddings to learn shape, dtype and device; what it makes of them is thrown away.
            # Not `hidden` itself: CTRL scales its embeddings in place.
            self.anatomy.decoder(inputs_embeds=torch.zeros_like(hidden), **arguments)
        except _Reached as reached:
            return reached.hidden
        finally:
            self.incoming = None
        raise CannotSplit(f"{type(self.model).__name__} did not run its last layer.")


class Stage:
    """Consecutive layers of a model: hidden state in, hidden state out.

    Attributes:
        blocks: the layers of this stage, by their number in the whole model.
        hidden_size, dtype, device: of the hidden state.
        bytes_read: bytes of weights read from disk for the body of this stage.

    Not thread-safe: one compute thread owns a stage and its narrowed views.
    """

    def __init__(self, body: Body, blocks: BlockRange, *, bytes_read: int = 0) -> None:
        self._body = body
        self.blocks = blocks
        self.bytes_read = bytes_read
        # A layer may keep some weights in fp32 whatever the model's precision; hidden states have the embedding's.
        self.dtype: torch.dtype = body.model.get_input_embeddings().weight.dtype
        self.device: torch.device = next(body.layers[0].parameters()).device
        self.hidden_size: int = text_config(body.model.config).hidden_size

    @classmethod
    def from_model(cls, model: PreTrainedModel, blocks: BlockRange) -> Stage:
        """A stage of a model that is in memory already. Weights are shared with `model`, modules are not.

        Raises CannotSplit for a family or border that cannot be cut, UsageError for blocks outside the model.
        """
        check_splittable(model.config)
        check_range(model.config, blocks)
        twin = _twin(model)
        anatomy = examine(twin)
        kept = range(blocks.start, blocks.end)
        blank(twin, keep=lambda name: anatomy.hosts(name, kept))
        return cls(Body(twin, anatomy, blocks), blocks)

    @property
    def config(self) -> PretrainedConfig:
        """The configuration as the stage's layers see it: per-layer lists and depth are those of `blocks`."""
        self._body.show(self.blocks)
        return text_config(self._body.model.config)

    @property
    def model(self) -> PreTrainedModel:
        """The family's decoder with only this stage's layers in it."""
        self._body.show(self.blocks)
        return self._body.anatomy.decoder

    @property
    def layers(self) -> list[nn.Module]:
        """The stage's layer modules, in order."""
        first = self.blocks.start - self._body.blocks.start
        return self._body.layers[first : first + len(self.blocks)]

    def __call__(
        self,
        hidden: torch.Tensor,
        *,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        **arguments: Any,
    ) -> torch.Tensor:
        """Run the stage's layers. hidden [B, T, H], position_ids [B, T] -> [B, T, H].

        attention_mask [B, P + T] marks real tokens with 1 (left padding), as in transformers. `cache` is any
        transformers Cache with one slot per layer of this stage, or None. Further arguments (for an attention function
        of one's own) reach the attention layers unchanged. Works with autograd and without it.
        """
        self._body.show(self.blocks)
        if attention_mask is not None:
            arguments["attention_mask"] = attention_mask
        output = self._body.run(hidden, position_ids, cache, arguments)
        if isinstance(cache, HybridStageCache):
            cache.tokens += hidden.shape[1]
        return output

    def new_cache(self) -> Cache:
        """An empty cache with one slot per layer of this stage (sliding windows keep only their window)."""
        return HybridStageCache(self.config)

    def narrow(self, blocks: BlockRange) -> Stage:
        """A view on a sub-range, sharing the layers: for a chain that enters or leaves in the middle of a span.

        Its cache slots count from its own first layer. Raises UsageError when `blocks` is not part of this stage,
        CannotSplit when the family cannot be cut there.
        """
        if blocks not in self.blocks:
            raise UsageError(f"Blocks {blocks} are not part of this stage, which holds {self.blocks}.")
        _check_borders(self.model.config, blocks, self._body.borders)
        return Stage(self._body, blocks, bytes_read=self.bytes_read)


class _Doorway(nn.Module):
    """Stands where the layers were: keeps what the forward feeds to layer 0, or lets a hidden state out after the last.

    The family's loop may read attributes of a layer (its attention type); those are the real first layer's.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # not a submodule: its weights are not part of the ends
        self.outgoing: torch.Tensor | None = None
        self.returned: Callable[[torch.Tensor], Any] = lambda hidden: hidden

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.outgoing is None:
            raise _Reached(args[0] if args else kwargs["hidden_states"])
        return self.returned(self.outgoing)


# What layers return differs: the hidden state (most families), or a tuple that begins with it.
_RETURN_FORMS: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda hidden: hidden,
    lambda hidden: (hidden,),
    lambda hidden: (hidden, None),
    lambda hidden: (hidden, None, None),
)


class Ends:
    """What the client keeps of a model: embedding before layer 0, final norm and head after the last layer.

    Attributes:
        vocab_size, hidden_size, dtype, device: of embedding and head.
        context_length: tokens the model was made for.
        eos_ids: tokens that end an answer.
        bytes_read: bytes of weights read from disk.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, *, bytes_read: int = 0) -> None:
        config = text_config(model.config)
        self.bytes_read = bytes_read
        self.vocab_size: int = config.vocab_size
        self.hidden_size: int = config.hidden_size
        self.context_length = context_length(config)
        self.eos_ids = token_ids(getattr(config, "eos_token_id", None))
        self._model = model
        self._decoder = anatomy.decoder
        self._doorway = _Doorway(anatomy.layers[0])
        PerLayerConfig(model, len(anatomy.layers)).show(0, 1)
        anatomy.replace_layers([self._doorway])
        embedding = model.get_input_embeddings().weight
        self.dtype: torch.dtype = embedding.dtype
        self.device: torch.device = embedding.device
        self._takes_position_ids = "position_ids" in inspect.signature(anatomy.decoder.forward).parameters
        self._doorway.returned = self._find_return_form()
        self._table = embedding_table(
            model, self._until_layers, vocab_size=self.vocab_size, context_length=self.context_length
        )
        self._direct = norm_and_head(model, self._decoder, self._after_layers, hidden_size=self.hidden_size)

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> Ends:
        """The ends of a model that is in memory already, sharing its weights. Raises CannotSplit."""
        check_splittable(model.config)
        twin = _twin(model)
        anatomy = examine(twin)
        blank(twin, keep=anatomy.at_the_ends)
        return cls(twin, anatomy)

    @property
    def head(self) -> list[nn.Module]:
        """The module that makes logits, as a list: empty for a family that has none."""
        module = self._model.get_output_embeddings()
        return [] if module is None else [module]

    def embed(self, ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """The hidden state that enters layer 0. ids [B, T], position_ids [B, T] -> [B, T, H]."""
        if self._table is not None:
            hidden: torch.Tensor = self._table(ids)
            return hidden
        return self._until_layers(ids, position_ids)

    def _until_layers(self, ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """`embed` by the family's own forward."""
        batch, length = ids.shape
        # One token per sequence: every row stands for itself, and no mask over T x T positions is made for nothing.
        arguments: dict[str, Any] = {"input_ids": ids.reshape(-1, 1), "use_cache": False}
        if self._takes_position_ids:
            arguments["position_ids"] = position_ids.reshape(-1, 1)
        try:
            self._decoder(**arguments)
        except _Reached as reached:
            return reached.hidden.reshape(batch, length, -1)
        raise CannotSplit(f"{type(self._model).__name__} did not reach its first layer.")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm, head, logit scale and softcap of the family. hidden [B, T, H] -> [B, T, V]."""
        batch, length, _ = hidden.shape
        rows = hidden.reshape(batch * length, 1, -1)
        logits = self._after_layers(rows) if self._direct is None else self._direct(rows)
        return logits.reshape(batch, length, -1)

    def _after_layers(self, rows: torch.Tensor) -> torch.Tensor:
        """`logits` by the family's own forward. rows [N, 1, H] -> [N, 1, V]."""
        # The forward wants embeddings to learn shape, dtype and device; positions it makes up itself.
        embeddings = torch.zeros_like(rows)
        self._doorway.outgoing = rows
        try:
            logits: torch.Tensor = self._model(inputs_embeds=embeddings, use_cache=False).logits
        finally:
            self._doorway.outgoing = None
        return logits

    def final(self, hidden: torch.Tensor) -> torch.Tensor:
        """The decoder's own output as its family defines it (`last_hidden_state`): final norm, and a projection where
        there is one. hidden [B, T, H] -> [B, T, E]; E is H for nearly all families."""
        batch, length, _ = hidden.shape
        rows = hidden.reshape(batch * length, 1, -1)
        # As in `_after_layers`: the embeddings only say shape, dtype and device.
        self._doorway.outgoing = rows
        try:
            states: torch.Tensor = self._decoder(inputs_embeds=torch.zeros_like(rows), use_cache=False)[0]
        finally:
            self._doorway.outgoing = None
        return states.reshape(batch, length, -1)

    @torch.no_grad()
    def _find_return_form(self) -> Callable[[torch.Tensor], Any]:
        """How this family's layers return the hidden state: the first form that yields logits of the right shape."""
        probe = torch.zeros(3, 1, self.hidden_size, dtype=self.dtype, device=self.device)
        errors = []
        for form in _RETURN_FORMS:
            self._doorway.returned = form
            try:
                logits = self._after_layers(probe)
            except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
                errors.append(f"{type(error).__name__}: {error}")
                continue
            if logits.shape[:2] == probe.shape[:2]:
                return form
        raise CannotSplit(f"{type(self._model).__name__} does not take a hidden state after its layers ({errors}).")


def check_splittable(config: PretrainedConfig) -> None:
    """Return when the family can be cut at layer borders at all. Raises CannotSplit with the reason otherwise."""
    reason = quirks.cannot_split(text_config(config))
    if reason:
        raise CannotSplit(
            f"The {config.model_type!r} family cannot be cut at layer borders: {reason}.",
            hint="Serve it on one machine, or choose another family (`shoal bench split` lists those that can be cut).",
        )
    depth(config)


def cut_points(config: PretrainedConfig) -> list[int]:
    """All borders where the model may be cut, with 0 and the number of layers. Raises CannotSplit."""
    check_splittable(config)
    return quirks.cut_points(text_config(config), depth(config))


def check_range(config: PretrainedConfig, blocks: BlockRange) -> None:
    """Raise UsageError for blocks outside the model, CannotSplit when a border falls where this family has none."""
    count = depth(config)
    if blocks.end > count:
        raise UsageError(
            f"Blocks {blocks} lie outside the model, which has {count} blocks.",
            hint=f"Ask for blocks within 0:{count}.",
        )
    _check_borders(config, blocks, quirks.cut_points(text_config(config), count))


def _check_borders(config: PretrainedConfig, blocks: BlockRange, allowed: list[int]) -> None:
    for border in (blocks.start, blocks.end):
        if border not in allowed:
            raise CannotSplit(
                f"A {config.model_type!r} model of this shape cannot be cut at block {border}: that block uses what "
                "the block before it computed besides the hidden state.",
                hint=f"Cut at one of {', '.join(map(str, allowed))}.",
            )


one_builder = threading.RLock()
"""Held while a model is built or filled. transformers then swaps functions (its own `tie_weights`, those of
torch.nn.init) for the whole process, and two threads that do so put the wrong ones back: models that anyone loads later
would come out untied or uninitialised."""


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model without weights: shapes only. Raises ModelError when the family has no causal language model."""
    try:
        cls = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise ModelError(
            f"{config.model_type!r} is not a text-generating decoder of transformers.",
            hint="shoal serves models that AutoModelForCausalLM can load.",
        ) from None
    with one_builder, ContextManagers(cls.get_init_context(dtype, False, False, None)):
        model: PreTrainedModel = cls(config)
    return model.eval()


def blank(model: PreTrainedModel, keep: Callable[[str], bool], device: torch.device | None = None) -> None:
    """Put NaN behind one shared element in place of every parameter that is not kept."""
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if keep(name):
            continue
        owner_name, _, attribute = name.rpartition(".")
        value = torch.nan if parameter.is_floating_point() else 0
        blank = torch.full((), value, dtype=parameter.dtype, device=device or parameter.device).expand(parameter.shape)
        stand_in = nn.Parameter(blank, requires_grad=False)
        stand_in._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' initialisation skips it
        setattr(model.get_submodule(owner_name), attribute, stand_in)


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules of `model` that shares its tensors."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared}).eval()


def token_ids(value: Any) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(value) if isinstance(value, list | tuple) else frozenset([value])
