"""Reads just the tensors a server hosts from a Hugging Face model directory.

A checkpoint is a set of safetensors files; a header says where every tensor lies, so a tensor can be read without its
neighbours. Only safetensors is read: pickle files (.bin, .pt) can run code when they are opened, so they are refused
with the way to convert them, and code that lies in a model directory is never imported.

Files are read, not mapped: a mapped tensor would stay a view of the file, the model would then depend on the page
cache (and on nobody deleting the file) for as long as it serves, and reading would count twice in the resident memory.
What is read goes straight into torch's own memory. The library would hand out views of Python objects; here a tensor
starts at a cache line and lies in huge pages where these are on, and products of few rows take 1 to 5 % less time. The
sources of a conversion (per-expert matrices that a family keeps as one fused tensor) are dropped layer by layer.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from shoal.errors import ModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
CONVERT_HINT = (
    "Convert it once, on a machine where you trust the file: "
    "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR) writes safetensors."
)
# What a model needs besides its weights. No *.py: code from a model directory is never imported.
SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "README.md", "LICENSE*")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Names of precisions in safetensors files; tensors of other ones are small or refused, and left to the library."""
_MAX_INDEX_BYTES = 256 * 2**20  # the index of a 1,000-shard mixture of experts stays below 20 MB


def fetch_model(name_or_path: str | Path) -> Path:
    """The directory of a model: a local directory as it is, or a hub id fetched through the hub's own cache.

    Only configuration, tokenizer and safetensors files are fetched. Raises ModelError when there is neither such a
    directory nor such a model on the hub, or when the hub cannot be reached and nothing is cached.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    name = str(name_or_path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"{name} is not a model directory.",
            hint="Give a directory that holds config.json and *.safetensors, or a hub id such as Qwen/Qwen3-0.6B.",
        )
    try:
        return Path(snapshot_download(name, allow_patterns=[*SIDE_FILES, *_weight_patterns(name)]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"Cannot fetch the model {name!r} from the Hugging Face hub: {_first_line(error)}",
            hint="Check the id and the network, or give the path of a directory that holds the model.",
        ) from error


def _weight_patterns(name: str) -> list[str]:
    """The weight files a hub model really uses: many repositories hold the same weights twice, in other layouts."""
    try:
        index = Path(hf_hub_download(name, INDEX_FILE))
    except (HfHubHTTPError, LocalEntryNotFoundError):
        return [SINGLE_FILE]
    return sorted(set(_read_index(index).values()))


def read_config(model_dir: str | Path) -> PretrainedConfig:
    """The configuration of the model in `model_dir`, by transformers' own classes.

    Raises ModelError when config.json is missing or broken, names a family that this version of transformers does not
    have, or describes quantised weights.
    """
    path = Path(model_dir) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"There is no config.json in {model_dir}.", hint="A model directory holds config.json and *.safetensors."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"Cannot read {path}: {_first_line(error)}", hint="Copy or download the model again."
        ) from None
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(model_type, str):
        raise ModelError(f"{path} names no model_type.", hint="Is this the config.json of a transformers model?")
    if raw.get("quantization_config"):
        method = (
            raw["quantization_config"].get("quant_method", "unknown")
            if isinstance(raw["quantization_config"], dict)
            else "unknown"
        )
        raise ModelError(
            f"The weights in {model_dir} are quantised ({method}); shoal reads fp32, fp16 and bf16 weights.",
            hint="Take the unquantised checkpoint of the same model.",
        )
    try:
        return AutoConfig.from_pretrained(str(model_dir), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"transformers cannot read the configuration of the {model_type!r} model in {model_dir}: "
            f"{_first_line(error)}",
            hint="The family is unknown to this version of transformers, or config.json was edited. "
            "Code that ships inside a model directory is never run.",
        ) from error


class Checkpoint:
    """The safetensors files of a model directory: which tensor lies in which file, read on demand.

    Attributes:
        files: tensor name -> file. For a sharded model this is the index; no shard is opened before it is needed.
        bytes_read: bytes of tensor data read so far through this object.
    """

    def __init__(self, model_dir: str | Path) -> None:
        """Find the weights. Raises ModelError when there are none, only pickle files, or a broken index."""
        self.model_dir = Path(model_dir)
        self.bytes_read = 0
        self._handles: dict[Path, Any] = {}
        self._offsets: dict[Path, dict[str, int]] = {}
        self._lock = threading.Lock()
        index, single = self.model_dir / INDEX_FILE, self.model_dir / SINGLE_FILE
        if index.is_file():
            self.files = {name: self.model_dir / file for name, file in _read_index(index).items()}
        elif single.is_file():
            self.files = dict.fromkeys(self._open(single).keys(), single)
        else:
            raise self._no_weights()

    def _no_weights(self) -> ModelError:
        if not self.model_dir.is_dir():
            return ModelError(f"There is no model directory {self.model_dir}.", hint="Check the path.")
        names = sorted(path.name for path in self.model_dir.iterdir())
        pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
        if pickles:
            return ModelError(
                f"{self.model_dir} holds its weights as pickle ({pickles[0]}), which can run code when it is opened; "
                "shoal reads safetensors only.",
                hint=CONVERT_HINT,
            )
        shards = [name for name in names if name.endswith(".safetensors")]
        if shards:
            return ModelError(
                f"{self.model_dir} holds {shards[0]} but neither {SINGLE_FILE} nor {INDEX_FILE}.",
                hint=f"Copy {INDEX_FILE} as well, or name a single file {SINGLE_FILE}.",
            )
        return ModelError(
            f"There are no safetensors weights in {self.model_dir}.",
            hint=f"It should hold {SINGLE_FILE}, or shards with {INDEX_FILE}.",
        )

    def _open(self, file: Path) -> Any:
        with self._lock:
            if file not in self._handles:
                try:
                    self._handles[file] = safe_open(file, framework="pt", device="cpu", backend="pread")
                except FileNotFoundError:
                    raise ModelError(
                        f"The weight file {file} is missing.",
                        hint=f"{INDEX_FILE} names it: copy or download the model again.",
                    ) from None
                except (SafetensorError, OSError) as error:
                    raise ModelError(
                        f"The weight file {file} is broken: {_first_line(error)}",
                        hint="Copy or download the model again.",
                    ) from error
            return self._handles[file]

    def _starts(self, file: Path) -> dict[str, int]:
        """Where in `file` every tensor begins. The library has checked the header when it opened the file."""
        with self._lock:
            if file not in self._offsets:
                with file.open("rb") as opened:
                    size = int.from_bytes(opened.read(8), "little")
                    header = json.loads(opened.read(size))
                header.pop("__metadata__", None)
                self._offsets[file] = {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items()}
            return self._offsets[file]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, read from disk now. Raises ModelError when its file is missing or broken."""
        file = self.files[name]
        try:
            handle = self._open(file)
            piece = handle.get_slice(name)
            dtype = _DTYPES.get(piece.get_dtype())
            if dtype is None:
                tensor: torch.Tensor = handle.get_tensor(name)
            else:
                tensor = torch.empty(piece.get_shape(), dtype=dtype)
                _read_at(file, self._starts(file)[name], tensor)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"Cannot read the tensor {name} from {file}: {_first_line(error)}",
                hint="The file and its index do not belong together: copy or download the model again.",
            ) from error
        with self._lock:
            self.bytes_read += tensor.nbytes
        return tensor


