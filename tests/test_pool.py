"""The rollout pool: exactly once, resumable, refused when it is another pool or damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rl.faults import FaultRaised, reset_faults
from rl.jsonl import dump_lines, read_rows
from rl.pool import Pool, fill_pool, pool_address
from rl.repetition import RepetitionRule
from rl.samplers.base import SampleRequest, SamplingSettings, sample_seed
from rl.tasks import tiny
from rl.tasks.base import one_by_one
from rl.tasks.tiny_models import make_tokenizer
from rl.types import Completion, FinishReason, Outcome, Verdict

SETTINGS = SamplingSettings(max_tokens=40)


class ScriptedSampler:
    """Answers from the seed alone: right for even seeds, wrong for odd ones."""

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
        ids = (5, 6, 1)
        return [Completion(f"{r.seed}\u2028</think>00", ids, (-0.1, -1e-17, 0.0), FinishReason.STOP) for r in requests]


@pytest.fixture
def world():
    tokenizer = make_tokenizer()
    problems = tiny.problems("train", 5, (2,))
    return tokenizer, problems, pool_address("base", problems, tokenizer, SETTINGS, seed=7)


def fill(folder: Path, world, samples: int, shard_size: int = 4) -> ScriptedSampler:
    tokenizer, problems, address = world
    sampler = ScriptedSampler()
    pool = Pool.open(folder, address)
    fill_pool(pool, sampler, tokenizer, problems, tiny.TASK, samples, SETTINGS, 7, shard_size=shard_size)
    return sampler


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a pool but for its log of judging times."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "judging.jsonl"}


def test_groups_come_back_as_they_were_sampled(tmp_path, world):
    _, problems, address = world
    fill(tmp_path, world, samples=3)
    pool = Pool.open(tmp_path, address)
    assert len(pool) == 15
    groups = pool.groups(problems, tiny.TASK.verifier_version, samples=3)
    assert [group.problem for group in groups] == problems
    for group in groups:
        for index, rollout in enumerate(group.rollouts):
            assert rollout.completion.text == f"{sample_seed(7, group.problem.id, index)}\u2028</think>00"
            assert rollout.completion.sampler_logprobs == (-0.1, -1e-17, 0.0)
            assert rollout.right == (group.problem.answer == "00")
    # The pool's own k, and an earlier k of it.
    assert pool.groups(problems, "tiny-1") == groups
    assert [len(group.rollouts) for group in pool.groups(problems[:2], "tiny-1", samples=2)] == [2, 2]


def test_topping_up_draws_only_what_is_missing(tmp_path, world):
    first = fill(tmp_path, world, samples=2)
    again = fill(tmp_path, world, samples=2)
    more = fill(tmp_path, world, samples=4)
    assert (len(first.seeds), again.seeds, len(more.seeds)) == (10, [], 10)
    problems = world[1]
    assert set(first.seeds + more.seeds) == {sample_seed(7, p.id, i) for p in problems for i in range(4)}


@pytest.mark.parametrize(
    "site", ["pool.address:1", "pool.shard:1", "pool.shard:3", "pool.verdicts:2", "write.rename:3"]
)
def test_a_failed_fill_goes_on_to_the_same_bytes(tmp_path, world, monkeypatch, site):
    fill(tmp_path / "whole", world, samples=3)
    monkeypatch.setenv("REASON_FAULT", f"{site}:raise")
    reset_faults()
    with pytest.raises(FaultRaised):
        fill(tmp_path / "broken", world, samples=3)
    monkeypatch.delenv("REASON_FAULT")
    # A temporary file that a kill leaves is not read.
    (tmp_path / "broken" / ".samples-00009.jsonl.tmp").write_text('{"problem": "x')
    fill(tmp_path / "broken", world, samples=3)
    found = contents(tmp_path / "broken")
    found.pop(".samples-00009.jsonl.tmp")
    assert {k: v for k, v in found.items() if not k.startswith(".")} == contents(tmp_path / "whole")


def test_another_address_is_refused_by_its_field(tmp_path, world):
    address = world[2]
    Pool.open(tmp_path, address)
    for name, value in {"model": "other", "temperature": 0.6, "seed": 8, "max_tokens": 41, "template": "t"}.items():
        with pytest.raises(ValueError, match=f"{name} = .*another folder"):
            Pool.open(tmp_path, replace(address, **{name: value}))


def test_the_address_follows_problems_template_and_suffix(world):
    tokenizer, problems, address = world
    assert pool_address("base", problems, tokenizer, SETTINGS, 7) == address
    assert pool_address("base", problems[:4], tokenizer, SETTINGS, 7).problems != address.problems
    assert pool_address("base", problems, tokenizer, SETTINGS, 7, suffix=" Think.").template != address.template


def test_sampling_with_other_settings_than_the_address_is_refused(tmp_path, world):
    tokenizer, problems, address = world
    pool = Pool.open(tmp_path, address)
    for settings, seed in ((SamplingSettings(max_tokens=41), 7), (SETTINGS, 8)):
        with pytest.raises(ValueError, match="its address is"):
            fill_pool(pool, ScriptedSampler(), tokenizer, problems, tiny.TASK, 1, settings, seed)


def test_missing_samples_and_verdicts_are_errors_by_name(tmp_path, world):
    _, problems, address = world
    fill(tmp_path, world, samples=2)
    pool = Pool.open(tmp_path, address)
    with pytest.raises(
        ValueError, match=f"lacks 5 of 3 samples x 5 problems, the first is sample 2 of problem {problems[0].id}"
    ):
        pool.groups(problems, "tiny-1", samples=3)
    with pytest.raises(ValueError, match="verifier 'tiny-2' has not judged"):
        pool.groups(problems, "tiny-2", samples=2)


def test_a_new_verifier_judges_without_sampling(tmp_path, world):
    _, problems, address = world
    fill(tmp_path, world, samples=2)
    pool = Pool.open(tmp_path, address)
    generous = replace(
        tiny.TASK, verifier_version="tiny-2", judge=one_by_one(lambda problem, completion: Verdict(Outcome.RIGHT))
    )
    pool.judge(problems, generous)
    assert all(rollout.right for group in pool.groups(problems, "tiny-2") for rollout in group.rollouts)
    assert [g.right for g in pool.groups(problems, "tiny-1")] == [[p.answer == "00"] * 2 for p in problems]
    with pytest.raises(ValueError, match="not among the problems"):
        pool.judge(problems[1:], replace(tiny.TASK, verifier_version="tiny-3"))
    with pytest.raises(ValueError, match="cannot be part of a file name"):
        pool.judge(problems, replace(tiny.TASK, verifier_version="../x"))


def test_damage_is_found(tmp_path, world):
    _, problems, address = world
    fill(tmp_path, world, samples=2)
    shard = tmp_path / "samples-00001.jsonl"
    whole = shard.read_bytes()
    row = json.loads(whole.split(b"\n")[0])
    damages = {
        "torn": whole[:-1],
        "not JSON": whole.replace(b'{"problem"', b"{problem", 1),
        "unknown fields \\['extra'\\]": dump_lines([row | {"extra": 1}]).encode(),
        "twice": (tmp_path / "samples-00000.jsonl").read_bytes(),
        "must be int": dump_lines([row | {"sample": True}]).encode(),
        "NaN": whole.replace(b"-0.1", b"NaN", 1),
        "3 token ids but 2": dump_lines([row | {"sampler_logprobs": [0.0, 0.0]}]).encode(),
        "appears twice": whole.replace(b'{"problem"', b'{"sample": 0, "problem"', 1),
    }
    for message, content in damages.items():
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Pool.open(tmp_path, address)
    shard.unlink()
    with pytest.raises(ValueError, match=r"samples-00001.jsonl is missing"):
        Pool.open(tmp_path, address)
    shard.write_bytes(whole)
    verdicts = tmp_path / "verdicts-tiny-1-00001.jsonl"
    verdicts.write_bytes(b"".join(verdicts.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="has a verdict or a completion, not both"):
        Pool.open(tmp_path, address).groups(problems, "tiny-1")


def test_the_same_sample_is_never_added_twice(tmp_path, world):
    _, problems, address = world
    pool = Pool.open(tmp_path, address)
    completion = Completion("x", (1,), (0.0,), FinishReason.STOP)
    with pytest.raises(ValueError, match="already in the pool"):
        pool.add_shard([(problems[0], 0, (3,), completion), (problems[0], 0, (3,), completion)])
    assert len(pool) == 0


def test_a_folder_without_a_pool_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no pool"):
        Pool.open(tmp_path)


def test_read_rows_takes_an_empty_file_and_keeps_unicode_line_separators(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"")
    assert list(read_rows(path, {"text": str})) == []
    rows = [{"text": "a\u2028b\x85c\r"}, {"text": ""}]
    path.write_text(dump_lines(rows), encoding="utf-8", newline="")
    assert [row for _, row in read_rows(path, {"text": str})] == rows


def test_a_pool_of_stopped_loops_is_refused(world):
    tokenizer, problems, _ = world
    with pytest.raises(ValueError, match="leave out stop_repetition"):
        pool_address("base", problems, tokenizer, replace(SETTINGS, stop_repetition=RepetitionRule()), 7)
