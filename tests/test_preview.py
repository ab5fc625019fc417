"""`reason preview`: the table, the traps with their counts, the plot, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast, get_args

import pytest
from typer.testing import CliRunner, Result

import cli
from long2short.length_catalog import make
from long2short.length_objectives import GroupLengths
from long2short.length_preview import kept_values, preview, preview_filter, rank_correlation
from long2short.length_reward import total_tokens
from recipes.length_keys import ObjectiveName
from recipes.preview_commands import preview_pool
from rl.pool import Pool
from rl.types import Completion, FinishReason
from tests import pool_world

SAMPLES = 4
# Right or not and tokens of each sample of each problem: all right, all right and one token apart, all wrong, mixed,
# mixed with a truncated one.
PLANS = (
    [(True, 10), (True, 20), (True, 30), (True, 30)],
    [(True, 20), (True, 21), (True, 20), (True, 20)],
    [(False, 10), (False, 30), (False, 35), (False, 38)],
    [(True, 30), (False, 12), (True, 20), (True, 10)],
    [(True, 10), (True, 20), (False, 15), (False, 40)],
)


class Planned(pool_world.ScriptedSampler):
    """Answers by the plan: right or wrong, in so many tokens; 40 is the limit."""

    def __init__(self, suffix: str = "") -> None:
        super().__init__()
        asked = [tuple(ord(c) for c in f"{p.text}{suffix}\n") for p in pool_world.PROBLEMS]
        self.answers = {ids: (i, p.answer) for i, (ids, p) in enumerate(zip(asked, pool_world.PROBLEMS, strict=True))}
        self.drawn = [0] * len(pool_world.PROBLEMS)

    def complete(self, request):
        place, answer = self.answers[request.prompt_ids]
        right, length = PLANS[place][self.drawn[place]]
        self.drawn[place] += 1
        cut = length == pool_world.SETTINGS.max_tokens
        text = "so" if cut else f"so</think>{answer if right else 'x'}"
        finish = FinishReason.LENGTH if cut else FinishReason.STOP
        return Completion(text, (5,) * length, (-0.1,) * length, finish)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pools") / "pool"
    pool_world.fill(folder, samples=SAMPLES, sampler=Planned())
    return folder


def reason(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["preview", *map(str, arguments)])


def value_of(*arguments: object, exit_code: int = 0) -> dict:
    done = reason(*arguments, "--json")
    assert done.exit_code == exit_code, done.output
    return json.loads(done.stdout)


def row_of(pool: Path, name: str, *arguments: object) -> dict:
    (row,) = value_of(pool, "--objective", name, *arguments)["objectives"]
    return row


def traps(row: dict) -> dict[str, tuple[int, int]]:
    return {trap["name"]: (trap["count"], trap["of"]) for trap in row["traps"]}


def test_every_objective_is_shown_at_its_paper_s_weight(pool: Path):
    shown = value_of(pool)
    assert (shown["groups"], shown["samples"]) == (5, 20)
    rows = {row["objective"]: row for row in shown["objectives"]}
    assert tuple(rows) == get_args(ObjectiveName)
    assert rows["kimi"]["weight"] == 1.0 and rows["shorter-better"]["weight"] == 1e-3 and rows["gfpo"]["weight"] is None
    assert rows["laser"]["keys"] == {"target": 20} and rows["soft-overlong"]["keys"] == {"buffer": 8}
    text = reason(pool).stdout
    assert (
        all(name in text for name in rows) and "trap: giving up pays" in text and "fix: length.gate: any-right" in text
    )


def test_the_figures_of_kimi_by_hand(pool: Path):
    row = row_of(pool, "kimi", "--weight", "0.3", "--reward-format", "0")
    # right: .5 0 -.5 -.5 | .5 -.5 .5 .5 | - | -.5 0 .5 | .5 .1667; wrong: 0 -.2143 -.3929 -.5 | 0 | 0 -.5
    assert row["mean_right"] == pytest.approx((-0.5 + 1 + 0 + 2 / 3) / 13)
    assert row["mean_wrong"] == pytest.approx((-0.2142857 - 0.3928571 - 0.5 + 0 - 0.5) / 7)
    assert row["rank"] == pytest.approx(-1)
    assert (row["signal_before"], row["signal_after"]) == (0.4, 1.0)
    assert (row["wrong_above_right"], row["safe_weight"]) == (0.0, 2.0)


def test_each_trap_is_counted(pool: Path):
    found = traps(row_of(pool, "kimi", "--weight", "0.3"))
    assert found == {
        "the deviation cancels the weight": (3, 5),  # two all right, one all wrong
        "a filter on accuracy drops them": (2, 5),
        "giving up pays": (1, 5),
        "a few tokens decide": (1, 5),
        "truncated samples set the scale": (1, 5),
    }
    assert "the weight is above the bound" not in found
    assert traps(row_of(pool, "kimi", "--weight", "1.8"))["the weight is above the bound"] == (0, 2)
    assert traps(row_of(pool, "kimi", "--weight", "2.0"))["the weight is above the bound"] == (1, 2)
    assert "the weight is above the bound" in traps(row_of(pool, "kimi", "--weight", "1.9", "--reward-format", "0.1"))
    assert "the weight is above the bound" not in traps(row_of(pool, "kimi", "--weight", "1.9", "--reward-format", "0"))
    assert traps(row_of(pool, "laser", "--reward-format", "1"))["the weight is above the bound"] == (0, 2)
    assert "the weight is above the bound" not in traps(row_of(pool, "laser", "--reward-format", "0.9"))
    assert row_of(pool, "kimi", "--weight", "0")["traps"] == []


def test_the_fixes_are_fixes(pool: Path):
    fixed = traps(row_of(pool, "kimi", "--weight", "0.3", "--set", "gate=any-right", "--set", "min_spread=4"))
    assert "giving up pays" not in fixed and "a few tokens decide" not in fixed
    assert fixed["the deviation cancels the weight"] == (1, 5)
    assert "truncated samples set the scale" not in traps(row_of(pool, "arora-zanette"))


def test_a_rule_without_a_bound_is_measured(pool: Path):
    row = row_of(pool, "shorter-better", "--weight", "0.2")
    # mixed: SOL 10, right 30 -> -20, wrong 12 -> -2; the gap of 18 tokens costs 2 at a weight of 1/9
    assert row["safe_weight"] == pytest.approx(2 / 18)
    assert traps(row)["a wrong answer earns as much as a right one"] == (1, 2)
    assert row_of(pool, "shorter-better", "--weight", "0.1")["wrong_above_right"] == 0
    assert row_of(pool, "shorter-better", "--weight", "0.1", "--reward-accuracy", "1")["wrong_above_right"] == 0.5


def test_a_rule_with_a_limit_may_take_a_right_answer_down_to_a_wrong_one_but_not_below(pool: Path):
    name = "a wrong answer earns as much as a right one"
    row = row_of(pool, "thinkprune", "--set", "limits=[[1, 15]]")  # of the mixed groups both have a longer right answer
    assert (row["wrong_above_right"], row["safe_weight"]) == (1.0, 1.0) and traps(row)[name] == (2, 2)
    (trap,) = [trap for trap in row["traps"] if trap["name"] == name]
    assert trap["fix"] == "none, if a right answer beyond the limit is to be worth nothing; else a weight below 1"
    row = row_of(pool, "thinkprune", "--set", "limits=[[1, 15]]", "--weight", "1.1")
    assert traps(row)["the weight is above the bound"] == (2, 2)


def test_a_rule_that_is_drowned_by_accuracy_is_inert(pool: Path):
    (trap,) = row_of(pool, "alp")["traps"][:1]  # 20 tokens of an all-right group at 1e-7 are 2e-6
    assert (trap["name"], trap["count"], trap["of"]) == ("inert at this weight", 5, 5)
    assert trap["fix"] == "a larger weight: the widest group spreads by 0.01 at 0.0005, by 0.1 at 0.005"
    assert "inert at this weight" not in traps(row_of(pool, "alp", "--weight", "0.0006"))
    (trap,) = row_of(pool, "toggle", "--set", "percentile=100")["traps"]  # no right answer is beyond the longest one
    assert (trap["name"], trap["fix"][:9]) == ("inert at this weight", "no weight")


def test_an_accuracy_that_is_the_paper_s_and_not_a_stage_s_is_said(pool: Path):
    note = (
        "o1-pruner, shorter-better, soft-overlong: with reward_accuracy 2, the paper's; a stage that does not say has 1"
    )
    shown = value_of(pool)
    assert any(one.startswith(note) for one in shown["notes"])
    assert {row["objective"] for row in shown["objectives"] if row["reward_accuracy"] == 2} == {
        "o1-pruner", "shorter-better", "soft-overlong",
    }  # fmt: skip
    assert f"\n{note}" in reason(pool).stdout
    assert value_of(pool, "--objective", "soft-overlong", "--reward-accuracy", "1")["notes"] == []
    assert value_of(pool, "--objective", "kimi")["notes"] == []


class Decoder:
    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@pytest.fixture(scope="module")
def stated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool whose prompts all end in a budget."""
    folder, suffix = tmp_path_factory.mktemp("stated") / "pool", " Think for maximum 1,020 tokens."
    pool_world.fill(folder, samples=SAMPLES, sampler=Planned(suffix), suffix=suffix)
    return folder