def _read_at(file: Path, start: int, tensor: torch.Tensor) -> None:
    """Fill `tensor` with the bytes of `file` from `start` on. Raises OSError when the file ends before."""
    if not tensor.numel():
        return
    room = tensor.reshape(-1).view(torch.uint8).numpy().data
    with file.open("rb", buffering=0) as opened:
        opened.seek(start)
        while room:
            count = opened.readinto(room)
            if not count:
                raise OSError("the file ends within the tensor")
            room = room[count:]


class _OnDemand:
    """Stands for a tensor of a checkpoint until transformers' loader asks for it with `[...]`."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint = checkpoint
        self._name = name

    def __getitem__(self, everything: Any) -> torch.Tensor:
        return self._checkpoint.read(self._name)


def load_into(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    wanted: Callable[[str], bool],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Read the tensors whose name in the model is `wanted` and put them in place of the model's meta tensors.

    `model` is built at full depth, so the names in the checkpoint are the absolute ones and every conversion of the
    family (renamed keys, fused experts, split projections) is applied by transformers' own rules.
    Raises ModelError when a tensor is missing, has another shape, or a conversion fails.
    """
    rules = get_model_conversion_mapping(model)
    here = model.state_dict()
    names = [name for name in checkpoint.files if wanted(_name_in_model(name, model, rules, here))]
    transformers_logging.disable_progress_bar()
    info, _ = convert_and_load_state_dict_in_model(
        model=model,
        state_dict={name: _OnDemand(checkpoint, name) for name in names},
        load_config=LoadStateDictConfig(
            device_map={"": str(device)},
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            weight_mapping=rules,
        ),
    )
    where = checkpoint.model_dir
    if info.mismatched_keys:
        name, found, expected = sorted(info.mismatched_keys, key=str)[0]
        raise ModelError(
            f"The tensor {name} in {where} has shape {tuple(found)}, config.json asks for {tuple(expected)}.",
            hint="config.json and the weights do not belong together.",
        )
    if info.conversion_errors:
        name, reason = sorted(info.conversion_errors.items())[0]
        raise ModelError(f"Cannot convert the tensor {name} in {where}: {_first_line(reason)}", hint=_REPORT_HINT)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    missing = _still_missing(model, wanted)
    if missing:
        raise ModelError(
            f"{len(missing)} tensors are missing from the weights in {where}, the first is {missing[0]}.",
            hint="The download is incomplete, or config.json belongs to another model.",
        )


