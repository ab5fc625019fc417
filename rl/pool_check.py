"""What is wrong with a pool: everything read and hashed, every row looked at. Opening a pool does none of this.

reason pool check POOL
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rl.jsonl import read_rows
from rl.judging import JUDGING, verdict_of
from rl.pool_files import (
    ADDRESS,
    FILES,
    SAMPLES_NAME,
    VERDICT_FIELDS,
    VERDICTS_NAME,
    FileEntry,
    Key,
    PoolAddress,
    read_address,
    read_manifest,
    read_samples,
)
from rl.runs import file_hash
from rl.types import Problem

# Files that are no part of the samples and may lie beside them: the log, and what `reason rescore` writes.
_BESIDE = re.compile(rf"{re.escape(JUDGING)}|changed-.+\.jsonl|audit-.+\.jsonl")


class Damage(StrEnum):
    """What can be wrong with a pool."""

    MISSING = "missing"  # a file that the manifest lists, or a shard below others
    CHANGED = "changed"  # a file's sha256 is not the manifest's
    UNREADABLE = "unreadable"  # a torn file, or a row that is no sample or no verdict
    DUPLICATE = "duplicate"  # a sample or a verdict that is there twice
    FOREIGN = "foreign"  # a file or a sample that does not belong into this pool
    ORPHAN = "orphan"  # a verdict without its sample
    UNJUDGED = "unjudged"  # a sample without its verdict in a shard that was judged


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. Example: `Finding(Damage.CHANGED, "samples-00001.jsonl", "its sha256 is 9a0f… …")`"""

    damage: Damage
    file: str
    detail: str
    key: Key | None = None  # the sample, where it is one

    def __str__(self) -> str:
        what = "" if self.key is None else f", sample {self.key[1]} of problem {self.key[0]}"
        return f"{self.damage}: {self.file}{what}: {self.detail}"


def check_pool(folder: Path, problems: Sequence[Problem] | None = None) -> tuple[Finding, ...]:
    """Everything that is wrong with the pool in `folder`, which may be too damaged to be opened.

    Hashes are computed anew, all rows are read. With the problems that were sampled, samples of others are found too.
    An unfinished pool is not damaged: shards that nobody has judged yet and files whose line in the manifest a kill
    took are no findings. ValueError if the folder holds no pool at all.
    """
    address = read_address(folder / ADDRESS) if (folder / ADDRESS).is_file() else None
    if address is None:
        raise ValueError(f"{folder} holds no pool: {ADDRESS} is missing")
    known = None if problems is None else {problem.id for problem in problems}
    try:
        listed = read_manifest(folder)
    except ValueError as error:
        return (Finding(Damage.UNREADABLE, FILES, str(error)),)
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    findings = list(_files(folder, listed, names))
    found: dict[Key, str] = {}  # sample -> the file that holds it
    prompts: dict[str, tuple[int, ...]] = {}
    unread: set[str] = set()  # of a shard with a bad row nobody knows which samples it held
    for name in filter(SAMPLES_NAME.fullmatch, names):
        wrong = list(_samples(folder / name, address, known, found, prompts))
        findings += wrong
        if any(finding.damage is Damage.UNREADABLE for finding in wrong):
            unread.add(name)
    for name in names:
        if match := VERDICTS_NAME.fullmatch(name):
            shard = f"samples-{match[2]}.jsonl"
            if shard in names and shard not in unread:
                findings += _verdicts(folder / name, shard, found)
    return tuple(findings)


def _files(folder: Path, listed: dict[str, FileEntry], names: list[str]) -> Iterator[Finding]:
    for name, entry in sorted(listed.items()):
        if name not in names:
            yield Finding(Damage.MISSING, name, f"the manifest lists it with {entry.rows} rows")
        elif (there := file_hash(folder / name)) != entry.sha256:
            yield Finding(Damage.CHANGED, name, f"its sha256 is {there[:16]}… and the manifest's {entry.sha256[:16]}…")
    shards = {int(match[1]) for name in names if (match := SAMPLES_NAME.fullmatch(name))}
    for shard in sorted(set(range(max(shards, default=-1))) - shards):
        if (name := f"samples-{shard:05d}.jsonl") not in listed:
            yield Finding(Damage.MISSING, name, "later shards are there")
    for name in names:
        if match := VERDICTS_NAME.fullmatch(name):
            if int(match[2]) not in shards:
                yield Finding(Damage.ORPHAN, name, "there is no shard of this number")
        elif not (name in (ADDRESS, FILES) or SAMPLES_NAME.fullmatch(name) or _BESIDE.fullmatch(name)):
            yield Finding(Damage.FOREIGN, name, "no file of a pool has such a name")


def _samples(
    path: Path,
    address: PoolAddress,
    known: set[str] | None,
    found: dict[Key, str],
    prompts: dict[str, tuple[int, ...]],
) -> Iterator[Finding]:
    try:
        for key, prompt_ids, completion in read_samples(path, address.racing):
            if key in found:
                yield Finding(Damage.DUPLICATE, path.name, f"it is in {found[key]} too", key)
            found.setdefault(key, path.name)
            if known is not None and key[0] not in known:
                yield Finding(Damage.FOREIGN, path.name, "the problem is not among those that were sampled", key)
            if prompts.setdefault(key[0], prompt_ids) != prompt_ids:
                yield Finding(Damage.FOREIGN, path.name, "drawn from another prompt than the problem's others", key)
            if completion.num_tokens > address.max_tokens:
                detail = f"{completion.num_tokens} tokens under a limit of {address.max_tokens}"
                yield Finding(Damage.FOREIGN, path.name, detail, key)
    except ValueError as error:
        yield Finding(Damage.UNREADABLE, path.name, str(error))


def _verdicts(path: Path, shard: str, found: dict[Key, str]) -> Iterator[Finding]:
    judged: set[Key] = set()
    try:
        for place, row in read_rows(path, VERDICT_FIELDS):
            key = (row["problem"], row["sample"])
            if key in judged:
                yield Finding(Damage.DUPLICATE, path.name, "it has two verdicts", key)
            judged.add(key)
            try:
                verdict_of(row)
            except ValueError as error:
                yield Finding(Damage.UNREADABLE, path.name, f"{place}: {error}", key)
            if found.get(key) != shard:
                yield Finding(Damage.ORPHAN, path.name, f"a verdict, and no sample in {shard}", key)
    except ValueError as error:
        yield Finding(Damage.UNREADABLE, path.name, str(error))
        return  # what follows the bad row is not known
    for key in sorted(key for key, name in found.items() if name == shard and key not in judged):
        yield Finding(Damage.UNJUDGED, path.name, "a sample, and no verdict", key)
