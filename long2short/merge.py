"""Model merging: the weights of a long-CoT and a short-CoT model become one model. No training.

Implements Kimi k1.5 (arXiv 2501.12599, section 2.4, "model merging"), with the share of the long model as a parameter,
for all tensors or per module and layer (long2short/merge_weights.py), and by any rule of long2short/merge_rules.py:
the weighted average, slerp, and the rules on deltas from a base.

Arithmetic is fp32. Config, generation config, tokenizer, chat template, the dtype of each tensor and the division into
files are those of one parent, the long one unless another is named, so that the result is prompted like it. Weight 1
and 0 copy a parent's tensors where the rule leads there, so the ends of a sweep are the parents, bit for bit (where the
parents share a dtype: the summary has both). An output layer that is tied to the embedding and stored beside it is
merged as the embedding is, so that they stay equal and tied.

Only relatives can be merged (long2short/merge_checks.py). A tensor is read from mapped files, merged and written in
pieces of 1 MiB, several at a time, each by one thread: reading, computing and writing overlap, and memory does not grow
with the tensor.

Line: `reason long2short RECIPE`, the stage with `method: merge`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from long2short.merge_checks import check_relatives, tied_tensors
from long2short.merge_files import DTYPES, ModelFolder, ShardWriter, TensorInfo, by_file, open_shard
from long2short.merge_rules import PIECE, Parts, Rule, linear
from long2short.merge_weights import Weights
from rl.faults import fault

MAX_THREADS = 8  # more than that wait for memory
LINEAR = Rule(linear)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Parents:
    """What is merged. Names are folders or hub ids. Example: `Parents("runs/…/teacher/model", "org/instruct")`."""

    long: str | Path
    short: str | Path
    base: str | Path | None = None  # for the rules that take deltas
    like_short: bool = False  # whether config, tokenizer, template, dtypes and files are the short one's


def merge(
    output: Path,
    parents: Parents,
    weights: Weights,
    rule: Rule = LINEAR,
    *,
    report: Callable[[int, int], None] = lambda tensor, total: None,
) -> dict[str, Any]:
    """Write the merged model to the folder `output`, which appears when all of it is there; returns a summary.

    `report(tensors done, tensors)`. As many threads as torch has work on it.

    Errors: ValueError, naming the tensor, key or token, for parents that are no relatives, for a weight's pattern that
    matches nothing, for different weights of tied tensors, for values that are not finite, for a result that overflows
    its dtype, and for an output that is or holds a parent; OSError of a full disk. After an error nothing is left.

    Example: long 2.0, short -1.0, weight 0.75 -> 1.25.
    """
    folders = open_parents(parents, rule)
    for path in (folder.path.resolve() for folder in folders):
        if output.resolve() in (path, *path.parents):
            does = "is" if output.resolve() == path else "holds"
            raise ValueError(f"{output} {does} one of the parents, which the result would replace; name another folder")
    like = folders[1 if parents.like_short else 0]
    shares = weights.for_tensors(like.tensors)
    tied = tied_tensors(like)
    for head, embedding in tied.items():
        if shares[head] != shares[embedding]:
            raise ValueError(
                f"weights: {head} has {shares[head]} and {embedding} {shares[embedding]}, but the config ties them; "
                "give both the same weight"
            )
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_weights(partial, folders, like, shares, tied, rule, report)
        like.copy_rest(partial)
        fault("merge.model")
        shutil.rmtree(output, ignore_errors=True)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return {
        "weight": weights.default,
        "weights": dict(weights.patterns),
        "tensors": len(like.tensors),
        "parameters": sum(info.numel for info in like.tensors.values()),
        "bytes": sum(info.num_bytes for info in like.tensors.values()),
        "dtypes": {
            name: sorted({info.dtype for info in folder.tensors.values()})
            for name, folder in zip(("long", "short", "base"), folders, strict=False)
        },
    }


def open_parents(parents: Parents, rule: Rule) -> tuple[ModelFolder, ...]:
    """The folders that the rule reads: long, short and perhaps base, checked to be relatives. Nothing is written."""
    if rule.takes_base != (parents.base is not None):
        raise ValueError("this rule needs a base" if rule.takes_base else "this rule takes no base: leave it out")
    long, short = ModelFolder.open(parents.long), ModelFolder.open(parents.short)
    check_relatives(long, short)
    if parents.base is None:
        return long, short
    base = ModelFolder.open(parents.base)
    check_relatives(long, base, special_tokens=False)
    return long, short, base


def _write_weights(
    partial: Path,
    folders: Sequence[ModelFolder],
    like: ModelFolder,
    shares: dict[str, float],
    tied: dict[str, str],
    rule: Rule,
    report: Callable[[int, int], None],
) -> None:
    done = 0
    with ExitStack() as stack:
        readers = [stack.enter_context(folder.reader()) for folder in folders]
        for file, tensors in by_file(like.tensors).items():
            with open_shard(partial / file, tensors) as writer, _single_threads() as pool:
                for name, info in tensors.items():
                    fault("merge.tensor")
                    parts = tuple(read(name) for read in readers)
                    tensor = _Tensor(name, tied.get(name, name), info, parts, pool)
                    tensor.merge(rule, shares[name], writer)
                    done += 1
                    report(done, len(like.tensors))


@contextmanager
def _single_threads() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch uses now, each of which computes alone.

    Small operations gain nothing from torch's own threads, and on a busy machine lose much by waiting for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread and of those that start from now on
    try:
        with ThreadPoolExecutor(min(threads, MAX_THREADS), "merge") as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of all parents, in pieces."""

    name: str
    drawn_as: str  # what a rule that draws knows it by: its own name, or that of the one it is tied to
    info: TensorInfo  # of the result
    parents: Parts  # flat views of the mapped files, in their own dtypes
    pool: ThreadPoolExecutor

    def merge(self, rule: Rule, weight: float, writer: ShardWriter) -> None:
        if not self.info.numel:
            return  # nothing to take a length or a threshold of, nothing to write
        dtype = DTYPES[self.info.dtype]
        copied = rule.interpolates and weight in (0, 1)
        source = self.parents[0 if weight == 1 else 1]
        combine = None if copied else rule.prepare(self.drawn_as, weight, self.each)

        def write(index: int) -> None:
            parts = self.parts(index)
            self.check_finite(parts)
            if combine is None:
                merged = source[index * PIECE : (index + 1) * PIECE]
            else:
                merged = combine(parts, index)
            converted = merged.to(dtype)
            if not _finite(converted):
                raise ValueError(f"tensor {self.name}: the merged values do not fit into {dtype}")
            writer.write(self.name, index * PIECE, converted)

        for _ in self.pool.map(write, self.pieces):
            pass

    @property
    def pieces(self) -> Iterable[int]:
        return range(-(-self.info.numel // PIECE))

    def each(self, function: Callable[[Parts], T]) -> Iterator[T]:
        return self.pool.map(lambda index: function(self.parts(index)), self.pieces)

    def parts(self, index: int) -> Parts:
        """Fresh fp32 copies of piece `index`."""
        span = slice(index * PIECE, (index + 1) * PIECE)
        return tuple(parent[span].to(torch.float32, copy=True) for parent in self.parents)

    def check_finite(self, parts: Parts) -> None:
        for which, part in zip(("long", "short", "base"), parts, strict=False):
            if not _finite(part):
                raise ValueError(f"tensor {self.name} of the {which} model has values that are not finite")


def _finite(values: torch.Tensor) -> bool:
    """Whether all are finite: the extremes are, one pass without a mask; NaN is both."""
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))
