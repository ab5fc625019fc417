"""Traces from elsewhere: every published shape, and that a planted wrong answer never becomes a trace."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cli
from distill.foreign import ForeignTrace, TraceColumns, Unusable, read_foreign, with_tags
from distill.imported import for_template, import_traces, opened, plain_traces, pool_groups_as_they_are
from distill.trace_export import FORMATS, export_traces
from distill.traces import Trace, read_traces, write_traces
from recipes.console import PlainReport
from recipes.loader import RecipeError
from recipes.runner import run_recipe
from recipes.schema import load_recipe
from recipes.stages import METHODS
from rl.pool import Pool
from rl.problems import BadProblems
from rl.runs import read_json
from rl.sources import read_source
from rl.tasks import tiny
from rl.tasks.tiny_models import make_tokenizer
from rl.types import FinishReason

MODELS = Path(__file__).resolve().parents[1] / "recipes" / "models"


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


THOUGHT = "<think>\n6x7=42\n</think>\n\n42"
SHAPES = {
    "messages": {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Q"},
                              {"role": "assistant", "content": THOUGHT}]},
    "reasoning_content": {"messages": [{"role": "user", "content": "Q"},
                                       {"role": "assistant", "content": "42", "reasoning_content": "6x7=42"}]},
    "sharegpt": {"system": "s", "conversations": [
        {"from": "user", "value": "Q"},
        {"from": "assistant", "value": "<|begin_of_thought|>\n6x7=42\n<|end_of_thought|>\n\n<|begin_of_solution|>42"
                                       "<|end_of_solution|>"},
    ]},
    "openthoughts": {"problem": "Q", "deepseek_reasoning": "6x7=42", "deepseek_solution": "42", "domain": "math"},
    "s1": {"question": "Q", "deepseek_thinking_trajectory": "6x7=42", "deepseek_attempt": "42", "solution": "s"},
    "openr1": {"problem": "Q", "answer": "42", "generations": [THOUGHT], "finish_reasons": ["stop"],
               "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "other"}]},
    "flat": {"prompt": "Q", "response": THOUGHT},
    "flat with a thought": {"question": "Q", "response": "42", "reasoning": "6x7=42"},
    "prefilled teacher": {"prompt": "Q", "completion": "\n6x7=42\n</think>\n\n42"},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_published_shapes_are_recognised(tmp_path, shape):
    (found,) = read_foreign(write(tmp_path / "t.jsonl", SHAPES[shape]))
    assert found == ForeignTrace(1, "Q", THOUGHT, FinishReason.STOP)


def test_several_completions_and_how_they_ended(tmp_path):
    row = {"problem": "Q", "generations": ["<think>a</think>1", "<think>b"], "finish_reasons": ["stop", "length"]}
    ends = [found.finish for found in read_foreign(write(tmp_path / "t.jsonl", row)) if isinstance(found, ForeignTrace)]
    assert ends == [FinishReason.STOP, FinishReason.LENGTH]
    path = write(tmp_path / "t.jsonl", {"prompt": "Q", "response": "<think>never ends"})
    assert [found.finish for found in read_foreign(path) if isinstance(found, ForeignTrace)] == [FinishReason.LENGTH]


def test_what_is_no_trace_is_named_by_row_and_column(tmp_path):
    good = {"q": "Q", "a": "<think>a</think>1"}
    for row, columns, message in (
        ({"text": "x"}, None, r"t.jsonl:1: has no columns that look like traces .there are: text."),
        ({"prompt": "Q", "response": None}, None, "response must be a text, not null"),
        ({"prompt": "Q", "response": "1", "finish_reason": "tired"}, None, "finish_reason is 'tired', not one of stop"),
        ({"problem": "Q", "generations": ["a", "b"], "finish_reasons": ["stop"]}, None, "holds 2 completions"),
        ({"messages": "Q"}, None, "messages is a str, not a list of messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, None, r"messages\[0\] is of role 'tool'"),
        (good, TraceColumns("q", "b"), "has no column 'b' .there are: q, a."),
    ):
        with pytest.raises(BadProblems, match=message):
            list(read_foreign(write(tmp_path / "t.jsonl", row), columns))
    turns = {"messages": [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]}
    assert list(read_foreign(write(tmp_path / "t.jsonl", turns))) == [Unusable(1, "more than one turn")]
    (tmp_path / "t.jsonl").write_text(json.dumps(SHAPES["flat"]) + "\n{\n")
    with pytest.raises(BadProblems, match="t.jsonl:2: is not JSON"):
        list(read_foreign(tmp_path / "t.jsonl"))


def test_tags_and_templates():
    assert with_tags("4", "2+2=4") == "<think>\n2+2=4\n</think>\n\n4"
    assert with_tags("2+2=4</think>4") == "<think>2+2=4</think>4" and with_tags("4") == "4"
    assert for_template("<think>\na</think>4", "\n") == "a</think>4"
    assert for_template("<think>a</think>4", None) == "<think>a</think>4"
    assert opened(make_tokenizer()) == ""
    rows = [ForeignTrace(1, "Hi", "Hello", FinishReason.STOP)]
    for tail, text in (("\n", "\n</think>\n\nHello"), ("", "</think>Hello"), (None, "Hello")):
        (plain,) = plain_traces(rows, source="c.jsonl", teacher="chat", tail=tail, count_tokens=len)
        assert (plain.text, plain.num_tokens, plain.thinks) == (text, len(text), False)
    cut = [*rows, ForeignTrace(3, "Hi", "Hel", FinishReason.LENGTH)]
    with pytest.raises(BadProblems, match="c.jsonl:3: ended by length"):
        plain_traces(cut, source="c.jsonl", teacher="chat", tail="", count_tokens=len)


def planted(problems, seed: int) -> tuple[list[dict], int, int]:
    """Rows of right and wrong answers, and some of no problem: (rows, right, wrong)."""
    rng, rows, right, wrong = random.Random(seed), [], 0, 0
    for problem in problems:
        for n in range(rng.randrange(4)):
            ok = rng.random() < 0.5
            answer = problem.answer if ok else f"{(int(problem.answer) + 1 + n) % 100:02}"
            right, wrong = right + ok, wrong + (not ok)
            text = f"<think>{n}={n};</think>{answer}"
            rows.append({"prompt": f"  {problem.text} ", "response": text, "correctness": True})
    rows += [{"prompt": "no such question", "response": "<think>1</think>1"}] * 3
    rng.shuffle(rows)
    return rows, right, wrong


@pytest.mark.parametrize("seed", range(3))
def test_planted_wrong_answers_never_enter_the_traces(tmp_path, seed):
    from distill.traces import select_traces

    problems = tiny.problems("train", 20, (2,))
    rows, right, wrong = planted(problems, seed)
    arguments = {
        "teacher": "r1", "origin": {"source": "t.jsonl"}, "problems": problems, "task": tiny.TASK,
        "tokenizer": make_tokenizer(),
    }  # fmt: skip
    summary = import_traces(tmp_path / "pool", read_foreign(write(tmp_path / "t.jsonl", *rows)), **arguments)
    assert summary["outcomes"] == {"right": right, "wrong": wrong, "undecided": 0}
    assert summary["rows"] == len(rows) == summary["imported"] + sum(summary["left out"].values())
    assert summary["left out"] == {"no such problem": 3}
    pool = Pool.open(tmp_path / "pool")
    groups = pool_groups_as_they_are(pool, problems, tiny.TASK.verifier_version)
    assert sum(len(group.rollouts) for group in groups) == right + wrong == len(pool)
    selection = select_traces(groups, teacher="r1", seed=0, per_problem=None)
    answers = {problem.id: problem.answer for problem in problems}
    assert selection.kept == right and selection.dropped["wrong"] == wrong
    for trace in selection.traces:
        assert trace.text.partition("</think>")[2] == answers[trace.problem_id]
        assert "<think>" not in trace.text  # the template opens it
    # The same call again changes nothing; a call with other rows is another pool.
    before = pool.canonical_hash()
    assert import_traces(tmp_path / "pool", read_foreign(tmp_path / "t.jsonl"), **arguments) == summary
    assert Pool.open(tmp_path / "pool").canonical_hash() == before


def test_questions_that_nobody_asked_are_an_error_that_shows_both(tmp_path):
    rows = [ForeignTrace(1, "Solve: 1+1", "<think>a</think>2", FinishReason.STOP)]
    problems = tiny.problems("train", 1, (2,))
    arguments = {"teacher": "r1", "origin": {}, "task": tiny.TASK, "tokenizer": make_tokenizer()}
    with pytest.raises(ValueError, match="none of the 1 rows answers one of the 1 problems: .* begins 'Solve: 1.1'"):
        import_traces(tmp_path / "a", rows, problems=problems, **arguments)
    asked = [ForeignTrace(1, f"Solve: {problems[0].text}", "<think>a</think>2", FinishReason.STOP)]
    assert import_traces(tmp_path / "b", asked, problems=problems, strip=("Solve:",), **arguments)["imported"] == 1


def test_exported_traces_are_read_back(tmp_path):
    traces = [Trace("p1", "1+1", "a\u2028b</think>2", 9, "t", "tiny", 2), Trace("p2", "2+2", "c</think>4", 5, "t")]
    write_traces(tmp_path / "traces.jsonl", traces)
    for name, form in (("m.jsonl", "messages"), ("m.parquet", "parquet")):
        assert export_traces(tmp_path / "traces.jsonl", tmp_path / name, FORMATS[form]) == 2
        found = [one for one in read_foreign(tmp_path / name) if isinstance(one, ForeignTrace)]
        assert [(one.question, for_template(one.text, "")) for one in found] == [(t.question, t.text) for t in traces]
    done = CliRunner().invoke(cli.app, ["traces", "export", str(tmp_path), "--to", str(tmp_path / "n.jsonl"), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["rows"] == 2
    with pytest.raises(ValueError, match="never overwritten"):
        export_traces(tmp_path / "traces.jsonl", tmp_path / "n.jsonl", FORMATS["messages"])


def test_saved_data_sets_are_problems_and_a_folder_of_splits_is_named(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = {"question": ["Q1?", "Q2?"], "answer": ["1", "2"]}
    DatasetDict({"train": Dataset.from_dict(rows), "test": Dataset.from_dict(rows)}).save_to_disk(str(tmp_path / "d"))
    assert [problem.answer for problem in read_source(tmp_path / "d" / "train")] == ["1", "2"]
    with pytest.raises(BadProblems, match="holds several splits: name one of .*d/test, .*d/train"):
        read_source(tmp_path / "d")
    with pytest.raises(BadProblems, match="a folder, but none that `datasets` has written"):
        read_source(tmp_path)


RECIPE = f"""name: foreign
problems: {{source: tiny, levels: [2], train: 30, dev: 2, test: 2}}
stages:
  foreign: {{method: import_traces, source: ./t.jsonl, teacher: r1, model: {MODELS}/tiny-base}}
  every: {{method: traces, pool: foreign, keep: all, licences: {{tiny: CC0}}}}
  short: {{method: traces, pool: foreign, keep: shortest, per_problem: 1, filters: {{decontaminate: [./eval.jsonl]}}}}
  mixed:
    method: mix
    model: {MODELS}/tiny-base
    parts: {{math: {{traces: every, share: 0.75}}, chat: {{file: ./chat.jsonl, share: 0.25}}}}
    long: {{share: 0.5, percentile: 50}}
