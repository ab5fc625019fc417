"""Model merging: the weights of a long-CoT and a short-CoT model, averaged. No training.

Implements Kimi k1.5 (arXiv 2501.12599, section 2.4, "model merging"), with the weight as a parameter as in model
interpolation (arXiv 2510.10977): theta = weight * long + (1 - weight) * short, tensor by tensor. Kimi's own is 0.5.

Arithmetic is fp32, the result has the dtype of the long model's tensor. Weight 1 and 0 copy a parent's tensors instead
of multiplying by 1 and adding 0 times the other, so the ends of a sweep are the parents, bit for bit (at weight 0:
where the parents share a dtype). Config, generation config, tokenizer and chat template are the long model's, so that
it is prompted like the long model. Tensors are read, averaged and written one at a time: memory is a few times the
largest.

Only relatives can be averaged. Before anything is written, names, shapes and kinds of all tensors, the config (sizes,
rope, positions, tied heads), the vocabulary id by id and the special tokens must agree; a refusal names what does not.

Line: `reason long2short RECIPE`, the stage with `method: merge`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig

from rl.faults import fault
from rl.policy import load_tokenizer
from rl.runs import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What the merged model takes from the long parent besides weights, where it has it.
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Config keys that may differ: they do not change what a weight means.
FREE_KEYS = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "attention_dropout",
    "initializer_range",
    "bos_token_id",  # ids of special tokens are compared in the tokenizers
    "eos_token_id",
    "pad_token_id",
}
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and what it is. Example: `TensorInfo("model.safetensors", (27, 128), "F32")`."""

    file: str
    shape: tuple[int, ...]
    dtype: str  # in safetensors' words

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def merge(
    output: Path,
    *,
    long: str | Path,
    short: str | Path,
    weight: float,
    report: Callable[[int, int], None] = lambda tensor, total: None,
) -> dict[str, Any]:
    """Write weight * `long` + (1 - weight) * `short` to the model folder `output`; returns a summary.

    The weights are in one file or in shards, as the long model's are. `output` appears when all of it is there.
    `report(tensors done, tensors)`.

    Errors: ValueError, naming the tensor or key, for parents that are no relatives, weights that are not finite, and a
    sum that overflows the long model's dtype. Example: long 2.0, short -1.0, weight 0.75 -> 1.25.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be between 0 (the short model) and 1 (the long model), got {weight}")
    long_folder, short_folder = _folder(long), _folder(short)
    long_tensors, short_tensors = read_layout(long_folder), read_layout(short_folder)
    check_relatives(long_folder, short_folder, long_tensors, short_tensors)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files: dict[str, list[str]] = {}
    for name, info in long_tensors.items():
        files.setdefault(info.file, []).append(name)
    done = 0
    with _reader(long_folder, long_tensors) as read_long, _reader(short_folder, short_tensors) as read_short:
        for file, names in files.items():
            with _writer(partial / file, {name: long_tensors[name] for name in names}) as write:
                for name in names:
                    write(average(name, read_long(name), read_short(name), weight))
                    done += 1
                    report(done, len(long_tensors))
    for name in (*COPIED, INDEX):
        if (long_folder / name).is_file():
            shutil.copyfile(long_folder / name, partial / name)
    fault("merge.model")
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    return {
        "weight": weight,
        "tensors": len(long_tensors),
        "parameters": sum(math.prod(info.shape) for info in long_tensors.values()),
        "bytes": sum(info.num_bytes for info in long_tensors.values()),
    }


def average(name: str, long: torch.Tensor, short: torch.Tensor, weight: float) -> torch.Tensor:
    """weight * long + (1 - weight) * short in fp32, in the dtype of `long`; a parent's own tensor at weight 1 and 0."""
    for which, tensor in (("long", long), ("short", short)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"tensor {name} of the {which} model has values that are not finite")
    if weight == 1:
        merged = long
    elif weight == 0:
        merged = short.to(long.dtype)
    else:
        # Two rounded products and their sum; a fused multiply-add would depend on which parent comes first.
        merged = long.float().mul(weight).add_(short.float().mul(1 - weight)).to(long.dtype)
    if not torch.isfinite(merged).all():
        raise ValueError(f"tensor {name}: the merged values do not fit into {long.dtype}")
    return merged


def check_relatives(
    long_folder: Path,
    short_folder: Path,
    long_tensors: Mapping[str, TensorInfo],
    short_tensors: Mapping[str, TensorInfo],
) -> None:
    """Refuse parents whose weights do not mean the same; the message names the first key, tensor or token id."""
    _check_configs(long_folder, short_folder)
    _check_tokenizers(long_folder, short_folder)
    only_long, only_short = long_tensors.keys() - short_tensors.keys(), short_tensors.keys() - long_tensors.keys()
    for names, folder, other in ((only_long, long_folder, short_folder), (only_short, short_folder, long_folder)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"tensor {min(names)}{more} of {folder} is not in {other}: the two cannot be averaged")
    for name, info in long_tensors.items():
        if info.shape != short_tensors[name].shape:
            raise ValueError(
                f"tensor {name} has shape {info.shape} in {long_folder} and {short_tensors[name].shape} in "
                f"{short_folder}"
            )


