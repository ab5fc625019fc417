"""long2short/frontier.py: who dominates whom, differences against the parent, the table, AES by its golden rows."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import cli
from long2short.first_solution import solutions
from long2short.frontier import (
    Arm,
    Frontier,
    accuracy_efficiency,
    budget_grid,
    count,
    frontier,
    limit_columns,
    non_dominated,
    notes,
    signed,
    signs,
    table,
    table_columns,
)
from long2short.frontier_efficiency import Efficiency, attempts_of, efficiency, efficiency_of, first_right, readings
from long2short.frontier_scores import at_limit, dominates_beyond_noise, dominators, overthinking_scores, parent_limits
from long2short.frontier_text import table_csv, table_markdown
from rl.evaluate import summarize
from rl.stats import SignTest
from rl.tasks import integers, tiny
from rl.tasks.tiny_models import make_tokenizer
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, Rollout, RolloutGroup, TextPart, Verdict


def make_arm(name, chance, tokens, label="", problems=40, samples=4, seed=0):
    rng = random.Random(f"{name} {seed}")
    groups = []
    for number in range(problems):
        rollouts = []
        for _ in range(samples):
            right = rng.random() < chance
            length = max(1, round(rng.gauss(tokens, tokens / 8)))
            completion = Completion("1 </think>02", tuple(range(length)), (0.0,) * length, FinishReason.STOP)
            rollouts.append(Rollout(completion, Verdict(Outcome.RIGHT if right else Outcome.WRONG)))
        groups.append(RolloutGroup(Problem(f"p{number}", (TextPart("01+01"),), "02"), (1,), tuple(rollouts)))
    return Arm(name, tuple(groups), summarize(groups, tiny.TASK), label)


@pytest.fixture(scope="module")
def arms():
    return [
        make_arm("base", 0.5, 40),
        make_arm("teacher", 0.95, 80),
        make_arm("merge-0.5", 0.8, 60, "merge"),
        make_arm("brief", 0.85, 30, "length-rl"),
        make_arm("guess", 0.3, 3),
    ]


def test_non_dominated_example_and_ties():
    assert non_dominated([(0.9, 60), (0.9, 30), (0.7, 20), (0.6, 25)]) == [False, True, True, False]
    assert non_dominated([(0.9, 60), (0.9, 60)]) == [True, True]  # exact equals stand together
    assert non_dominated([(0.9, 60), (0.9, 60), (0.9, 59)]) == [False, False, True]
    assert non_dominated([(0.5, 10)]) == [True]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_the_marked_arms_cover_all_and_do_not_beat_each_other(points):
    marks = non_dominated(points)
    kept = [point for point, mark in zip(points, marks, strict=True) if mark]
    for accuracy, tokens in points:
        assert any(better >= accuracy and fewer <= tokens for better, fewer in kept)
    for one in kept:
        for other in kept:
            assert (one[0] > other[0]) == (one[1] > other[1])  # more accuracy costs more tokens along the line


@pytest.mark.parametrize(("accuracy", "expected"), [(0.5, 0.5), (0.55, 0.8), (0.45, 0.0)])
def test_aes_golden(accuracy, expected):
    found = accuracy_efficiency(tokens=5_000, accuracy=accuracy, parent_tokens=10_000, parent_accuracy=0.5)
    assert found == pytest.approx(expected)


def test_aes_golden_of_kimis_figure():
    """k1.5's long2short figure: long to shortest on MATH-500, long to short by RL on AIME 2024."""
    shortest = accuracy_efficiency(tokens=645, accuracy=88.2, parent_tokens=1321, parent_accuracy=94.1)
    by_rl = accuracy_efficiency(tokens=3272, accuracy=60.8, parent_tokens=4205, parent_accuracy=63.3)
    assert (shortest, by_rl) == (pytest.approx(0.198, abs=5e-4), pytest.approx(0.0244, abs=5e-4))


