"""A pool filled by scripted samplers, without torch: for the tests of pools, and run as a child that can be killed.

python tests/pool_world.py FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from rl.pool import Pool, PoolAddress, fill_pool, pool_address
from rl.samplers.base import OneByOne, SampleRequest, SamplingSettings
from rl.tasks import tiny
from rl.tasks.base import Task
from rl.types import Completion, FinishReason, Problem

SETTINGS = SamplingSettings(max_tokens=40)
SEED = 7
SAMPLES = 3
SHARD = 4
PROBLEMS = tiny.problems("train", 5, (2,))


class Letters:
    """A tokenizer of one token a character."""

    chat_template = None

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


TOKENIZER = cast(Any, Letters())


class ScriptedSampler:
    """Answers from the seed alone, with a line separator that is part of the text."""

    policy_version = 0

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def sample(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        report: Callable[[int], None] = lambda finished: None,
    ) -> list[Completion]:
        self.seeds += [request.seed for request in requests]
        report(len(requests))
        return [self.complete(request) for request in requests]

    def complete(self, request: SampleRequest) -> Completion:
        text = f"{request.seed}\u2028</think>{request.seed % 100:02}"
        return Completion(text, (5, 6, 1), (-0.1, -1e-17, 0.0), FinishReason.STOP)


class Shuffled(ScriptedSampler):
    """The same answers, the last shard first."""

    def sample_shards(
        self,
        shards: Sequence[Sequence[SampleRequest]],
        settings: SamplingSettings,
        report: Callable[[int], None] = lambda finished: None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        yield from reversed(list(OneByOne(self).sample_shards(shards, settings, report)))


def address(problems: Sequence[Problem] = PROBLEMS, racing: bool = False) -> PoolAddress:
    return pool_address("base", problems, TOKENIZER, SETTINGS, SEED, racing=racing)


def fill(
    folder: Path,
    samples: int = SAMPLES,
    sampler: Any = None,
    task: Task = tiny.TASK,
    problems: Sequence[Problem] = PROBLEMS,
    racing: bool = False,
    shard_size: int = SHARD,
    **options: Any,
) -> Any:
    """Fill the pool in `folder`; gives back the sampler, which knows what was asked of it."""
    sampler = sampler or ScriptedSampler()
    pool = Pool.open(folder, address(problems, racing))
    fill_pool(pool, sampler, TOKENIZER, problems, task, samples, SETTINGS, SEED, shard_size=shard_size, **options)
    return sampler


if __name__ == "__main__":
    fill(Path(sys.argv[1]))