def read_layout(folder: Path) -> dict[str, TensorInfo]:
    """Name, file, shape and dtype of every tensor of a model folder, in file order; only safetensors are read."""
    if (folder / INDEX).is_file():
        weight_map: dict[str, str] = read_json(folder / INDEX)["weight_map"]
        names = sorted(set(weight_map.values()))
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{folder / INDEX} names a file outside its folder")
    elif (folder / SINGLE).is_file():
        weight_map, names = {}, [SINGLE]
    else:
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}: only safetensors can be merged")
    tensors: dict[str, TensorInfo] = {}
    for file in names:
        for name, info in _read_header(folder / file).items():
            if name in tensors or (weight_map and weight_map.get(name) != file):
                raise ValueError(f"tensor {name} of {folder / file} is not where {INDEX} has it")
            if info.dtype not in DTYPES:
                raise ValueError(
                    f"tensor {name} of {folder} has dtype {info.dtype}: only the float types {', '.join(DTYPES)} can "
                    "be averaged; merge models that are not quantised"
                )
            tensors[name] = info
    lost = weight_map.keys() - tensors.keys()
    if lost:
        raise ValueError(f"tensor {min(lost)} is in {folder / INDEX} and in none of its files")
    return tensors


def _check_configs(long_folder: Path, short_folder: Path) -> None:
    long_config, short_config = (AutoConfig.from_pretrained(str(f)).to_dict() for f in (long_folder, short_folder))
    for key in sorted((long_config.keys() | short_config.keys()) - FREE_KEYS):
        ours, theirs = long_config.get(key), short_config.get(key)
        if ours != theirs:
            raise ValueError(
                f"config key {key} is {ours!r} in {long_folder} and {theirs!r} in {short_folder}: weights trained "
                "under one do not fit the other"
            )


def _check_tokenizers(long_folder: Path, short_folder: Path) -> None:
    ours, theirs = load_tokenizer(long_folder), load_tokenizer(short_folder)
    our_ids, their_ids = ({i: token for token, i in t.get_vocab().items()} for t in (ours, theirs))
    for index in sorted(our_ids.keys() | their_ids.keys()):
        if our_ids.get(index) != their_ids.get(index):
            raise ValueError(
                f"token id {index} is {our_ids.get(index)!r} in {long_folder} and {their_ids.get(index)!r} in "
                f"{short_folder}: their embeddings stand for different words"
            )
    for key in SPECIAL_TOKENS:
        if getattr(ours, key) != getattr(theirs, key):
            raise ValueError(
                f"{key} is {getattr(ours, key)} in {long_folder} and {getattr(theirs, key)} in {short_folder}"
            )


def _folder(name: str | Path) -> Path:
    """A model folder: the one given, or the files of a hub id."""
    if Path(name).is_dir():
        return Path(name)
    if isinstance(name, Path) or name.startswith(("/", ".")):
        raise ValueError(f"{name} is not a folder")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.safetensors", INDEX, *COPIED]))


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """What a safetensors file says it holds, in the order of the data. `safe_open` checks sizes when it opens it."""
    with safe_open(path, framework="pt") as file:
        names = file.offset_keys()
        slices = {name: file.get_slice(name) for name in names}
        return {name: TensorInfo(path.name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


@contextmanager
def _reader(folder: Path, tensors: Mapping[str, TensorInfo]) -> Iterator[Callable[[str], torch.Tensor]]:
    """A function that reads one tensor by name; files stay open and mapped, not loaded."""
    with ExitStack() as stack:
        files = {
            file: stack.enter_context(safe_open(folder / file, framework="pt"))
            for file in {info.file for info in tensors.values()}
        }
        yield lambda name: files[tensors[name].file].get_tensor(name)


@contextmanager
def _writer(path: Path, tensors: Mapping[str, TensorInfo]) -> Iterator[Callable[[torch.Tensor], None]]:
    """A safetensors file that takes its tensors one by one, in the order of `tensors`.

    The format: 8 bytes with the length of the header, the header as JSON padded by spaces to a multiple of 8, the data.
    `safetensors.torch.save_file` wants all tensors of a file in memory at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in tensors.items():
        end = offset + info.num_bytes
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)

        def write(tensor: torch.Tensor) -> None:
            fault("merge.tensor")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

        yield write
        if file.tell() != 8 + len(text) + offset:
            raise RuntimeError(f"{path}: {file.tell()} bytes were written, its header says {8 + len(text) + offset}")
        file.flush()
        os.fsync(file.fileno())
