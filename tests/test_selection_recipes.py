"""Selection and preference through the recipe's door: merge with rejection sampling, cuts, guards, pairs, losses."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from distill.traces import read_traces
from long2short import shortest
from long2short.preference import read_pairs
from recipes.console import PlainReport, run_result, stage_notes
from recipes.loader import RecipeError
from recipes.runner import StageResult, Status, run_recipe
from recipes.schema import load_recipe
from recipes.stages import METHODS
from rl.runs import read_json, write_json
from rl.tasks import tiny
from rl.types import Completion, FinishReason

MODELS = Path(__file__).resolve().parents[1] / "recipes" / "models"
HEAD = f"""name: selection
problems: {{source: tiny, levels: [2], train: 12, dev: 2, test: 2}}
sampling: {{max_tokens: 80, batch_size: 64}}
stages:
  pool: {{method: sample, model: {MODELS}/tiny-base, samples: 6}}
"""


def write(folder: Path, stages: str) -> Path:
    path = folder / "selection.yaml"
    path.write_text(HEAD + textwrap.indent(textwrap.dedent(stages), "  "))
    return path


def merge_with_rejection_sampling() -> str:
    """The snippet in the docstring of `long2short.shortest`, so that it cannot go stale."""
    assert shortest.__doc__ is not None
    lines = [line for line in shortest.__doc__.splitlines() if line.startswith("    ")]
    snippet = "\n".join(lines).replace("./models/", f"{MODELS}/")
    return f"teacher: {{method: grpo, model: {MODELS}/tiny-base, steps: 1}}\n{textwrap.dedent(snippet)}\n"


def test_merge_with_rejection_sampling_is_sample_and_shortest_on_the_merged_model(tmp_path):
    recipe = load_recipe(write(tmp_path, merge_with_rejection_sampling()))
    assert recipe.part("long2short") == ["merged", "merged-shortest", "merge-rs"]
    wanted = [stage.name for stage in recipe.with_needs(["merge-rs"])]
    assert wanted == ["teacher", "merged", "merged-pool", "merged-shortest", "merge-rs"]
    assert [read.ref for read in recipe.stages["merged-pool"].references()] == ["merged"]
    assert (recipe.stages["merged-shortest"].makes, recipe.stages["merge-rs"].makes) == ("traces", "model")


STAGES = f"""
merged: {{method: merge, long: {MODELS}/tiny-base, short: {MODELS}/tiny-short, weight: 0.5}}
merged-pool: {{method: sample, model: merged, samples: 4}}
merged-shortest: {{method: shortest, pool: merged-pool, samples: 4}}
merge-rs: {{method: sft, model: merged, traces: merged-shortest, epochs: 1, max_length: 128}}
three: {{method: shortest, pool: pool, samples: 6, per_problem: 3}}
first: {{method: shortest, pool: pool, samples: 6, per_problem: 6, cut: first}}
whole: {{method: shortest, pool: pool, samples: 6, per_problem: 6}}
guarded:
  method: shortest
  pool: pool
  samples: 6
  majority: true
  min_right: 2
  min_think_tokens: 24
  verify_with: integers
pairs: {{method: pairs, pool: pool, silc: 1, balance_bins: 3, max_length: 60}}
every: {{method: pairs, pool: pool, silc: 1}}
normalised: {{method: dpo, model: {MODELS}/tiny-base, pairs: every, loss: sigmoid_norm, beta: 5.0, max_length: 128}}
simpo: {{method: simpo, model: {MODELS}/tiny-base, pairs: every, gamma: 0.3, max_length: 128}}
"""


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """What the run of `results` has said, in order."""
    return []


@pytest.fixture(scope="module")
def results(tmp_path_factory, lines) -> dict[str, StageResult]:
    folder = tmp_path_factory.mktemp("selection")
    recipe = load_recipe(write(folder, STAGES))
    found = run_recipe(recipe, root=folder / "runs", methods=METHODS, report=PlainReport(lines.append))
    return {result.name: result for result in found}


def summary(results: dict[str, StageResult], stage: str) -> dict[str, Any]:
    return read_json(results[stage].folder / "summary.json")


def traces(results: dict[str, StageResult], stage: str):
    return read_traces(results[stage].folder / "traces.jsonl")


def test_every_stage_counts_every_sample(results):
    for stage in ("three", "first", "whole", "guarded"):
        found = summary(results, stage)
        assert found["kept"] + sum(found["dropped"].values()) == found["pool"] == 12 * 6
    for stage in ("pairs", "every"):
        found = summary(results, stage)
        assert found["used"] + sum(found["dropped"].values()) == found["pool"] == 12 * 6


def test_the_k_shortest_are_of_those_that_are_right(results):
    whole, three = traces(results, "whole"), traces(results, "three")
    for problem in {trace.problem_id for trace in whole}:
        all_right = [trace for trace in whole if trace.problem_id == problem]
        assert [trace for trace in three if trace.problem_id == problem] == all_right[:3]
    assert len(traces(results, "merged-shortest")) <= 12


def test_cut_traces_are_right_and_shorter(results):
    """Of the tiny base's answers some end in a check that FCS leaves out; SFT reads them like any traces."""
    problems = {problem.id: problem for problem in tiny.problems("train", 12, (2,))}
    cut, whole = traces(results, "first"), traces(results, "whole")
    about = summary(results, "first")["cut"]
    assert about["cut"] >= 1
    assert about["mean_tokens_after"] < about["mean_tokens_before"]
    for trace in cut:
        completion = Completion(trace.text, (), (), FinishReason.STOP)
        assert tiny.judge(problems[trace.problem_id], completion).right
    # What is gone are longer answers; a cut one may equal another sample's, which is then kept once.
    gone = {trace.text for trace in whole} - {trace.text for trace in cut}
    assert 1 <= len(gone) <= about["cut"]
    assert len(cut) + summary(results, "first")["dropped"].get("duplicate", 0) >= len(whole)


