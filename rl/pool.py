"""The rollout pool on disk: sample once, use for traces, shortest, pairs and evaluation.

    pool.json                          the address: what was sampled, from what, how
    samples-00000.jsonl                completions, a shard a file
    verdicts-<version>-00000.jsonl     what one version of the verifier says of the completions of shard 00000
    files.jsonl                        the manifest: rows, bytes, sha256 and samples of each of these files, a line each
    judging.jsonl                      a log: how long each shard's verdicts took, the slowest, the undecided

A pool is addressed by model, problems, template, sampling settings and seed, without the number of samples: asking for
16 where 8 are there draws the other 8. Verdicts lie beside the samples, so that a better verifier judges without
sampling. Every file is written whole, synced and renamed into place, so a killed fill goes on with what is missing,
and no sample is there twice or drawn twice. Shards hold what was missing in a fixed order: a fill that was killed, and
called again with the same arguments, cuts the rest into the same shards as one that was not. A shard is what one call
of the sampler draws, so one whose rounding depends on the batch (transformers) makes the same bytes all the same, if it
answers in order. Shards are numbered as they arrive: for other samplers the `canonical_hash` is the same. Another
`shard_size`, or more samples asked for before the first were whole, makes other batches.

One process writes, any number read. A cluster needs no more than that: each process fills the part of the problems
that its rank names into a folder of its own, and `join_pools` makes one pool of them (rl/pool_parts.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import groupby
from typing import TYPE_CHECKING

from rl.pool_files import SAMPLE_FIELDS, Key, PoolAddress, PoolFull, pool_address
from rl.pool_parts import Part, part_of
from rl.pool_store import Pool
from rl.prompts import render_prompt
from rl.samplers.base import OneByOne, Sampler, SampleRequest, SamplingSettings, ShardSampler, sample_seed
from rl.tasks.base import Task
from rl.types import Completion, FinishReason, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Pool", "PoolAddress", "pool_address", "fill_pool", "PoolFull", "Key", "SAMPLE_FIELDS"]

Wanted = tuple[Problem, int]  # a problem and a sample index


def fill_pool(
    pool: Pool,
    sampler: Sampler | ShardSampler,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    task: Task,
    samples: int,
    settings: SamplingSettings,
    seed: int,
    suffix: str = "",
    shard_size: int = 512,
    progress: Callable[[int, int], None] = lambda done, total: None,
    part: Part | None = None,
) -> None:
    """Draw what `samples` completions of each problem lack, `shard_size` a shard, and judge them.

    Sample i of a problem is drawn with the seed (`seed`, problem id, i), as `rl.rollout.sample_groups` does. All shards
    are handed to the sampler at once and written as they arrive; one thread judges those that are there while others
    are drawn. `part=(3, 8)` draws the fourth of eight parts of the problems only; `problems` are always all of them.
    Killed and called again, it goes on with what is missing. `progress(done, total)` counts samples.

    Errors: RunLocked if another process writes this pool; PoolFull if the disk is full; what the judge raised, after
    the shards that had arrived are written; RuntimeError for a sampler that leaves out or aborts samples (what it did
    not abort is kept); ValueError for settings that are not the pool's.
    """
    wanted = (float(settings.temperature), float(settings.top_p), settings.max_tokens, seed)
    address = pool.address
    if wanted != (address.temperature, address.top_p, address.max_tokens, address.seed):
        raise ValueError(
            f"{pool.folder}: asked to sample with {settings} and seed {seed}, but its address is {address}"
        )
    own = part_of(problems, part)
    total = samples * len(own)
    if not (pool.missing(own, samples) or pool.unjudged(task.verifier_version) or pool.unlisted()):
        progress(total, total)
        return  # a finished pool that may only be read needs no lock
    by_id = {problem.id: problem for problem in problems}
    judge = ThreadPoolExecutor(1, thread_name_prefix="judge")
    with pool.writing():
        judging: deque[Future[None]] = deque(
            judge.submit(pool.judge_shard, shard, by_id, task) for shard in pool.unjudged(task.verifier_version)
        )
        try:
            lacking = pool.missing(own, samples)
            done = total - len(lacking)
            progress(done, total)
            shards = _races(pool, lacking, samples, shard_size) if address.racing else _cut(lacking, shard_size)
            unfinished = dict.fromkeys(problem.id for problem, _ in lacking)
            prompts = {name: render_prompt(tokenizer, by_id[name], suffix) for name in unfinished}
            requests = [
                [SampleRequest(prompts[p.id], sample_seed(seed, p.id, i)) for p, i in shard] for shard in shards
            ]
            aborted = 0
            with closing(
                _arrivals(sampler, requests, settings, lambda finished: progress(done + finished, total))
            ) as arrivals:
                for shard, completions in arrivals:
                    rows = [
                        (problem, i, prompts[problem.id], completion)
                        for (problem, i), completion in zip(shards[shard], completions, strict=True)
                        if address.racing or completion.finish_reason is not FinishReason.ABORTED
                    ]
                    aborted += len(completions) - len(rows)
                    if rows:
                        judging.append(judge.submit(pool.judge_shard, pool.add_shard(rows), by_id, task))
                    while judging and judging[0].done():
                        judging.popleft().result()  # raises what the judge raised
            progress(total - aborted, total)
            for judged in judging:
                judged.result()
        finally:
            judge.shutdown(wait=True, cancel_futures=True)
    if aborted:
        raise RuntimeError(
            f"{pool.folder}: the sampler aborted {aborted} samples, which are still missing; fill the pool again to "
            "draw them, or give a racing pool to a sampler that races"
        )


def _arrivals(
    sampler: Sampler | ShardSampler,
    shards: list[list[SampleRequest]],
    settings: SamplingSettings,
    report: Callable[[int], None],
) -> Generator[tuple[int, list[Completion]], None, None]:
    """(shard, its completions) as they arrive, held to the protocol: each shard once, a completion for each request."""
    if not shards:
        return
    whole = sampler if isinstance(sampler, ShardSampler) else OneByOne(sampler)
    waiting = set(range(len(shards)))
    stream = whole.sample_shards(shards, settings, report)
    try:
        for shard, completions in stream:
            if shard not in waiting or len(completions) != len(shards[shard]):
                raise RuntimeError(
                    f"the sampler gave {len(completions)} completions for shard {shard} of {len(shards)}: it gave that "
                    "one before, it was not asked for it, or the shard has another number of requests"
                )
            waiting.remove(shard)
            yield shard, completions
    finally:
        if (close := getattr(stream, "close", None)) is not None:
            close()  # a generator that holds engines lets go of them now
    if waiting:
        raise RuntimeError(f"the sampler left out {len(waiting)} of {len(shards)} shards, the first is {min(waiting)}")


def _cut(lacking: Sequence[Wanted], shard_size: int) -> list[Sequence[Wanted]]:
    return [lacking[start : start + shard_size] for start in range(0, len(lacking), shard_size)]


def _races(pool: Pool, lacking: Sequence[Wanted], samples: int, shard_size: int) -> list[Sequence[Wanted]]:
    """Shards that hold whole races: all samples of a problem run against each other, so none comes later."""
    shards: list[list[Wanted]] = []
    for _, members in groupby(lacking, key=lambda wanted: wanted[0].id):
        race = list(members)
        if len(race) < samples:
            raise ValueError(
                f"{pool.folder}: problem {race[0][0].id} has raced with {samples - len(race)} samples, more cannot "
                f"join; ask for as many as raced, or race {samples} in another folder"
            )
        if not shards or len(shards[-1]) + samples > max(shard_size, samples):
            shards.append([])
        shards[-1] += race
    return list(shards)