def test_aes_golden_model_interpolation():
    found = accuracy_efficiency(tokens=17_574, accuracy=80.5, parent_tokens=22_813, parent_accuracy=80.4)
    assert found == pytest.approx(0.2334, abs=5e-5)


def test_differences_are_against_the_parent(arms):
    found = frontier(arms, "teacher", [("brief", "base")])
    assert found.row("teacher").difference is None
    assert found.row("teacher").aes is None
    brief = found.row("brief")
    assert brief.difference is not None
    parent = arms[1].summary
    assert brief.difference.accuracy.value == pytest.approx(
        brief.summary.accuracy.value - parent.accuracy.value, abs=1e-12
    )
    assert brief.difference.tokens_relative.value == pytest.approx(
        brief.summary.tokens.mean.value / parent.tokens.mean.value - 1, abs=1e-12
    )
    assert brief.difference.tokens_relative.high < -0.5
    assert [row.name for row in found.rows if row.non_dominated] == ["teacher", "brief", "guess"]
    assert found.comparisons[0].difference.accuracy.value == pytest.approx(
        brief.summary.accuracy.value - arms[0].summary.accuracy.value, abs=1e-12
    )


def test_a_parent_that_is_never_right_has_no_aes():
    found = frontier([make_arm("zero", 0.0, 10), make_arm("some", 0.5, 10)], "zero")
    assert found.row("some").aes is None
    assert "-" in table(found)


def test_it_survives_json(arms):
    found = frontier(arms, "teacher", [("brief", "base")])
    assert Frontier.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def test_bad_arms_are_refused(arms):
    with pytest.raises(ValueError, match="two arms are called 'base'"):
        frontier([*arms, arms[0]], "teacher")
    with pytest.raises(ValueError, match="'techer' is not an arm; the arms are base, teacher"):
        frontier(arms, "techer")
    with pytest.raises(ValueError, match="'nobody' is not an arm"):
        frontier(arms, "teacher", [("base", "nobody")])
    with pytest.raises(ValueError, match="two has 2 samples per problem and teacher has 4"):
        frontier([*arms, make_arm("two", 0.5, 10, samples=2)], "teacher")
    with pytest.raises(ValueError, match="few against teacher: a paired comparison needs the same problems"):
        frontier([*arms, make_arm("few", 0.5, 10, problems=3)], "teacher")


def test_the_table_holds_every_arm_in_every_width(arms):
    found = frontier(arms, "teacher", [("brief", "base")])
    for width in (60, 120, 400):
        text = table(found, width)
        assert text.count("* brief") == text.count("  base") == text.count("  merge-0.5")
        for head in ("accuracy", "Δ accuracy", "Δ tokens", "maj@4", "pass@4", "median", "p95", "if right", "AES"):
            assert head in text
        if width >= 120:
            assert max(map(len, text.split("brief against base")[0].splitlines())) <= width
    wide = table(found, 400)
    assert wide.count("* brief") == 1
    summary = found.row("brief").summary.accuracy
    assert f"{summary.value:.3f} [{summary.low:.3f}, {summary.high:.3f}]" in wide
    assert "brief against base: accuracy +0." in wide
    assert "40 problems × 4 samples" in wide


def test_the_table_says_what_the_judge_could_not_decide():
    arm = make_arm("one", 1.0, 10, problems=2, samples=2)
    first = arm.groups[0]
    undecided = Rollout(first.rollouts[0].completion, Verdict.undecided(JudgeFailure.TIMEOUT))
    groups = (RolloutGroup(first.problem, (1,), (undecided, first.rollouts[1])), arm.groups[1])
    found = frontier([Arm("one", groups, summarize(groups, tiny.TASK))], "one")
    assert "neither right nor wrong: one 1." in table(found)


def test_number_forms():
    assert [count(61.25), count(12345.6), count(None)] == ["61.2", "12,346", "-"]
    assert [signed(0.0123), signed(-0.0001), signed(-0.5, 1)] == ["+0.012", "+0.000", "-0.5"]


