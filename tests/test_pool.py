"""The rollout pool: exactly once, resumable, refused when it is another pool or damaged."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rl.faults import FaultRaised, reset_faults
from rl.jsonl import dump_lines, read_rows
from rl.judging import JudgeFailed
from rl.pool import Pool, fill_pool, pool_address
from rl.pool_check import Damage
from rl.pool_files import ranges_of
from rl.pool_parts import join_pools, parse_part, part_folder, part_of
from rl.repetition import RepetitionRule
from rl.samplers.base import SampleRequest, SamplingSettings, sample_seed
from rl.tasks import tiny
from rl.tasks.base import one_by_one
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Verdict
from tests import pool_world
from tests.pool_world import SETTINGS, ScriptedSampler, fill


@pytest.fixture
def world():
    return pool_world.TOKENIZER, pool_world.PROBLEMS, pool_world.address()


def contents(folder: Path) -> dict[str, bytes]:
    """Address, samples and verdicts; the manifest and the log have their lines in the order of the threads."""
    left_out = ("judging.jsonl", "files.jsonl", ".lock")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in left_out}


def test_groups_come_back_as_they_were_sampled(tmp_path, world):
    _, problems, address = world
    fill(tmp_path, samples=3)
    pool = Pool.open(tmp_path, address)
    assert len(pool) == 15
    groups = pool.groups(problems, tiny.TASK.verifier_version, samples=3)
    assert [group.problem for group in groups] == problems
    for group in groups:
        for index, rollout in enumerate(group.rollouts):
            seed = sample_seed(7, group.problem.id, index)
            assert rollout.completion.text == f"{seed}\u2028</think>{seed % 100:02}"
            assert rollout.completion.sampler_logprobs == (-0.1, -1e-17, 0.0)
            assert rollout.right == (group.problem.answer == f"{seed % 100:02}")
    # The pool's own k, and an earlier k of it.
    assert pool.groups(problems, "tiny-1") == groups
    assert [len(group.rollouts) for group in pool.groups(problems[:2], "tiny-1", samples=2)] == [2, 2]


def test_topping_up_draws_only_what_is_missing(tmp_path, world):
    first = fill(tmp_path, samples=2)
    again = fill(tmp_path, samples=2)
    more = fill(tmp_path, samples=4)
    assert (len(first.seeds), again.seeds, len(more.seeds)) == (10, [], 10)
    problems = world[1]
    assert set(first.seeds + more.seeds) == {sample_seed(7, p.id, i) for p in problems for i in range(4)}


@pytest.mark.parametrize(
    "site", ["pool.address:1", "pool.shard:1", "pool.shard:3", "pool.verdicts:2", "write.rename:3"]
)
def test_a_failed_fill_goes_on_to_the_same_bytes(tmp_path, monkeypatch, site):
    fill(tmp_path / "whole", samples=3)
    monkeypatch.setenv("REASON_FAULT", f"{site}:raise")
    reset_faults()
    with pytest.raises(FaultRaised):
        fill(tmp_path / "broken", samples=3)
    monkeypatch.delenv("REASON_FAULT")
    # A temporary file that a kill leaves is not read, and the next writer removes it.
    (tmp_path / "broken" / ".samples-00009.jsonl.tmp").write_text('{"problem": "x')
    fill(tmp_path / "broken", samples=3)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


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
    fill(tmp_path, samples=2)
    pool = Pool.open(tmp_path, address)
    with pytest.raises(
        ValueError, match=f"lacks 5 of 3 samples x 5 problems, the first is sample 2 of problem {problems[0].id}"
    ):
        pool.groups(problems, "tiny-1", samples=3)
    with pytest.raises(ValueError, match="verifier 'tiny-2' has not judged"):
        pool.groups(problems, "tiny-2", samples=2)


def test_a_new_verifier_judges_without_sampling(tmp_path, world):
    _, problems, address = world
    fill(tmp_path, samples=2)
    pool = Pool.open(tmp_path, address)
    generous = replace(
        tiny.TASK, verifier_version="tiny-2", judge=one_by_one(lambda problem, completion: Verdict(Outcome.RIGHT))
    )
    pool.judge(problems, generous)
    assert all(rollout.right for group in pool.groups(problems, "tiny-2") for rollout in group.rollouts)
    assert not all(rollout.right for group in pool.groups(problems, "tiny-1") for rollout in group.rollouts)
    with pytest.raises(ValueError, match="not among the problems"):
        pool.judge(problems[1:], replace(tiny.TASK, verifier_version="tiny-3"))
    with pytest.raises(ValueError, match="cannot be part of a file name"):
        pool.judge(problems, replace(tiny.TASK, verifier_version="../x"))


def test_damaged_rows_are_found_where_no_manifest_vouches_for_them(tmp_path, world):
    _, problems, address = world
    fill(tmp_path, samples=2)
    (tmp_path / "files.jsonl").unlink()
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
        "an aborted completion": whole.replace(b'"stop"', b'"aborted"', 1),
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


# --- the manifest and the check ---------------------------------------------------------------------------------------


def test_the_manifest_lists_runs_of_samples(tmp_path, world):
    problems = world[1]
    fill(tmp_path, samples=3)
    assert ranges_of([("p", 0), ("p", 1), ("q", 4)]) == (("p", 0, 1), ("q", 4, 4))
    lines = [json.loads(line) for line in (tmp_path / "files.jsonl").read_bytes().splitlines()]
    first = next(line for line in lines if line["file"] == "samples-00000.jsonl")
    assert first["samples"] == [[problems[0].id, 0, 2], [problems[1].id, 0, 0]]
    assert (first["rows"], first["bytes"]) == (4, (tmp_path / "samples-00000.jsonl").stat().st_size)


def test_opening_reads_no_sample_and_reading_finds_what_has_changed(tmp_path, world):
    _, problems, address = world
    fill(tmp_path, samples=2)
    shard = tmp_path / "samples-00001.jsonl"
    whole = shard.read_bytes()
    shard.write_bytes(whole.replace(b"-0.1", b"-0.2", 1))  # as long as before
    pool = Pool.open(tmp_path, address)
    assert len(pool) == 10 and pool.missing(problems, 2) == []
    for read in (lambda: pool.groups(problems, "tiny-1"), lambda: list(pool.samples()), pool.canonical_hash):
        with pytest.raises(ValueError, match=r"samples-00001.jsonl has changed since it was written"):
            read()
    shard.write_bytes(whole + b"\n")
    with pytest.raises(ValueError, match=r"has [\d,]+ bytes and not the [\d,]+ that files.jsonl says"):
        Pool.open(tmp_path)
    (tmp_path / "samples-00002.jsonl").unlink()
    shard.write_bytes(whole)
    with pytest.raises(ValueError, match=r"samples-00002.jsonl is missing"):
        Pool.open(tmp_path)
    (tmp_path / "files.jsonl").write_bytes(b'{"file": 1}\n{}\n')
    with pytest.raises(ValueError, match=r"files.jsonl cannot be read .* move it away"):
        Pool.open(tmp_path)


def flip(old: bytes, new: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new, 1))

    return damage


def first_line(path: Path) -> bytes:
    return path.read_bytes().splitlines(keepends=True)[0]


# What is done to which file, and what the check finds there.
DAMAGES = {
    "a bit": ("samples-00001.jsonl", flip(b"-0.1", b"-0.3"), {Damage.CHANGED}),
    "torn": ("samples-00001.jsonl", lambda p: p.write_bytes(p.read_bytes()[:-5]), {Damage.CHANGED, Damage.UNREADABLE}),
    "gone": ("samples-00001.jsonl", Path.unlink, {Damage.MISSING, Damage.ORPHAN}),
    "again": ("samples-00003.jsonl", lambda p: p.write_bytes(p.with_name("samples-00000.jsonl").read_bytes()),
              {Damage.DUPLICATE}),
    "stranger": ("samples-00001.jsonl", flip(b'"problem": "tiny', b'"problem": "huge'),
                 {Damage.CHANGED, Damage.FOREIGN, Damage.ORPHAN, Damage.UNJUDGED}),
    "aborted": ("samples-00001.jsonl", flip(b'"stop"', b'"aborted"'),
                {Damage.CHANGED, Damage.UNREADABLE}),
    "another prompt": ("samples-00001.jsonl", flip(b'"prompt_ids": [', b'"prompt_ids": [99, '),
                       {Damage.CHANGED, Damage.FOREIGN}),
    "a verdict less": ("verdicts-tiny-1-00001.jsonl", lambda p: p.write_bytes(first_line(p)),
                       {Damage.CHANGED, Damage.UNJUDGED}),
    "a verdict twice": ("verdicts-tiny-1-00001.jsonl", lambda p: p.write_bytes(p.read_bytes() + first_line(p)),
                        {Damage.CHANGED, Damage.DUPLICATE}),
    "no verdict": ("verdicts-tiny-1-00001.jsonl", flip(b'"wrong"', b'"maybe"'), {Damage.CHANGED, Damage.UNREADABLE}),
    "verdicts of nothing": ("verdicts-tiny-1-00007.jsonl", Path.touch, {Damage.ORPHAN}),
    "a note": ("notes.txt", Path.touch, {Damage.FOREIGN}),
    "manifest": ("files.jsonl", flip(b"{", b"["), {Damage.UNREADABLE}),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_the_check_finds_each_damage_by_its_kind_and_file(tmp_path, world, name):
    fill(tmp_path, samples=2)  # shards of 4, 4 and 2
    assert Pool.open(tmp_path).check(world[1]) == ()
    pool = Pool.open(tmp_path)  # opened before: the check reads all of it anew
    file, damage, expected = DAMAGES[name]
    damage(tmp_path / file)
    findings = pool.check(world[1])
    assert {finding.damage for finding in findings} == expected
    assert any(finding.file == file for finding in findings)
    assert all(finding.file in str(finding) for finding in findings)


# --- shards in any order, judged meanwhile ----------------------------------------------------------------------------


def test_shards_that_arrive_in_another_order_are_the_same_pool(tmp_path):
    one, other, pieces = tmp_path / "one", tmp_path / "other", tmp_path / "pieces"
    pool_world.fill(one)
    pool_world.fill(other, sampler=pool_world.Shuffled())
    pool_world.fill(pieces, samples=1, shard_size=2)
    pool_world.fill(pieces, shard_size=100)
    pools = [Pool.open(folder) for folder in (one, other, pieces)]
    assert (one / "samples-00003.jsonl").read_bytes() == (other / "samples-00000.jsonl").read_bytes()
    assert len({pool.canonical_hash() for pool in pools}) == 1
    assert len({str(pool.groups(pool_world.PROBLEMS, "tiny-1", 3)) for pool in pools}) == 1
    assert [key for key, _, _ in pools[1].in_order()] == sorted((p, i) for p, i, _ in pools[0].samples())
    pool_world.fill(one, samples=4)
    assert Pool.open(one).canonical_hash() != pools[1].canonical_hash()


def test_topping_up_from_8_to_16_asks_for_8_of_each(tmp_path):
    first = pool_world.fill(tmp_path, samples=8, sampler=pool_world.Shuffled())
    more = pool_world.fill(tmp_path, samples=16, sampler=pool_world.Shuffled())
    for problem in pool_world.PROBLEMS:
        seeds = [sample_seed(7, problem.id, i) for i in range(16)]
        assert set(seeds[:8]) < set(first.seeds) and set(seeds[8:]) < set(more.seeds)
    assert len(first.seeds) == len(more.seeds) == 40


def test_one_other_thread_judges_while_more_is_drawn_and_ends_with_the_call(tmp_path):
    threads, second_judged, reports = set[int](), threading.Event(), list[tuple[int, int]]()

    def judge(attempts):
        threads.add(threading.get_ident())
        if len(judged) == 1:
            second_judged.set()
        judged.append(len(attempts))
        return [Verdict(Outcome.RIGHT)] * len(attempts)

    judged: list[int] = []

    class Waiting(pool_world.ScriptedSampler):
        def sample(self, requests, settings, report=lambda finished: None):
            if len(self.seeds) == 12:  # the fourth shard is not drawn before the second is judged
                assert second_judged.wait(30)
            return super().sample(requests, settings, report)

    before = threading.active_count()
    pool_world.fill(
        tmp_path, sampler=Waiting(), task=replace(tiny.TASK, judge=judge),
        progress=lambda done, total: reports.append((done, total)),
    )  # fmt: skip
    assert judged == [4, 4, 4, 3] and len(threads) == 1 and threading.get_ident() not in threads
    assert threading.active_count() == before
    assert reports[0] == (0, 15) and reports[-1] == (15, 15) and reports == sorted(reports)


def test_a_judge_that_fails_stops_the_fill_after_what_has_arrived(tmp_path):
    failed = threading.Event()

    def judge(attempts):
        failed.set()
        return [Verdict.undecided(JudgeFailure.INFRASTRUCTURE, "no sandbox")] * len(attempts)

    class Waiting(pool_world.ScriptedSampler):
        closed = False

        def sample_shards(self, shards, settings, report=lambda finished: None) -> Iterator:
            try:
                for index, shard in enumerate(shards):
                    if index:
                        assert failed.wait(30)
                    yield index, self.sample(shard, settings)
            finally:
                self.closed = True

    sampler, before = Waiting(), threading.active_count()
    with pytest.raises(JudgeFailed, match="could not decide 4 of 4"):
        pool_world.fill(tmp_path, sampler=sampler, task=replace(tiny.TASK, judge=judge), samples=30)
    assert sampler.closed and threading.active_count() == before
    assert 4 <= len(sampler.seeds) < 150 and len(Pool.open(tmp_path)) == len(sampler.seeds)  # all that was drawn
    assert Pool.open(tmp_path).verifiers(whole=False) == []
    more = pool_world.fill(tmp_path, samples=30)  # the judge works again
    assert len(more.seeds) == 150 - len(sampler.seeds)
    assert Pool.open(tmp_path).check(pool_world.PROBLEMS) == ()


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda shards: shards + shards[:1], "gave 4 completions for shard 0 of 4: it gave that one before"),
        (lambda shards: shards[:-1], "left out 1 of 4 shards, the first is 3"),
        (lambda shards: [(9, shards[0][1])], "for shard 9 of 4"),
        (lambda shards: [(0, shards[0][1][:3])], "gave 3 completions for shard 0"),
    ],
)
def test_a_sampler_that_breaks_its_word_is_named(tmp_path, give, message):
    class Odd(pool_world.ScriptedSampler):
        def sample_shards(self, shards, settings, report=lambda finished: None) -> Iterator:
            yield from give([(index, self.sample(shard, settings)) for index, shard in enumerate(shards)])

    with pytest.raises(RuntimeError, match=message):
        pool_world.fill(tmp_path, sampler=Odd())
    pool_world.fill(tmp_path)
    assert Pool.open(tmp_path).check(pool_world.PROBLEMS) == ()


# --- aborted samples and races ----------------------------------------------------------------------------------------


class Aborting(pool_world.ScriptedSampler):
    """Aborts what has an odd seed."""

    def complete(self, request: SampleRequest) -> Completion:
        if request.seed % 2:
            return Completion("", (), (), FinishReason.ABORTED)
        return super().complete(request)


def test_a_plain_pool_keeps_what_was_not_aborted_and_says_what_was(tmp_path):
    with pytest.raises(RuntimeError, match=r"aborted \d+ samples, which are still missing"):
        pool_world.fill(tmp_path, sampler=Aborting())
    pool = Pool.open(tmp_path)
    assert 0 < len(pool) < 15
    assert all(sample_seed(7, problem, i) % 2 == 0 for problem, i, _ in pool.samples())
    assert len(pool_world.fill(tmp_path).seeds) == 15 - len(pool)
    row = (pool_world.PROBLEMS[0], 99, (1,), Completion("", (), (), FinishReason.ABORTED))
    with pytest.raises(ValueError, match="only a racing pool holds such samples"):
        pool.add_shard([row])


def test_a_racing_pool_is_a_kind_of_its_own(tmp_path):
    raced = tmp_path / "raced"
    pool_world.fill(raced, sampler=Aborting(), racing=True)
    assert json.loads((raced / "pool.json").read_text())["racing"] is True
    for refused in (lambda: Pool.open(raced), lambda: Pool.open(raced, pool_world.address())):
        with pytest.raises(ValueError, match="racing"):
            refused()
    pool = Pool.open(raced, racing=True)
    assert len(pool) == 15 and pool.missing(pool_world.PROBLEMS, 3) == [] and pool.check() == ()
    assert pool_world.fill(raced, sampler=Aborting(), racing=True).seeds == []  # a lost race is never run again
    with pytest.raises(ValueError, match="aborted"):
        pool.groups(pool_world.PROBLEMS, "tiny-1")[0].require_complete("evaluation")
    with pytest.raises(ValueError, match="2 of them are not a race"):
        pool.groups(pool_world.PROBLEMS, "tiny-1", samples=2)
    with pytest.raises(ValueError, match="has raced with 3 samples, more cannot join"):
        pool_world.fill(raced, samples=4, sampler=Aborting(), racing=True)
    # A shard holds whole races: two of 3 do not fit into 4.
    assert [len(list(rows)) for rows in pool.lines()] == [3] * 5


def test_a_plain_pool_says_nothing_of_races_and_an_old_address_is_plain(tmp_path, world):
    address = world[2]
    Pool.open(tmp_path, address)
    assert "racing" not in (tmp_path / "pool.json").read_text()
    assert Pool.open(tmp_path).address.racing is False
    with pytest.raises(ValueError, match="is a plain pool"):
        Pool.open(tmp_path, racing=True)
    with pytest.raises(ValueError, match="racing = False, not True"):
        Pool.open(tmp_path, replace(address, racing=True))


# --- parts ------------------------------------------------------------------------------------------------------------


def test_parts_share_the_problems_and_auto_reads_the_launcher():
    assert part_of(pool_world.PROBLEMS, None) == pool_world.PROBLEMS
    parts = [part_of(pool_world.PROBLEMS, (i, 3)) for i in range(3)]
    assert parts[1] == [pool_world.PROBLEMS[1], pool_world.PROBLEMS[4]]
    assert sorted(p.id for part in parts for p in part) == sorted(p.id for p in pool_world.PROBLEMS)
    with pytest.raises(ValueError, match="part 3/3"):
        part_of(pool_world.PROBLEMS, (3, 3))
    assert parse_part("3/8", {}) == (3, 8)
    slurm = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
    assert parse_part("auto", slurm) == (1, 2)
    assert parse_part("auto", slurm | {"RANK": "3", "WORLD_SIZE": "8"}) == (3, 8)
    for text, environment in (("8/8", {}), ("1", {}), ("-1/2", {}), ("auto", {"RANK": "x", "WORLD_SIZE": "2"})):
        with pytest.raises(ValueError, match="say auto, or index/parts"):
            parse_part(text, environment)
    with pytest.raises(ValueError, match="neither RANK and WORLD_SIZE nor SLURM_PROCID and SLURM_NTASKS is set"):
        parse_part("auto", {"RANK": "0"})


def test_parts_that_are_joined_are_the_pool_that_was_filled_at_once(tmp_path, monkeypatch):
    pool_world.fill(tmp_path / "whole")
    folders = [part_folder(tmp_path / "joined", (i, 2)) for i in range(2)]
    drawn = [pool_world.fill(folder, part=(i, 2)) for i, folder in enumerate(folders)]
    assert [len(sampler.seeds) for sampler in drawn] == [9, 6]
    whole = Pool.open(tmp_path / "whole")
    # Killed between samples and verdicts, it goes on; a part given twice is there once.
    monkeypatch.setenv("REASON_FAULT", "pool.verdicts:2:raise")
    with pytest.raises(FaultRaised):
        join_pools(tmp_path / "joined", [*folders, folders[0]])
    monkeypatch.delenv("REASON_FAULT")
    joined = join_pools(tmp_path / "joined", [*folders, folders[0]])
    assert joined.canonical_hash() == whole.canonical_hash()
    assert joined.groups(pool_world.PROBLEMS, "tiny-1") == whole.groups(pool_world.PROBLEMS, "tiny-1")
    assert joined.verifiers() == ["tiny-1"] and joined.check(pool_world.PROBLEMS) == ()
    assert pool_world.fill(tmp_path / "joined").seeds == []


def test_pools_that_contradict_each_other_are_not_joined(tmp_path):
    class Other(pool_world.ScriptedSampler):
        def complete(self, request: SampleRequest) -> Completion:
            return replace(super().complete(request), text="other")

    pool_world.fill(tmp_path / "a")
    pool_world.fill(tmp_path / "b", samples=1, sampler=Other())
    first = min(problem.id for problem in pool_world.PROBLEMS)
    with pytest.raises(ValueError, match=f"sample 0 of problem {first} is not the same in .*/a and in .*/b"):
        join_pools(tmp_path / "out", [tmp_path / "a", tmp_path / "b"])
    assert not (tmp_path / "out").exists()
    Pool.open(tmp_path / "c", replace(pool_world.address(), seed=8))
    with pytest.raises(ValueError, match="seed = 8, not 7"):
        join_pools(tmp_path / "out", [tmp_path / "a", tmp_path / "c"])
    with pytest.raises(ValueError, match="no parts"):
        join_pools(tmp_path / "out", [])
