"""Multiple choice, and the protocol of R1 on files of the forms that its benchmarks have."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from recipes import direct
from recipes.r1_eval_commands import benchmarks_of, r1_eval_command
from rl.problems import BadProblems
from rl.prompts import force_think, render_text
from rl.tasks.choice import TASK, judge, letter_of, lettered, read_choices
from rl.types import Completion, FinishReason, Outcome, Problem, TextPart

ROOT = Path(__file__).parent.parent
STUDENT = ROOT / "recipes" / "models" / "tiny-student"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"so</think>\boxed{C}", "C"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{(d)}", "D"),
        (r"\boxed{C) the third}", "C"),
        (r"\boxed{42}", None),
        (r"</think>The answer is (A).", "A"),
        ("the answer is: B, not option C", "C"),
        ("The answer is (b).", None),
        ("Well.\n\n**D**", "D"),
        ("A charge moves in a field.", None),
        ("<think>the answer is A", None),
        (r"\boxed{A} or rather \boxed{B}", "B"),
    ],
)
def test_the_letter_is_read_where_it_is_the_answer(text, letter):
    assert letter_of(text) == letter


def attempt(text: str, finish: FinishReason = FinishReason.STOP) -> Completion:
    return Completion(text, (1, 2), (-0.1, -0.1), finish)


def test_a_right_letter_is_right_and_one_cut_off_needs_its_box():
    problem = lettered("q", ["right", "wrong", "worse"], seed=0)
    wrong = "ABC".replace(problem.answer, "")[0]
    assert judge(problem, attempt(rf"t</think>\boxed{{{problem.answer}}}")).outcome is Outcome.RIGHT
    assert judge(problem, attempt(rf"t</think>\boxed{{{wrong}}}")).outcome is Outcome.WRONG
    cut = FinishReason.LENGTH
    assert judge(problem, attempt(f"t</think>The answer is {problem.answer}", cut)).outcome is Outcome.WRONG
    assert judge(problem, attempt(rf"t</think>\boxed{{{problem.answer}}}", cut)).outcome is Outcome.RIGHT


def test_options_are_shuffled_by_the_seed_and_the_right_one_is_named(tmp_path):
    rows = [
        {"Question": f"q{i}", "Correct Answer": "r", "Incorrect Answer 1": "a", "Incorrect Answer 2": "b"}
        for i in range(200)
    ]
    path = tmp_path / "gpqa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = read_choices(path)
    assert [f"{problem.answer}) r" in problem.text for problem in problems] == [True] * 200
    places = Counter(problem.answer for problem in problems)
    assert min(places[letter] for letter in "ABC") > 40  # 66.7 are expected, 6.7 the deviation
    assert read_choices(path) == problems
    assert read_choices(path, seed=1) != problems


def test_rows_without_options_are_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "q", "answer": "a", "wrong": []}\n{"answer": "a", "wrong": ["b"]}\n')
    with pytest.raises(BadProblems) as refused:
        read_choices(path)
    assert [line for line, _ in refused.value.rows] == [1, 2]


@pytest.mark.parametrize(
    "template", [None, "{{ messages[0].content }}{% if add_generation_prompt %}\nReply: {% endif %}"]
)
def test_every_reply_begins_in_a_thought(template):
    tokenizer = AutoTokenizer.from_pretrained(str(STUDENT))
    tokenizer.chat_template = template
    force_think(tokenizer)
    assert render_text(tokenizer, Problem("p", (TextPart("1+1"),), "2")).endswith("<think>\n")
    before = tokenizer.chat_template
    force_think(tokenizer)
    assert tokenizer.chat_template == before


@pytest.mark.parametrize(
    ("only", "files", "message"),
    [
        ("aime", (), "--only: there is no benchmark 'aime'; did you mean aime24?"),
        ("livecodebench", (), "give --file livecodebench=PATH"),
        (None, ("aime24",), "--file must be NAME=PATH"),
        (None, ("aime=x",), "--file: there is no benchmark 'aime'"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(only, files, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        benchmarks_of(only, files)


def test_without_a_file_what_the_hub_does_not_have_is_left_out():
    assert list(benchmarks_of(None, ())) == ["aime24", "math500", "gpqa-d"]


def evaluate(out: Path, files: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    capsys.readouterr()
    r1_eval_command(
        str(STUDENT), out, "aime24,gpqa-d", files, samples=4, max_tokens=12, engine="transformers", as_json=True
    )
    return json.loads(capsys.readouterr().out)


def test_the_protocol_on_local_files_and_again(tmp_path, capsys):
    aime, gpqa = tmp_path / "aime24.jsonl", tmp_path / "gpqa.jsonl"
    aime.write_text("".join(json.dumps({"question": f"{i}0+11", "answer": i * 10 + 11}) + "\n" for i in range(1, 6)))
    gpqa.write_text("".join(json.dumps({"question": f"{i}+1", "answer": "1", "wrong": ["2"]}) + "\n" for i in range(4)))
    files = [f"aime24={aime}", f"gpqa-d={gpqa}"]
    out = tmp_path / "out"
    value = evaluate(out, files, capsys)
    assert json.loads((out / "results.json").read_text()) == value
    assert {name: entry["summary"]["num_problems"] for name, entry in value["benchmarks"].items()} == {
        "aime24": 5,
        "gpqa-d": 4,
    }
    assert value["protocol"]["temperature"] == 0.6
    entry = value["benchmarks"]["aime24"]
    assert (entry["pool"]["max_tokens"], entry["samples"], entry["verifier"][:4]) == (12, 4, "math")
    # cons@k against a count by hand, ties to the first seen.
    chosen = direct.problem_set(str(gpqa), "all", None, "choice")
    votes = []
    for group in direct.read_pool(out / "gpqa-d", chosen):
        answers = [TASK.answer_of(rollout.completion.text) for rollout in group.rollouts]
        counted = Counter(answer for answer in answers if answer)
        winner = max(counted, key=lambda answer: counted[answer]) if counted else None
        votes.append(winner == group.problem.answer)
    assert value["benchmarks"]["gpqa-d"]["summary"]["maj_at_k"] == pytest.approx(sum(votes) / len(votes))
    pools = {path: path.read_bytes() for path in out.glob("*/*") if path.is_file()}
    assert evaluate(out, files, capsys) == value  # nothing is drawn again
    assert {path: path.read_bytes() for path in out.glob("*/*") if path.is_file()} == pools