# --- the scores ---------------------------------------------------------------------------------------------------


def test_dominators_and_the_most_accurate_one_first():
    assert dominators([(0.9, 60), (0.9, 30), (0.7, 20), (0.6, 25)]) == [[1], [], [], [2]]
    found = frontier([make_arm("a", 0.3, 90), make_arm("b", 0.6, 60), make_arm("c", 0.95, 30)], "a")
    assert [row.dominated_by for row in found.rows] == [("c", "b"), ("c",), ()]
    assert [row.non_dominated for row in found.rows] == [False, False, True]


def test_overthinking_score_golden():
    scores = overthinking_scores([(0.8, 140), (0.9, 100), (1.0, 200), (0.0, 200)])
    assert scores == pytest.approx([0.685714, 2 * 0.9 / 1.9, 0.0, 0.0], abs=5e-7)
    assert overthinking_scores([(0.8, 5), (0.1, 5)]) == [None, None]


def group(number, *attempts, text="1 </think>02", answer="02"):
    """A problem with samples given as (right, tokens); right None is undecided."""
    rollouts = []
    for right, tokens in attempts:
        known = Verdict(Outcome.RIGHT if right else Outcome.WRONG)
        verdict = Verdict.undecided(JudgeFailure.TIMEOUT) if right is None else known
        rollouts.append(Rollout(Completion(text, tuple(range(tokens)), (0.0,) * tokens, FinishReason.STOP), verdict))
    return RolloutGroup(Problem(f"p{number}", (TextPart("01+01"),), answer), (1,), tuple(rollouts))


def change(point):
    assert point.difference is not None
    return point.difference


def test_at_a_limit_by_hand():
    parent, arm = [group(0, (True, 1), (True, 4))], [group(0, (True, 2), (True, 2))]
    found = at_limit(arm, parent, 3)
    assert (found.limit, found.accuracy.value, change(found).value) == (3, 1.0, 0.5)
    assert change(at_limit(arm, parent, 1)).value == -0.5
    own = at_limit(parent, None, 4)
    assert (own.accuracy.value, own.difference) == (1.0, None)
    undecided = [group(0, (True, 1), (True, 4), (None, 900))]
    assert change(at_limit(arm, undecided, 3)).value == 0.5
    assert parent_limits(79.3) == (20, 40, 80, 159) and parent_limits(1) == (1, 2)


@given(
    st.lists(st.lists(st.tuples(st.booleans(), st.integers(1, 30)), min_size=2, max_size=2), min_size=2, max_size=6),
    st.integers(1, 40),
)
@settings(max_examples=40, deadline=None)
def test_at_a_limit_equals_a_count(rows, limit):
    arm = [group(i, *row) for i, row in enumerate(rows)]
    parent = [group(i, *((not right, tokens + 1) for right, tokens in row)) for i, row in enumerate(rows)]
    found = at_limit(arm, parent, limit)
    kept = sum(right and tokens <= limit for row in rows for right, tokens in row)
    lost = sum(not right and tokens < limit for row in rows for right, tokens in row)
    assert found.accuracy.value == pytest.approx(kept / (2 * len(rows)))
    assert change(found).value == pytest.approx((kept - lost) / (2 * len(rows)))


