"""What lies in a pool's folder: the address, the rows, the manifest, and how a full disk is reported.

Every file of a pool is written whole under its name and never changed. `files.jsonl`, the manifest, has a line for
each of them: rows, bytes, sha256, and for samples which ones, so that a pool is opened without reading its samples. A
file whose line a kill took is as whole as any: the next writer hashes it and adds the line, nothing is drawn again.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.jsonl import read_rows
from rl.runs import DamagedFolder, read_json, read_lines
from rl.samplers.base import SamplingSettings
from rl.types import Completion, FinishReason, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Key = tuple[str, int]  # (problem id, sample index)

ADDRESS = "pool.json"
FILES = "files.jsonl"  # the manifest
SAMPLES_NAME = re.compile(r"samples-(\d{5,})\.jsonl")
VERDICTS_NAME = re.compile(r"verdicts-(.+)-(\d{5,})\.jsonl")

SAMPLE_FIELDS = {
    "problem": str,
    "sample": int,
    "prompt_ids": list,
    "token_ids": list,
    "sampler_logprobs": list,
    "text": str,
    "finish_reason": str,
    "policy_version": int,
}
VERDICT_FIELDS = {"problem": str, "sample": int, "outcome": str, "reason": str, "failure": str}
MAY_BE_LEFT_OUT = {"racing", "native"}  # of an address
_FULL = (errno.ENOSPC, errno.EDQUOT)


# --- the address ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PoolAddress:
    """What a pool's samples are samples of. Two pools with one address hold draws from one distribution.

    Example: `PoolAddress("9a0f…", "5d41…", "77c3…", 1.0, 1.0, 160, 0)`; see `pool_address`.
    """

    model: str  # fingerprint of the model folder, or a hub id
    problems: str  # fingerprint of ids, questions and answers
    template: str  # fingerprint of the chat template and the prompt suffix
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    racing: bool = False  # the samples of a problem raced: the losers were aborted, so lengths are censored
    native: str = ""  # an engine's own settings that change the distribution (min_p, …), as JSON

    def to_json(self) -> dict[str, Any]:
        """As JSON values. What is not so says nothing, so the file of a plain pool stays what it was."""
        value = asdict(self)
        return {name: there for name, there in value.items() if name not in MAY_BE_LEFT_OUT or there}

    def require_same(self, other: PoolAddress, folder: Path) -> None:
        """ValueError naming the first field in which the pool in `folder` (this address) is another than `other`."""
        for field in fields(self):
            there, wanted = getattr(self, field.name), getattr(other, field.name)
            if there != wanted:
                raise ValueError(
                    f"{folder} holds samples with {field.name} = {there!r}, not {wanted!r}: "
                    "samples of two kinds cannot share a pool, use another folder"
                )


def pool_address(
    model: str,
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    settings: SamplingSettings,
    seed: int,
    suffix: str = "",
    racing: bool = False,
    native: Mapping[str, Any] | None = None,
) -> PoolAddress:
    """The address of the samples that `fill_pool` draws with the same arguments; `model` is its fingerprint.

    `racing`: the sampler aborts samples that can no longer win. Such a pool is of another kind and is never read as a
    plain one. `native`: settings of the engine beside `settings` that change what is drawn.

    Errors: ValueError for a rule that stops repetitions: it has no place in the address.
    """
    if settings.stop_repetition is not None:
        raise ValueError(
            "a pool holds completions that nothing but their end or their limit has stopped; leave out stop_repetition"
        )
    asked = [[p.id, p.text, p.answer, p.spec] if p.spec else [p.id, p.text, p.answer] for p in problems]
    return PoolAddress(
        model=model,
        problems=_fingerprint(asked),
        template=_fingerprint([tokenizer.chat_template, suffix]),
        temperature=float(settings.temperature),
        top_p=float(settings.top_p),
        max_tokens=settings.max_tokens,
        seed=seed,
        racing=racing,
        native=json.dumps(native, sort_keys=True) if native else "",
    )


def read_address(path: Path) -> PoolAddress:
    """The address in a `pool.json`; ValueError for anything else."""
    value = read_json(path)
    names = {field.name for field in fields(PoolAddress)}
    if (
        not isinstance(value, dict)
        or value.keys() | MAY_BE_LEFT_OUT != names
        or type(value.get("racing", False)) is not bool
    ):
        raise ValueError(f"{path}: not a pool's address, which has the keys {sorted(names)}")
    return PoolAddress(**value)


def _fingerprint(value: object) -> str:
    return sha256(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:16]


# --- the rows ---------------------------------------------------------------------------------------------------------


def sample_row(key: Key, prompt_ids: tuple[int, ...], completion: Completion) -> dict[str, object]:
    return {
        "problem": key[0],
        "sample": key[1],
        "prompt_ids": list(prompt_ids),
        "token_ids": list(completion.token_ids),
        "sampler_logprobs": list(completion.sampler_logprobs),
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "policy_version": completion.policy_version,
    }


def completion_of(row: Mapping[str, Any]) -> Completion:
    """The completion in the values of `sample_row`; ValueError for anything else."""
    return Completion(
        text=row["text"],
        token_ids=tuple(row["token_ids"]),
        sampler_logprobs=tuple(row["sampler_logprobs"]),
        finish_reason=FinishReason(row["finish_reason"]),
        policy_version=row["policy_version"],
    )


def read_samples(path: Path, racing: bool) -> Iterator[tuple[Key, tuple[int, ...], Completion]]:
    """(key, prompt ids, completion) of every row, read strictly; ValueError with file and line.

    An aborted completion belongs into a racing pool alone: elsewhere it is refused.
    """
    for place, row in read_rows(path, SAMPLE_FIELDS):
        try:
            completion = completion_of(row)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if completion.finish_reason is FinishReason.ABORTED and not racing:
            raise ValueError(f"{place}: an aborted completion, but this is not a racing pool")
        yield (row["problem"], row["sample"]), tuple(row["prompt_ids"]), completion


# --- the manifest -----------------------------------------------------------------------------------------------------

Range = tuple[str, int, int]  # (problem id, first sample, last sample), both included


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A line of the manifest: what one file of a pool holds.

    Example: `{"file": "samples-00000.jsonl", "rows": 5, "bytes": 2117, "sha256": "5d41…", "samples": [["p1", 0, 3],
    ["p2", 0, 0]]}`: samples 0 to 3 of p1 and sample 0 of p2, in this order.
    """

    file: str
    rows: int
    size: int  # bytes
    sha256: str
    ranges: tuple[Range, ...] = ()  # of a file of samples

    @classmethod
    def of(cls, file: str, content: bytes, keys: Iterable[Key] = ()) -> FileEntry:
        """The entry of a file with this content."""
        return cls(file, content.count(b"\n"), len(content), sha256(content).hexdigest(), ranges_of(keys))

    @property
    def keys(self) -> list[Key]:
        """The samples of the file, in the order of its rows."""
        return [(problem, sample) for problem, first, last in self.ranges for sample in range(first, last + 1)]

    def to_json(self) -> dict[str, Any]:
        value = {"file": self.file, "rows": self.rows, "bytes": self.size, "sha256": self.sha256}
        return value | {"samples": [list(one) for one in self.ranges]} if self.ranges else value


