"""An open pool: an index in memory, completions and verdicts on disk. See rl/pool.py for the folder and its rules."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from rl.jsonl import dump_lines, read_rows
from rl.judging import JUDGING, judge_attempts, judging_figures, notable_verdicts, verdict_of, verdict_row
from rl.pool_check import Finding, check_pool
from rl.pool_files import (
    ADDRESS,
    FILES,
    SAMPLES_NAME,
    VERDICT_FIELDS,
    VERDICTS_NAME,
    FileEntry,
    Key,
    PoolAddress,
    completion_of,
    full_disk,
    read_address,
    read_manifest,
    read_samples,
    sample_row,
)
from rl.runs import DamagedFolder, RunLock, append_line, file_hash, write_file, write_json
from rl.tasks.base import Task
from rl.types import Completion, FinishReason, Problem, Rollout, RolloutGroup, Verdict


class Pool:
    """An open pool. Use `Pool.open`; it keeps an index in memory and reads completions from disk when asked.

    Any number of processes may read while one writes. What is read is held against its sha256 in the manifest.
    """

    def __init__(self, folder: Path, address: PoolAddress) -> None:
        self.folder = folder
        self.address = address
        self._index: dict[Key, int] = {}  # what is there, and in which shard
        self._keys: list[list[Key]] = []  # the samples of each shard, in the order of its rows
        self._listed: dict[str, FileEntry] = {}  # the manifest
        self._lock = RunLock(folder)
        self._writers = 0  # calls that write now, nested or in threads
        self._mutex = threading.RLock()

    @classmethod
    def open(cls, folder: Path, address: PoolAddress | None = None, racing: bool | None = False) -> Pool:
        """Open the pool in `folder`, or make an empty one there; without an address, open what is there.

        Without an address a plain pool is expected, or a racing one with `racing=True`; None takes either. ValueError
        if the folder holds a pool with another address (the message names the field), DamagedFolder (a ValueError) for
        a file that is not what the manifest says. Samples that the manifest lists are not read: see `check`.
        """
        path = folder / ADDRESS
        if path.is_file():
            stored = read_address(path)
            if address is not None:
                stored.require_same(address, folder)
            elif racing is not None and stored.racing is not racing:
                raise ValueError(
                    f"{folder} is a {'racing' if stored.racing else 'plain'} pool, which cannot be read as the other "
                    "kind: the lengths of raced samples are censored"
                )
            address = stored
        elif address is None:
            raise ValueError(f"{folder} holds no pool: {ADDRESS} is missing")
        else:
            with full_disk(path, len(json.dumps(address.to_json(), indent=2))):
                write_json(path, address.to_json(), "pool.address")
        pool = cls(folder, address)
        pool._refresh()
        return pool

    def __len__(self) -> int:
        """How many samples the pool holds."""
        return len(self._index)

    @property
    def num_shards(self) -> int:
        return len(self._keys)

    def keys_in_order(self) -> list[Key]:
        """(problem id, sample index) of every sample, in canonical order: by problem id, then by sample."""
        return sorted(self._index)

    def size(self) -> int:
        """The bytes of its files."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())

    def shard_keys(self, shard: int) -> list[Key]:
        """The samples of a shard, in the order of its rows."""
        return self._keys[shard]

    def missing(self, problems: Sequence[Problem], samples: int) -> list[tuple[Problem, int]]:
        """What a pool with `samples` completions of each problem lacks, by problem and then by sample index.

        In a racing pool an aborted sample is there like any other: it has lost its race, and is never drawn again.
        """
        return [(p, i) for p in problems for i in range(samples) if (p.id, i) not in self._index]

    # --- writing ------------------------------------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the one writer of the pool; RunLocked names the process that is. Nested calls and threads share it.

        Whoever becomes the writer takes in what others wrote since this pool was opened, removes temporary files that
        a kill left, and adds the manifest's lines that a kill took.
        """
        with self._mutex:
            if not self._writers:
                try:
                    with full_disk(self._lock.path, 128):  # it writes down who holds it
                        self._lock.__enter__()
                    self._tidy()
                except BaseException:
                    self._lock.__exit__()
                    raise
            self._writers += 1
        try:
            yield
        finally:
            with self._mutex:
                self._writers -= 1
                if not self._writers:
                    self._lock.__exit__()

    def add_shard(self, rows: Sequence[tuple[Problem, int, tuple[int, ...], Completion]]) -> int:
        """Write (problem, sample index, prompt ids, completion) rows as the next shard: all of them or none.

        Returns the shard's number. ValueError for a sample that is there, and for an aborted one in a plain pool.
        """
        for problem, sample, _, completion in rows:
            if completion.finish_reason is FinishReason.ABORTED and not self.address.racing:
                raise ValueError(
                    f"{self.folder}: sample {sample} of problem {problem.id} was aborted; only a racing pool holds "
                    "such samples, and its address says so"
                )
        content = dump_lines(sample_row((p.id, i), prompt_ids, completion) for p, i, prompt_ids, completion in rows)
        return self.add_lines([(problem.id, sample) for problem, sample, _, _ in rows], content.encode("utf-8"))

    def add_lines(self, keys: Sequence[Key], content: bytes) -> int:
        """`add_shard` for rows that are lines already, one for each of `keys` in order."""
        with self.writing():
            seen: set[Key] = set()
            for key in keys:
                if key in self._index or key in seen:
                    raise ValueError(f"{self.folder}: sample {key[1]} of problem {key[0]} is already in the pool")
                seen.add(key)
            shard = self.num_shards
            path = self._samples_path(shard)
            with full_disk(path, len(content)):
                write_file(path, content, "pool.shard")
            # From here on the samples are there, whether or not the manifest's line comes through.
            self._keys.append(list(keys))
            self._index.update(dict.fromkeys(keys, shard))
            self._list(FileEntry.of(path.name, content, keys))
            return shard

    def add_verdicts(self, shard: int, version: str, verdicts: Mapping[Key, Verdict]) -> None:
        """Write what a verifier version says of each sample of a shard."""
        path = self._verdicts_path(shard, version)
        rows = [{"problem": key[0], "sample": key[1], **verdict_row(verdicts[key])} for key in self._keys[shard]]
        content = dump_lines(rows).encode("utf-8")
        with self.writing():
            with full_disk(path, len(content)):
                write_file(path, content, "pool.verdicts")
            self._list(FileEntry.of(path.name, content))

    def judge(self, problems: Sequence[Problem], task: Task) -> None:
        """Write the verdicts that this version of the task's verifier has not yet given; shard by shard."""
        if not self.unjudged(task.verifier_version):
            return  # a pool that may only be read needs no lock
        by_id = {problem.id: problem for problem in problems}
        with self.writing():
            for shard in self.unjudged(task.verifier_version):
                self.judge_shard(shard, by_id, task)

    def judge_shard(self, shard: int, by_id: Mapping[str, Problem], task: Task) -> None:
        """Judge one shard and write the verdicts; from any thread."""
        for problem_id, _ in self._keys[shard]:
            if problem_id not in by_id:
                raise ValueError(f"{self.folder} holds samples of {problem_id}, which is not among the problems")
        samples = list(self._read_samples(shard))
        verdicts = judge_attempts(task, [(by_id[key[0]], completion) for key, _, completion in samples])
        judged = {key: verdict for (key, _, _), verdict in zip(samples, verdicts, strict=True)}
        self.add_verdicts(shard, task.verifier_version, judged)
        figures = {name: round(value, 4) for name, value in judging_figures(verdicts).items()}
        line = {"verifier": task.verifier_version, "shard": shard, "verdicts": len(verdicts), **figures}
        with full_disk(self.folder / JUDGING, len(str(line))):
            notable = notable_verdicts((*key, verdict) for key, verdict in judged.items())
            append_line(self.folder / JUDGING, line | {"notable": notable})

    def _list(self, entry: FileEntry) -> None:
        with self._mutex:
            value = entry.to_json()
            with full_disk(self.folder / FILES, len(json.dumps(value))):
                append_line(self.folder / FILES, value)
            self._listed[entry.file] = entry

    def _tidy(self) -> None:
        self._refresh()
        for path in self.folder.glob(".*.tmp"):
            path.unlink()
        for name in self.unlisted():
            samples = SAMPLES_NAME.fullmatch(name)
            keys = self._keys[int(samples[1])] if samples else ()
            self._list(FileEntry.of(name, (self.folder / name).read_bytes(), keys))

    # --- reading ------------------------------------------------------------------------------------------------------

    def unjudged(self, version: str) -> list[int]:
        """The shards without verdicts of this verifier version."""
        return [shard for shard in range(self.num_shards) if not self._verdicts_path(shard, version).is_file()]

    def unlisted(self) -> list[str]:
        """The files that have no line in the manifest: those of an older pool, or what a kill left."""
        names = (name for name in sorted(os.listdir(self.folder)) if name not in self._listed)
        return [name for name in names if SAMPLES_NAME.fullmatch(name) or VERDICTS_NAME.fullmatch(name)]

    def verifiers(self, whole: bool = True) -> list[str]:
        """The verifier versions that have judged every shard (or, not `whole`, any), the one that did so last at the
        end."""
        found: dict[str, list[Path]] = {}
        for path in self.folder.iterdir():
            if match := VERDICTS_NAME.fullmatch(path.name):
                found.setdefault(match[1], []).append(path)
        wanted = {version: paths for version, paths in found.items() if not whole or len(paths) == self.num_shards}
        return sorted(wanted, key=lambda version: (max(path.stat().st_mtime_ns for path in wanted[version]), version))

    def samples(self) -> Iterator[tuple[str, int, Completion]]:
        """(problem id, sample index, completion) of everything there is, shard by shard."""
        for shard in range(self.num_shards):
            for (problem, sample), _, completion in self._read_samples(shard):
                yield problem, sample, completion

    def lines(self) -> Iterator[list[tuple[Key, bytes]]]:
        """The rows of each shard as they lie on disk, without their newlines: a list a shard."""
        for shard, keys in enumerate(self._keys):
            path = self._samples_path(shard)
            self._verify(path)
            yield list(zip(keys, path.read_bytes().split(b"\n")[:-1], strict=True))

    def in_order(self) -> Iterator[tuple[Key, tuple[int, ...], Completion]]:
        """(key, prompt ids, completion) of everything in canonical order, a row at a time: memory for one shard."""
        places: dict[Key, tuple[int, int, int]] = {}  # shard, first byte, bytes
        for shard, rows in enumerate(self.lines()):
            start = 0
            for key, line in rows:
                places[key] = (shard, start, len(line))
                start += len(line) + 1
        for key, (shard, start, size) in sorted(places.items()):
            with self._samples_path(shard).open("rb") as file:
                file.seek(start)
                row = json.loads(file.read(size))
            yield key, tuple(row["prompt_ids"]), completion_of(row)

    def digests(self) -> dict[Key, bytes]:
        """The sha256 of each sample's row, in canonical order."""
        found = {key: sha256(line).digest() for rows in self.lines() for key, line in rows}
        return dict(sorted(found.items()))

    def canonical_hash(self) -> str:
        """sha256 over the address and the samples in canonical order, 64 hex digits.

        Equal for two pools of one address with the same samples, whatever their shards and the order of arrival;
        verdicts do not count.
        """
        whole = sha256(json.dumps(self.address.to_json(), sort_keys=True).encode("utf-8"))
        for digest in self.digests().values():
            whole.update(digest)
        return whole.hexdigest()

    def check(self, problems: Sequence[Problem] | None = None) -> tuple[Finding, ...]:
        """Read and hash everything and say what is wrong; see `rl.pool_check.check_pool`."""
        return check_pool(self.folder, problems)

    def verdicts(self, version: str) -> dict[Key, Verdict]:
        """What one verifier version says of every sample; ValueError if it has not judged them all."""
        found: dict[Key, Verdict] = {}
        for shard in range(self.num_shards):
            found |= self.shard_verdicts(shard, version)
        return found

    def shard_verdicts(self, shard: int, version: str) -> dict[Key, Verdict]:
        """What one verifier version says of the samples of a shard."""
        path = self._verdicts_path(shard, version)
        if not path.is_file():
            raise ValueError(f"{path} is missing: verifier {version!r} has not judged these samples")
        self._verify(path)
        verdicts: dict[Key, Verdict] = {}
        for place, row in read_rows(path, VERDICT_FIELDS):
            try:
                verdicts[row["problem"], row["sample"]] = verdict_of(row)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
        if odd := verdicts.keys() ^ set(self._keys[shard]):
            key = min(odd)
            raise ValueError(f"{path}: sample {key[1]} of problem {key[0]} has a verdict or a completion, not both")
        return verdicts

    def groups(
        self, problems: Sequence[Problem], verifier_version: str, samples: int | None = None
    ) -> list[RolloutGroup]:
        """One judged group a problem, in order, with its samples 0..k-1 in order.

        `samples` is k; None takes as many as the pool holds of the best-sampled problem. ValueError, by name, if a
        problem lacks one of them or a verdict: a statistic over unequal groups would be wrong and look right. A race
        is read whole: the first k of more that raced are no race among k.
        """
        most = 1 + max((self._last_sample(problem.id) for problem in problems), default=-1)
        samples = most if samples is None else samples
        if self.address.racing and samples < most:
            raise ValueError(f"{self.folder}: {most} samples of a problem raced, {samples} of them are not a race")
        lacking = self.missing(problems, samples)
        if lacking:
            problem, sample = lacking[0]
            raise ValueError(
                f"{self.folder} lacks {len(lacking)} of {samples} samples x {len(problems)} problems, the first is "
                f"sample {sample} of problem {problem.id}: fill the pool first"
            )
        wanted = {(problem.id, sample) for problem in problems for sample in range(samples)}
        found: dict[Key, tuple[tuple[int, ...], Rollout]] = {}
        for shard in sorted({self._index[key] for key in wanted}):
            verdicts = self.shard_verdicts(shard, verifier_version)
            for key, prompt_ids, completion in self._read_samples(shard):
                if key in wanted:
                    found[key] = (prompt_ids, Rollout(completion, verdicts[key]))
        return [self._group(problem, [found[problem.id, i] for i in range(samples)]) for problem in problems]

    def _group(self, problem: Problem, drawn: list[tuple[tuple[int, ...], Rollout]]) -> RolloutGroup:
        prompts = {prompt_ids for prompt_ids, _ in drawn}
        if len(prompts) > 1:
            raise ValueError(f"{self.folder}: problem {problem.id} was sampled from {len(prompts)} different prompts")
        return RolloutGroup(problem, next(iter(prompts), ()), tuple(rollout for _, rollout in drawn))

    def _last_sample(self, problem_id: str) -> int:
        sample = 0
        while (problem_id, sample) in self._index:
            sample += 1
        return sample - 1

    def _samples_path(self, shard: int) -> Path:
        return self.folder / f"samples-{shard:05d}.jsonl"

    def _verdicts_path(self, shard: int, version: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", version):
            raise ValueError(f"verifier version {version!r} cannot be part of a file name: use letters, digits, . _ -")
        return self.folder / f"verdicts-{version}-{shard:05d}.jsonl"

    def _read_samples(self, shard: int) -> Iterator[tuple[Key, tuple[int, ...], Completion]]:
        path = self._samples_path(shard)
        self._verify(path)
        return read_samples(path, self.address.racing)

    def _verify(self, path: Path) -> None:
        entry = self._listed.get(path.name)
        if entry is not None and file_hash(path) != entry.sha256:
            raise DamagedFolder(
                f"{path} has changed since it was written: its sha256 is not the one in {FILES}; put the file back"
            )

    def _refresh(self) -> None:
        """Take in the shards that are there and not yet in the index."""
        self._listed = read_manifest(self.folder)
        there = set(os.listdir(self.folder))
        numbers = [int(found[1]) for name in there | self._listed.keys() if (found := SAMPLES_NAME.fullmatch(name))]
        for shard in range(self.num_shards, max(numbers, default=-1) + 1):
            path = self._samples_path(shard)
            if path.name not in there:
                raise DamagedFolder(f"{path} is missing, but {FILES} lists it or later shards are there: put it back")
            entry = self._listed.get(path.name)
            if entry is None:  # an older pool, or a kill took the line
                keys = [key for key, _, _ in read_samples(path, self.address.racing)]
            else:
                keys = entry.keys
                if (size := path.stat().st_size) != entry.size:
                    raise DamagedFolder(f"{path} has {size:,} bytes and not the {entry.size:,} that {FILES} says")
            for key in keys:
                if key in self._index:
                    raise DamagedFolder(f"{path}: sample {key[1]} of {key[0]} is there twice")
                self._index[key] = shard
            self._keys.append(keys)