def test_guards_leave_fewer(results):
    kept = {trace.problem_id for trace in traces(results, "guarded")}
    assert kept <= {trace.problem_id for trace in traces(results, "whole")}
    assert summary(results, "guarded")["dropped"]["hardly thought"] >= 1


def test_pairs_are_balanced_and_shown_before_training(results, lines):
    found = summary(results, "pairs")
    sizes = {one["pairs"] for one in found["pass_rates"]} - {0}
    assert len(sizes) == 1
    assert len(found["pass_rates"]) == 3
    assert found["within_max_length"] <= found["pairs"]
    every = summary(results, "every")
    assert every["kinds"]["short wrong"] >= 1
    assert len(read_pairs(results["every"].folder / "pairs.jsonl")) == every["pairs"] > found["pairs"]
    # Said when the stage ends, which is before anything trains on them.
    (first, *others) = stage_notes(results["pairs"])
    assert first.startswith(f"pairs {found['pairs']} (") and len(others) == 4
    assert first.endswith(f" of {every['pairs']} before they were balanced")
    (started,) = [index for index, line in enumerate(lines) if "normalised (dpo): starts" in line]
    for stage in ("pairs", "every"):
        shown = [lines.index(f"  {stage}: {note}") for note in stage_notes(results[stage])]
        assert len(shown) == 5 and max(shown) < started
    value, text = run_result("selection", 0, list(results.values()))
    assert value["pairs"] == {"pairs": found, "every": every}
    assert f"pairs                 {found['pairs']} (" in text
    assert f"within max_length     {found['within_max_length']} of {found['pairs']} (60 tokens)" in text


def test_a_merge_search_says_what_it_chose(tmp_path):
    write_json(tmp_path / "summary.json", {"chosen": "0.6", "reason": "fewest tokens (40.0)"}, "search.summary")
    seen: list[str] = []
    result = StageResult("found", "merge_search", tmp_path, Status.RAN, 7.0)
    PlainReport(seen.append).stage_finished(result, 1, 2)
    assert seen == ["[1/2] found (merge_search): done in 7.0 s", "  found: chose 0.6: fewest tokens (40.0)"]


def test_both_losses_train(results):
    pairs = len(read_pairs(results["every"].folder / "pairs.jsonl"))
    for stage in ("normalised", "simpo"):
        found = summary(results, stage)
        assert found["rows"] == pairs
        assert (results[stage].folder / "model" / "config.json").is_file()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("{method: shortest, pool: pool, samples: 6, per_problem: 7}", "per_problem: 7 is more than samples (6)"),
        ("{method: shortest, pool: pool, samples: 6, min_right: 7}", "min_right: 7 is more than samples (6)"),
        ("{method: shortest, pool: pool, samples: 6, cut: second}", "must be first or reflection"),
        ("{method: pairs, pool: pool, balance_bins: 1}", "balance_bins: must be at least 2"),
        ("{method: pairs, pool: pool, silc: -1}", "silc: must be at least 0"),
        ("{method: pairs, pool: pool, balance_min: 5}", "balance_min: has no effect without balance_bins; remove it"),
        ("{method: dpo, model: a/b, pairs: p, loss: sigmoid_norm, max_length: 9}", "required with loss: sigmoid_norm"),
        ("{method: dpo, model: a/b, pairs: p, loss: simpo, max_length: 9}", "must be sigmoid or sigmoid_norm"),
        ("{method: simpo, model: a/b, pairs: p, beta: 0.0, max_length: 9}", "beta: must be above 0"),
    ],
)
def test_keys_that_do_not_fit_are_refused(tmp_path, stage, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, f"p: {{method: pairs, pool: pool}}\nbad: {stage}"))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("task", "keys", "message"),
    [
        ("code", "cut: first", "task: code has none"),
        ("constraints", "cut: reflection", "task: constraints has none"),
        ("math", "verify_with: math", "math is the recipe's own task"),
        ("math", "cut: first, verify_with: integers", None),
    ],
)
def test_cuts_and_second_verifiers_fit_the_task(tmp_path, task, keys, message):
    (tmp_path / "p.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    path = write(tmp_path, f"short: {{method: shortest, pool: pool, samples: 6, {keys}}}")
    path.write_text(path.read_text().replace("source: tiny, levels: [2]", f"source: ./p.jsonl, task: {task}"))
    if message is None:
        assert load_recipe(path).stages["short"].config.verify_with == "integers"
        return
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert message in str(caught.value)