def ranges_of(keys: Iterable[Key]) -> tuple[Range, ...]:
    """Runs of consecutive samples: `ranges_of([("p", 0), ("p", 1), ("q", 4)]) == (("p", 0, 1), ("q", 4, 4))`"""
    found: list[Range] = []
    for problem, sample in keys:
        if found and found[-1][0] == problem and found[-1][2] == sample - 1:
            found[-1] = (problem, found[-1][1], sample)
        else:
            found.append((problem, sample, sample))
    return tuple(found)


def read_manifest(folder: Path) -> dict[str, FileEntry]:
    """{file name: its entry}; a torn last line is left out, and a later line of a file replaces an earlier one.

    Errors: DamagedFolder, naming the line, for one that is no entry.
    """
    path = folder / FILES
    if not path.is_file():
        return {}
    try:
        entries = [_entry(value) for value in read_lines(path)]
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedFolder(
            f"{path} cannot be read ({error}): move it away, and the next writer makes it again from the files"
        ) from error
    return {entry.file: entry for entry in entries}


def _entry(value: Mapping[str, Any]) -> FileEntry:
    ranges = tuple((str(problem), int(first), int(last)) for problem, first, last in value.get("samples", ()))
    entry = FileEntry(str(value["file"]), int(value["rows"]), int(value["bytes"]), str(value["sha256"]), ranges)
    if ranges and sum(last - first + 1 for _, first, last in ranges) != entry.rows:
        raise ValueError(f"the samples of {entry.file} are not its {entry.rows} rows")
    return entry


# --- a full disk ------------------------------------------------------------------------------------------------------


class PoolFull(OSError):
    """The disk is full. No half-written file is left, what the pool held it still holds, and it can be filled on."""

    def __init__(self, path: Path, needed: int) -> None:
        self.needed = needed  # bytes of the file that could not be written
        self.free = shutil.disk_usage(next(there for there in path.parents if there.exists())).free  # bytes
        super().__init__(
            errno.ENOSPC,
            f"the disk is full: {needed:,} bytes are needed there and {self.free:,} are free; free some space and run "
            "the same command again, it goes on with what the pool lacks",
            str(path),
        )


@contextmanager
def full_disk(path: Path, needed: int) -> Iterator[None]:
    """A full disk or quota while the `needed` bytes of `path` are written becomes a PoolFull."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise PoolFull(path, needed) from error
        raise
