"""A pool filled by many processes that never meet: each draws a part of the problems, and the parts are joined.

    part 0 of 2 of [a, b, c, d, e] is [a, c, e], part 1 is [b, d]

Part i of n takes every n-th problem from the i-th on, so that a set sorted by difficulty gives parts of equal work.
Every part has the address of the whole, since the address names all problems. What a launcher has told its processes
(torchrun: RANK and WORLD_SIZE; Slurm: SLURM_PROCID and SLURM_NTASKS) is all that `auto` needs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rl.pool_files import ADDRESS, Key
from rl.pool_store import Pool
from rl.types import Problem, Verdict

Part = tuple[int, int]  # (index from 0, number of parts)

LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))  # torchrun comes first: it may run under Slurm


def part_of(problems: Sequence[Problem], part: Part | None) -> list[Problem]:
    """The problems of a part, in order; all of them for None. ValueError for a part that there is not."""
    if part is None:
        return list(problems)
    index, count = part
    if not 0 <= index < count:
        raise ValueError(f"part {index}/{count}: the index is counted from 0 and below the number of parts")
    return list(problems[index::count])


def parse_part(text: str, environment: Mapping[str, str]) -> Part:
    """A part from `3/8` (the fourth of eight), or from `auto` and what the launcher has set in the environment.

    Example: `parse_part("auto", {"RANK": "3", "WORLD_SIZE": "8"}) == (3, 8)`. ValueError for anything else.
    """
    if text == "auto":
        for index, count in LAUNCHERS:
            if index in environment and count in environment:
                text = f"{environment[index]}/{environment[count]}"
                break
        else:
            names = " nor ".join(" and ".join(pair) for pair in LAUNCHERS)
            raise ValueError(f"part auto: neither {names} is set; start with torchrun or srun, or say it: 0/8")
    match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if match is None or not int(match[1]) < int(match[2]):
        raise ValueError(f"part {text!r}: say auto, or index/parts with an index from 0, such as 0/8 to 7/8")
    return int(match[1]), int(match[2])


def part_folder(folder: Path, part: Part) -> Path:
    """Where a part of the pool in `folder` is filled: `pool/part-00003-of-00008` for part (3, 8) of `pool`."""
    return folder / f"part-{part[0]:05d}-of-{part[1]:05d}"


def join_pools(target: Path, parts: Sequence[Path]) -> Pool:
    """Add the samples and verdicts of `parts` to the pool in `target`, which is made where there is none.

    A sample that is in two of them with the same content is kept once. Killed and called again, it goes on; the parts
    stay as they are. A verifier's verdicts of a shard are carried over where the parts have all of them.

    Errors: ValueError for parts with different addresses, and for a sample with two contents, by name: then nothing
    is written. RunLocked while another process writes the target.
    """
    sources = [Pool.open(part, racing=None) for part in parts]
    if not sources:
        raise ValueError(f"{target}: there are no parts to join")
    for source in sources:
        source.address.require_same(sources[0].address, source.folder)
    if (target / ADDRESS).is_file():
        _require_one_content([Pool.open(target, sources[0].address), *sources])
    else:
        _require_one_content(sources)
    pool = Pool.open(target, sources[0].address)
    with pool.writing():
        there = set(pool.keys_in_order())
        for source in sources:
            for rows in source.lines():
                new = [(key, line) for key, line in rows if key not in there]
                if new:
                    pool.add_lines([key for key, _ in new], b"".join(line + b"\n" for _, line in new))
                    there.update(key for key, _ in new)
        versions = dict.fromkeys(version for source in sources for version in source.verifiers(whole=False))
        for version in versions:
            _carry_verdicts(pool, sources, version)
    return pool


def _require_one_content(pools: Sequence[Pool]) -> None:
    known: dict[Key, tuple[bytes, Path]] = {}
    for pool in pools:
        for key, digest in pool.digests().items():
            other, folder = known.setdefault(key, (digest, pool.folder))
            if other != digest:
                raise ValueError(
                    f"sample {key[1]} of problem {key[0]} is not the same in {folder} and in {pool.folder}: leave one "
                    "of the two out"
                )


def _carry_verdicts(pool: Pool, sources: Sequence[Pool], version: str) -> None:
    found: dict[Key, Verdict] = {}
    for source in sources:
        unjudged = set(source.unjudged(version))
        for shard in range(source.num_shards):
            if shard not in unjudged:
                for key, verdict in source.shard_verdicts(shard, version).items():
                    found.setdefault(key, verdict)
    for shard in pool.unjudged(version):
        keys = pool.shard_keys(shard)
        if all(key in found for key in keys):
            pool.add_verdicts(shard, version, found)