def test_what_dominates_beyond_noise():
    worse, better, close = make_arm("a", 0.8, 60), make_arm("b", 0.97, 40), make_arm("c", 0.8, 58)
    assert dominates_beyond_noise(worse.groups, better.groups)
    assert not dominates_beyond_noise(better.groups, worse.groups)
    assert not dominates_beyond_noise(close.groups, worse.groups)  # as accurate, and briefer
    found = frontier([worse, better, close], "b")
    row = found.row("a")
    assert row.beyond_noise and row.dominated_by[0] == "b" and row.mark == " "
    # 1.0 at 40 tokens against the same answers at 41 with one wrong: dominated, but not beyond noise.
    sides = {
        "x": [group(i, (True, 40 + i % 3)) for i in range(30)],
        "y": [group(i, (i > 0, 40 + (i + 1) % 3 + (i == 7))) for i in range(30)],
    }
    made = [Arm(name, tuple(groups), summarize(groups, tiny.TASK)) for name, groups in sides.items()]
    near = frontier(made, "x").row("y")
    assert near.dominated_by == ("x",) and not near.beyond_noise and near.mark == "~"
    dominated = next(column for column in table_columns(found) if column.head == "dominated by")
    more = len(row.dominated_by) - 1
    assert dominated.cell(row) == "b" + (f" and {more} more" if more else "")
    assert (
        next(column for column in table_columns(frontier(made, "x")) if column.head == "dominated by").cell(near)
        == "~ x"
    )


def test_a_collapsed_arm_is_named_and_off_the_line():
    found = frontier(
        [make_arm("teacher", 0.95, 80), make_arm("nothing", 0.0, 2), make_arm("brief", 0.6, 30)], "teacher"
    )
    row = found.row("nothing")
    assert row.non_dominated and row.collapsed and not row.joined
    assert not found.row("brief").collapsed and found.row("brief").joined
    assert "Collapsed: nothing is less than half as right as teacher." in notes(found)
    assert not frontier([make_arm("zero", 0.0, 10)], "zero").row("zero").collapsed  # a parent has nothing to fall from


def test_the_limits_of_equal_budget_are_a_table(arms):
    found = frontier(arms, "teacher")
    name, *columns = limit_columns(found)
    mean = found.row("teacher").summary.tokens.mean.value
    assert [column.head for column in columns] == [f"at most {limit} tokens" for limit in parent_limits(mean)]
    assert [name.cell(row) for row in found.rows][3] == "* brief"
    last = found.row("brief").at_limits[-1]
    assert columns[-1].cell(found.row("brief")).startswith(f"{last.accuracy.value:.3f}, ")
    assert columns[-1].cell(found.row("teacher")) == f"{found.row('teacher').at_limits[-1].accuracy.value:.3f}"


def test_the_curves_share_their_limits_and_end_at_the_accuracy(arms):
    assert budget_grid(160, 2) == [40, 57, 80, 114, 160]
    assert budget_grid(2) == [1, 2]
    found = frontier(arms, "teacher")
    longest = max(length for arm in arms for g in arm.groups for length in g.num_tokens)
    for row in found.rows:
        assert [point.budget for point in row.curve.points] == budget_grid(longest)
        accuracies = [point.accuracy.value for point in row.curve.points]
        assert accuracies == sorted(accuracies) and accuracies[-1] == row.summary.accuracy.value
    assert [p.budget for p in frontier(arms, "teacher", budgets=[64, 16]).rows[0].curve.points] == [16, 64]
    assert found.row("brief").curve.area.value > found.row("teacher").curve.area.value  # right sooner


# --- what a thought needed ----------------------------------------------------------------------------------------


def test_efficiency_golden():
    found = efficiency([[(True, 300, 1000), (False, None, 400), (True, 500, 500)]])
    assert found.outcome.value == pytest.approx(0.43333, abs=5e-6)
    assert found.underthinking is not None and found.underthinking.value == 0.0
    found = efficiency([[(False, 200, 800)], [(False, None, 800)]])
    assert found.outcome.value == 0.0
    assert found.underthinking is not None and found.underthinking.value == 0.375
    assert efficiency([[(True, None, 7)]]) == Efficiency(efficiency([[(True, 7, 7)]]).outcome, None)
    assert Efficiency.from_json(json.loads(json.dumps(found.to_json()))) == found
    with pytest.raises(ValueError, match="decided none"):
        efficiency([])