_REPORT_HINT = "Load it once with AutoModelForCausalLM.from_pretrained to see whether the checkpoint itself is sound."


def _name_in_model(name: str, model: PreTrainedModel, rules: list[Any], here: dict[str, Any]) -> str:
    """The model's own name for a checkpoint tensor (of the first target, where one tensor becomes several)."""
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamed: str = rename_source_key(name, renamings, converters, model.base_model_prefix, here)[0]
    if renamed not in here and name in here:
        return name
    return renamed


def _still_missing(model: PreTrainedModel, wanted: Callable[[str], bool]) -> list[str]:
    """Wanted parameters that neither the checkpoint nor a tied twin provides. (Buffers can be computed.)"""
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return sorted(
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.is_meta and wanted(name) and not any(pattern.search(name) for pattern in optional)
    )


def _read_index(path: Path) -> dict[str, str]:
    """weight_map of an index file: tensor name -> file name beside the index. Raises ModelError when it is broken."""
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise ModelError(f"{path} is larger than {_MAX_INDEX_BYTES >> 20} MiB.", hint="This is no weight index.")
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"Cannot read the weight index {path}: {_first_line(error)}", hint="Copy or download the model again."
        ) from error
    for name, file in weight_map.items() if isinstance(weight_map, dict) else [(None, None)]:
        # A file name that leaves the model directory would make us read (and serve) something else.
        if not isinstance(name, str) or not isinstance(file, str) or Path(file).name != file:
            raise ModelError(f"{path} does not map tensor names to files beside it.", hint="Download the model again.")
        if not file.endswith(".safetensors"):
            raise ModelError(f"{path} points to {file}; shoal reads safetensors only.", hint=CONVERT_HINT)
    return weight_map


def _first_line(error: object) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
