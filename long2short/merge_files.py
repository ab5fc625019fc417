"""Model folders tensor by tensor: where each tensor lies, reading pieces of it, writing it in pieces.

The safetensors format: 8 bytes with the length of the header, the header as JSON padded by spaces to a multiple of 8,
the data. Files are read mapped and written at known offsets, so that several threads can work on one tensor and nothing
of the size of a tensor is ever held. `safetensors.torch.save_file` wants all tensors of a file in memory at once.

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

from rl.faults import fault
from rl.runs import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What a merged model takes from one parent besides weights, where it has it.
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
CHAT_TEMPLATES = "additional_chat_templates/*.jinja"  # beside the default one
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and what it is. Example: `TensorInfo("model.safetensors", (27, 128), "F32")`."""

    file: str
    shape: tuple[int, ...]
    dtype: str  # in safetensors' words

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model folder and its tensors, in file order.

    Example: `ModelFolder.open("runs/tiny/teacher-0a1b2c3d/model").tensors["model.norm.weight"].shape` is `(128,)`.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]

    def copy_rest(self, target: Path) -> None:
        """Copy what is not weights into the folder `target`; of weights in shards their index, too."""
        sharded = any(info.file != SINGLE for info in self.tensors.values())
        names = [*COPIED, INDEX] if sharded else list(COPIED)
        found = [self.path / name for name in names if (self.path / name).is_file()]
        for source in [*found, *sorted(self.path.glob(CHAT_TEMPLATES))]:
            copy = target / source.relative_to(self.path)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, copy)

    @classmethod
    def open(cls, name: str | Path) -> ModelFolder:
        """A model folder, or the files of a hub id."""
        path = find_folder(name)
        return cls(path, read_layout(path))

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], torch.Tensor]]:
        """A function that gives a tensor by name, flat, as a view of the mapped file: never write into it."""
        with ExitStack() as stack:
            files = {
                file: stack.enter_context(safe_open(self.path / file, framework="pt"))
                for file in {info.file for info in self.tensors.values()}
            }
            yield lambda name: files[self.tensors[name].file].get_tensor(name).reshape(-1)


def find_folder(name: str | Path) -> Path:
    """A model folder: the one given, or the files of a hub id."""
    if Path(name).is_dir():
        return Path(name)
    if isinstance(name, Path) or name.startswith(("/", ".")):
        raise ValueError(f"{name} is not a folder")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.safetensors", INDEX, *COPIED, CHAT_TEMPLATES]))


def read_layout(folder: Path) -> dict[str, TensorInfo]:
    """Name, file, shape and dtype of every tensor of a model folder, in file order; only safetensors are read.

    Of a single file and an index beside it the single file counts, as in `from_pretrained`.
    """
    weight_map: dict[str, str] = {}
    if (folder / SINGLE).is_file():
        names = [SINGLE]
    elif (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX)["weight_map"]
        names = sorted(set(weight_map.values()))
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{folder / INDEX} names a file outside its folder")
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
                    "be merged; merge models that are not quantised"
                )
            tensors[name] = info
    lost = weight_map.keys() - tensors.keys()
    if lost:
        raise ValueError(f"tensor {min(lost)} is in {folder / INDEX} and in none of its files")
    return tensors


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """What a safetensors file says it holds, in the order of the data. `safe_open` checks sizes when it opens it."""
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.offset_keys()}
        return {name: TensorInfo(path.name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


@dataclass(frozen=True, slots=True)
class ShardWriter:
    """An open safetensors file whose tensors may be written in pieces, in any order, from any thread."""

    path: Path
    descriptor: int
    starts: Mapping[str, int]  # where each tensor's data begins, in bytes from the start of the file

    def write(self, name: str, first: int, values: torch.Tensor) -> None:
        """Write `values`, a flat piece of tensor `name` in its stored dtype that begins at element `first`.

        Errors: OSError of a full or broken disk, with the name of the file.
        """
        data = values.contiguous().view(torch.uint8).numpy().data
        offset = self.starts[name] + first * values.element_size()
        try:
            while data:
                written = os.pwrite(self.descriptor, data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            message = f"{error.strerror or error} while a merged model was written; free space there and run again"
            raise OSError(error.errno, message, str(self.path)) from error


@contextmanager
def open_shard(path: Path, tensors: Mapping[str, TensorInfo]) -> Iterator[ShardWriter]:
    """A safetensors file of `tensors`, in their order, to be filled piece by piece. It has its full size at once.

    It is not synced: what makes a stage's folder a finished one syncs all files in it.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in tensors.items():
        end = offset + info.num_bytes
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    starts = {name: data + header[name]["data_offsets"][0] for name in tensors}
    fault("merge.shard")
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        file.truncate(data + offset)
        yield ShardWriter(path, file.fileno(), starts)


def by_file(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of each file, in order: `{"model-00001-of-00002.safetensors": {"lm_head.weight": ...}, ...}`."""
    files: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        files.setdefault(info.file, {})[name] = info
    return files