def test_the_first_right_solution_is_found_in_the_text():
    text = "6*7=41. Wait, 6*7=42. Hmm, 42 it is. </think>42"
    assert first_right(text, {"42"}, integers.TASK) == text.index("Hmm") == 22
    assert first_right(text, {"41"}, integers.TASK) == text.index("Wait")
    assert first_right(text, {"43"}, integers.TASK) is None
    assert solutions("nothing here") == []
    assert readings("1,042", integers.TASK) == {"1042"}
    assert "04" in readings("04", tiny.TASK)
    assert readings("", tiny.TASK) == set()


def test_attempts_of_a_group():
    early = "6*7=42. Wait, is it 42? Yes: 42. </think>42"
    texts = [
        (early, True),
        ("6*7=42. </think>42", True),  # its only solution: all of it was needed
        ("6*7=42. Wait, 6*8=48. </think>48", False),  # had it and left it
        ("6*7=41. </think>41", False),
        ("no number </think>42", True),
    ]
    rollouts = tuple(
        Rollout(
            Completion(text, tuple(range(len(text))), (0.0,) * len(text), FinishReason.STOP),
            Verdict(Outcome.RIGHT if right else Outcome.WRONG),
        )
        for text, right in texts
    )
    made = RolloutGroup(Problem("p", (TextPart("6*7"),), "42"), (1,), rollouts)
    found = attempts_of(made, integers.TASK, lambda ids, characters: characters)  # a token a character
    assert found == [
        (True, 8, len(early)), (True, None, 18), (False, 8, len(texts[2][0])), (False, None, 18), (True, None, 20),
    ]  # fmt: skip


def test_efficiency_counts_in_the_arms_own_tokens():
    tokenizer = make_tokenizer()
    text = "47*3=41 wait 7*3=21 so 41; </think>41"
    ids = tuple(tokenizer(text + "<|end|>")["input_ids"])
    rollout = Rollout(Completion(text, ids, (0.0,) * len(ids), FinishReason.STOP), Verdict(Outcome.RIGHT))
    made = RolloutGroup(Problem("p", (TextPart("47*3"),), "41"), (1,), (rollout,))
    assert efficiency_of([made], tiny.TASK, tokenizer).outcome.value == 8 / len(ids)  # "47*3=41" and " wait "


# --- text forms ---------------------------------------------------------------------------------------------------


def test_signs():
    assert signs(SignTest(5, 1, 1, 0.21875)) == "+5 -1, p 0.22"
    assert signs(SignTest(30, 1, 0, 3e-8)) == "+30 -1, p<0.001"
    assert signs(SignTest(9, 1, 0, 0.021484375)) == "+9 -1, p 0.021"


def test_markdown_holds_every_cell_and_no_markup_of_its_own(arms):
    odd = make_arm("a|b_<c>*", 0.6, 50)
    found = frontier([*arms, odd], "teacher", [("brief", "base")])
    text = table_markdown(found)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in rows]
    assert len(rows) == 3 * (2 + len(found.rows)) and set(widths) == {9, len(table_columns(found)) - 6, 6}
    assert text.count(r"a\|b\_\<c\>\*") == 3
    assert r"| \* brief |" in text and "- brief against base: accuracy" in text
    assert "| truncated |" in text
    for row in found.rows:
        for column in table_columns(found)[1:]:
            assert re.sub(r"([\[\]_|<>*])", r"\\\1", column.cell(row)) in text