def test_budgets_in_the_prompts_are_read(stated: Path):
    raw = [{"objective": name, "weight": 1.0} for name in ("lcpo-max", "lcpo-exact", "laser")]
    found = preview_pool(stated, raw, total_tokens, tokenizer=cast(Any, Decoder()))
    assert found.keys == {"lcpo-max": {}, "laser": {"target": 20}}
    for group, values in zip(found.groups, found.values["lcpo-max"], strict=True):
        whole = [3e-4 * (1020 - n) + 0.5 for n in group.lengths]
        expected = [worth - 1 if is_right else 0 for worth, is_right in zip(whole, group.right, strict=True)]
        assert values == pytest.approx(expected)
    (note,) = found.notes
    assert note.startswith("lcpo-exact is left out: length.target: not given, and problem ")
    assert 'states "Think for maximum 1020 tokens.", which lcpo-max reads' in note
    with pytest.raises(ValueError, match="lcpo-exact is left out"):
        preview_pool(stated, raw[1:2], total_tokens, tokenizer=cast(Any, Decoder()))
    given = preview_pool(stated, [{**raw[1], "target": 15}], total_tokens, tokenizer=cast(Any, Decoder()))
    assert given.keys == {"lcpo-exact": {"target": 15}} and given.notes == []


def test_a_target_that_is_made_up_is_said(pool: Path, tiny_model_folder: Path):
    (note,) = value_of(pool, "--objective", "lcpo-max")["notes"]
    assert note == (
        "lcpo-max: target is the median of the right lengths; a stage without target reads the budget that the prompt "
        "states, as preview does with --model"
    )
    (note,) = value_of(pool, "--objective", "lcpo-max", "--model", tiny_model_folder)["notes"]
    assert note.startswith("lcpo-max: no prompt states a budget, so target") and note.endswith("is refused here")