"""


def test_through_the_recipe(tmp_path):
    problems = tiny.problems("train", 30, (2,))
    rows, right, wrong = planted(problems, 7)
    rows += [
        {"prompt": p.text, "response": f"<think>{'1+' * n}1=1;</think>{p.answer}"} for n, p in enumerate(problems[:8])
    ]
    right += 8
    write(tmp_path / "t.jsonl", *rows)
    write(tmp_path / "chat.jsonl", *({"prompt": f"{n}+1", "response": f"{n + 1:02}"} for n in range(30)))
    write(tmp_path / "eval.jsonl", {"question": problems[0].text})
    (tmp_path / "r.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.part("distill") == ["foreign", "every", "short", "mixed"]
    results = {r.name: r.folder for r in run_recipe(recipe, root=tmp_path, methods=METHODS, report=PlainReport())}
    assert read_json(results["foreign"] / "summary.json")["outcomes"]["wrong"] == wrong
    answers = {problem.id: problem.answer for problem in problems}
    for name in ("every", "short"):
        found = read_traces(results[name] / "traces.jsonl")
        assert all(trace.text.endswith(f"</think>{answers[trace.problem_id]}") for trace in found)
        card = read_json(results[name] / "data_card.json")
        assert (
            card["rows"] == len(found) and card["rows"] + sum(card["dropped"].values()) == card["pool"] == right + wrong
        )
    assert card["decontamination"]["leaked"] == 1 and problems[0].id not in {trace.problem_id for trace in found}
    mixed = read_json(results["mixed"] / "data_card.json")
    assert mixed["parts"]["math"]["rows"] == pytest.approx(3 * mixed["parts"]["chat"]["rows"], abs=2)
    assert mixed["parts"]["math"]["long"] == pytest.approx(mixed["parts"]["math"]["rows"] / 2, abs=1)
    assert mixed["teachers"]["foreign"]["model"] == "imported: r1"
    assert (results["mixed"] / "data_card.md").read_text().startswith("# Traces: foreign/mixed")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("keep: all", "keep: all, per_problem: 2", "per_problem: has no effect with keep: all"),
        ("keep: shortest", "keep: judge", "judge: goes with keep: judge"),
        ("share: 0.25", "share: 0.5", "the shares sum to 1.25, not to 1"),
        (", share: 0.25", "", "either every part has a share, or none"),
        ("percentile: 50", "percentile: 50, tokens: 9", "give either tokens or percentile"),
        (
            "method: traces, pool: foreign, keep: all, licences: {tiny: CC0}",
            "method: pairs, pool: foreign",
            "only method: traces reads it",
        ),
        ("./t.jsonl", "./none.jsonl", "there is no file ./none.jsonl"),
    ],
)
def test_recipes_that_cannot_be(tmp_path, old, new, message):
    for name in ("t", "chat", "eval"):
        write(tmp_path / f"{name}.jsonl", {})
    (tmp_path / "r.yaml").write_text(RECIPE.replace(old, new, 1))
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "r.yaml")


def test_the_command_imports_into_a_pool(tmp_path):
    problems = tiny.problems("test", 20, (2, 3, 4))
    rows, right, wrong = planted(problems, 1)
    done = CliRunner().invoke(
        cli.app,
        ["pool", "import", str(write(tmp_path / "t.jsonl", *rows)), "tiny", "--count", "20", "--json",
         "--out", str(tmp_path / "pool"), "--tokenizer", str(MODELS / "tiny-base"), "--teacher", "r1"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["outcomes"] == {"right": right, "wrong": wrong, "undecided": 0}