def test_csv_has_every_number_unrounded(arms):
    found = frontier(arms, "teacher", [("brief", "base")])
    lines = list(csv.DictReader(io.StringIO(table_csv(found))))
    assert [line["name"] for line in lines] == [row.name for row in found.rows]
    for line, row in zip(lines, found.rows, strict=True):
        summary = row.summary
        assert float(line["accuracy"]) == summary.accuracy.value
        assert float(line["accuracy_low"]) == summary.accuracy.low
        assert float(line["tokens_mean_high"]) == summary.tokens.mean.high
        assert float(line["pass_at_2"]) == dict(summary.pass_at)[2]
        assert float(line["reflection_words_wait"]) == 0.0
        point = row.curve.points[3]
        assert float(line[f"curve_accuracy_at_{point.budget}_low"]) == point.accuracy.low
        assert float(line["curve_area"]) == row.curve.area.value
        point = row.at_limits[1]
        assert float(line[f"at_limit_{point.limit}_accuracy_low"]) == point.accuracy.low
        if row.difference is None:
            assert line["difference_accuracy"] == line["aes"] == line[f"at_limit_{point.limit}_difference"] == ""
        else:
            assert float(line["difference_accuracy_signs_p"]) == row.difference.accuracy_signs.p
            assert int(line["difference_only_any_parent"]) == row.difference.only_any[1]
            assert float(line[f"at_limit_{point.limit}_difference_high"]) == change(point).high
        assert line["dominated_by"] == " ".join(row.dominated_by)

    row = found.rows[0]
    names = {str(point.budget) for point in row.curve.points} | {str(k) for k, _ in row.summary.pass_at} | {"wait"}
    names |= {str(point.limit) for point in row.at_limits}
    assert set(map(str, leaves(row.to_json()))) - set(lines[0].values()) <= names  # those are in the columns' names


def leaves(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [] if value is None else [value]


def test_few_problems_are_warned_of(arms):
    assert "Only 40 problems: with fewer than 100 the intervals are rough" in table(frontier(arms, "teacher"))
    many = [make_arm("one", 0.5, 10, problems=100, samples=1), make_arm("two", 0.5, 10, problems=100, samples=1)]
    assert not any("rough" in line for line in notes(frontier(many, "one")))


def test_a_frontier_of_another_version_says_what_to_do(arms):
    old = json.loads(json.dumps(frontier(arms, "teacher").to_json()))
    for row in old["rows"]:
        del row["curve"], row["at_limits"]
    with pytest.raises(ValueError, match="differ in at_limits, curve; remove the folder it is in and run the same"):
        Frontier.from_json(old)


RECIPE = """
name: two
seed: 1
problems: {{source: tiny, levels: [2], train: 20, dev: 5, test: 6}}
sampling: {{max_tokens: 40, batch_size: 16}}
stages:
  frontier:
    method: frontier
    parent: base
    samples: 2
    arms: {{base: {models}/tiny-base, short: {models}/tiny-short}}
    budgets: [10, 40]
"""


def test_the_stage_writes_its_text_forms_and_the_command_prints_them(tmp_path):
    models = Path(__file__).parents[1] / "recipes" / "models"
    (tmp_path / "two.yaml").write_text(RECIPE.format(models=models))
    command = ["frontier", str(tmp_path / "two.yaml"), "--runs", str(tmp_path / "runs")]
    printed = CliRunner().invoke(cli.app, [*command, "--csv"])
    assert printed.exit_code == 0, printed.output
    (folder,) = (path for path in (tmp_path / "runs" / "two").glob("frontier-*") if path.is_dir())
    found = Frontier.from_json(json.loads((folder / "frontier.json").read_text()))
    assert printed.stdout == (folder / "frontier.csv").read_text() == table_csv(found)
    assert (folder / "frontier.md").read_text() == table_markdown(found)
    for row in found.rows:
        assert row.efficiency is not None and row.summary.think_tokens is not None
        assert [point.budget for point in row.curve.points] == [10, 40]
    assert CliRunner().invoke(cli.app, [*command, "--markdown"]).stdout == table_markdown(found)  # reused

    old = json.loads((folder / "frontier.json").read_text())
    del old["rows"][0]["curve"]
    (folder / "frontier.json").write_text(json.dumps(old))
    refused = CliRunner().invoke(cli.app, command)
    assert refused.exit_code == 2
    assert "written by another version of reason" in refused.output and "Traceback" not in refused.output