def test_gfpo_says_where_it_keeps_no_right_answer(pool: Path):
    row = row_of(pool, "gfpo", "--set", "keep=2")
    assert row["keys"] == {"keep": 2} and row["wrong_above_right"] is None
    # kept: right and right | the same | wrong and wrong | right (10) and wrong (12) | right and wrong (15)
    assert (row["signal_before"], row["signal_after"]) == (0.4, 0.4)
    assert traps(row) == {} and row_of(pool, "gfpo")["keys"] == {"keep": 2}
    group = GroupLengths((10, 20, 30), (False, False, True))
    assert kept_values(group, 2, efficient=False) == [1, 1, 0] and kept_values(group, 1, efficient=True) == [0, 0, 1]
    assert [trap.count for trap in preview_filter("gfpo", [group], [[1, 1, 0]]).traps] == [1]


def test_what_an_objective_remembers_comes_from_the_pool(pool: Path):
    row = row_of(pool, "hapo")
    assert row["mean_right"] < 0 < row["signal_after"]  # every history is there, so no right answer is above 0
    assert row_of(pool, "o1-pruner")["mean_right"] != 0
    assert row_of(pool, "laser-d")["mean_right"] > 0


def test_a_plot_is_written_and_is_the_same_again(pool: Path, tmp_path: Path):
    shown = [
        value_of(pool, "--objective", "kimi", "--objective", "laser", "--out", tmp_path / name) for name in ("a", "b")
    ]
    first, second = (Path(value["plot"]).read_bytes() for value in shown)
    assert first == second and b"laser, weight 0.5, target 20" in first and first.startswith(b"<?xml")


def test_scope_needs_the_model_s_tokenizer(pool: Path, tiny_model_folder: Path):
    told = value_of(pool, "--scope", "think", exit_code=2)
    assert "--scope think: give --model" in told["error"]
    shown = value_of(pool, "--scope", "answer", "--model", tiny_model_folder, "--objective", "alp")
    assert shown["objectives"][0]["mean_right"] == 0  # this pool's token ids hold no </think>


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--objective", "kimmi"), "there is no 'kimmi'; did you mean kimi"),
        (("--objective", "kimi", "--set", "target=9"), "--set target: no effect on kimi"),
        (("--objective", "laser", "--set", "target=0"), "target: Input should be greater than or equal to 1, not 0"),
        (("--objective", "laser", "--set", "target"), "write it as KEY=VALUE"),
        (("--objective", "gfpo", "--set", "keep=1"), "gfpo: length.keep: must be from 2 to group_size (4), not 1"),
        (("--objective", "soft-overlong", "--set", "buffer=40"), "length.buffer: 40 is not below max_tokens (40)"),
        (("--set", "warmup_steps=3"), "--set warmup_steps: no effect on"),
        (("--set", "scope=think"), "write --scope"),
        (("--scope", "thought"), "--scope must be total, think or answer"),
        (("--verifier", "tiny-9"), "not been judged by tiny-9; its verifiers: tiny-1"),
    ],
)
def test_what_cannot_be_shown_is_refused(pool: Path, arguments: tuple[str, ...], message: str):
    assert message in value_of(pool, *arguments, exit_code=2)["error"]


def test_an_empty_pool_is_refused(tmp_path: Path):
    Pool.open(tmp_path, pool_world.address())
    assert "has not been judged by any verifier" in value_of(tmp_path, exit_code=2)["error"]


def test_rank_correlation_shares_ranks_between_ties():
    assert rank_correlation([1, 2, 9], [0.5, 0.4, -0.5]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3, 4], [1, 1, 2, 2]) == pytest.approx(0.8944, abs=1e-4)


def test_the_module_s_example():
    seen = [GroupLengths((900, 1500), (True, True)), GroupLengths((300, 2000), (False, False))]
    kimi = make("kimi").objective
    row = preview("kimi", seen, [kimi(group) for group in seen], weight=1.0, bound=2.0)
    assert (row.signal_before, row.signal_after, row.wrong_above_right, row.safe_weight) == (0, 1, None, None)
    with pytest.raises(ValueError, match="no group with a verdict"):
        preview("kimi", [], [], 1.0, 2.0)
