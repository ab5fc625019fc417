"""Multiple choice, and the protocol of R1 on files of the forms that its benchmarks have."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from recipes import direct, r1_eval_commands
from recipes.problem_keys import Problems
from recipes.r1_eval_commands import benchmarks_of, r1_eval_command, results_text
from rl.problems import BadProblems
from rl.prompts import force_think, render_text
from rl.tasks.choice import judge, letter_of, lettered, read_choices
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
        ("Answer: B", "B"),
        ("**Answer:** B", "B"),
        ("Final Answer: (C)", "C"),
        (r"The answer is $\text{B}$", "B"),
        (r"The answer must be \(D\)", "D"),
        ("The answer is A because it moves.", "A"),
        ("The correct option:\n\n**B) 42**", "B"),
        ("### Answer\nB", "B"),
        ("The option I choose is none.", None),
        (r"\boxed{\text{Option B}}", "B"),
        (r"\boxed{a proton}", None),
        (r"\boxed{B. 42}", "B"),
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


def test_of_several_templates_the_default_one_opens_the_thought():
    tokenizer = AutoTokenizer.from_pretrained(str(STUDENT))
    tokenizer.chat_template = {"default": "{{ messages[0].content }}!", "tools": "no"}
    force_think(tokenizer)
    assert render_text(tokenizer, Problem("p", (TextPart("1+1"),), "2")) == "1+1!<think>\n"


def test_columns_with_choice_are_refused():
    with pytest.raises(ValueError, match="columns of multiple choice have fixed names"):
        Problems.model_validate({"source": "./a.jsonl", "task": "choice", "columns": {"question": "q", "answer": "a"}})


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


# --- the command ------------------------------------------------------------------------------------------------------

CASES = json.dumps([{"input": "3\n", "output": "6\n", "testtype": "stdin"}])
ROWS = {  # a row of each, in the form that it is published in
    "aime24": [{"id": i, "problem": f"{i}0+11", "solution": "Add.", "answer": str(i * 10 + 11)} for i in range(1, 6)],
    "math500": [
        {"problem": f"{i}/2", "solution": "", "answer": rf"\frac{{{i}}}{{2}}", "level": 1, "unique_id": f"test/{i}"}
        for i in (1, 3)
    ],
    "gpqa-d": [
        {"Question": f"{i}+1", "Correct Answer": "1", "Incorrect Answer 1": "2", "Incorrect Answer 2": "3"}
        for i in range(12)
    ],
    "livecodebench": [
        {
            "question_id": "a", "question_content": "Double it.", "starter_code": "", "difficulty": "easy",
            "public_test_cases": CASES, "private_test_cases": CASES, "metadata": "{}",
        }
    ],
}  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"{name}={tmp_path / name}.jsonl" for name in ROWS]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """The student with a template that does not open the thought."""
    folder = tmp_path / "model"
    shutil.copytree(STUDENT, folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.chat_template = "<|user|>{{ messages[0].content }}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer.save_pretrained(folder)
    return folder


def run(
    out: Path,
    files: list[str],
    capsys: pytest.CaptureFixture[str],
    only: str | None = None,
    k: int = 2,
    model: Path = STUDENT,
) -> dict:
    capsys.readouterr()
    r1_eval_command(str(model), out, only, files, samples=k, max_tokens=12, engine="transformers", as_json=True)
    return json.loads(capsys.readouterr().out)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_protocol_on_local_files_and_again(tmp_path, plain, files, capsys, monkeypatch):
    out = tmp_path / "out"
    value = run(out, files, capsys, model=plain)
    assert json.loads((out / "results.json").read_text()) == value
    counted = {name: entry["summary"]["num_problems"] for name, entry in value["benchmarks"].items()}
    assert counted == {name: len(rows) for name, rows in ROWS.items()}
    protocol = value["protocol"]
    assert (protocol["temperature"], protocol["top_p"], protocol["seed"], value["left_out"]) == (0.6, 0.95, 0, [])
    assert {"python", "torch", "vllm", "math-verify"} <= protocol["versions"].keys()
    entry = value["benchmarks"]["aime24"]
    assert (entry["pool"]["max_tokens"], entry["samples"], entry["verifier"][:4]) == (12, 2, "math")
    assert {"model", "problems", "template"} <= entry["pool"].keys()
    assert entry["drawn_with"] == [
        {"engine": {"engine": "transformers", "batch_size": 256}, "versions": protocol["versions"]}
    ]
    tokenizer = AutoTokenizer.from_pretrained(str(plain))
    forced = tokenizer("<think>\n", add_special_tokens=False)["input_ids"]
    for name, rows in ROWS.items():
        files_of = (out / name).glob("samples-*.jsonl")
        prompts = [json.loads(line)["prompt_ids"] for file in files_of for line in file.read_text().splitlines()]
        assert len(prompts) == 2 * len(rows)
        assert all(ids[-len(forced) :] == forced and ids.count(forced[0]) == 1 for ids in prompts)

    def no_engine(*arguments: object) -> None:
        raise AssertionError("an engine was opened, but nothing is missing")

    before = contents(out)
    monkeypatch.setattr(direct, "open_engine", no_engine)
    monkeypatch.setattr(r1_eval_commands, "all_versions", lambda: {"torch": "another"})
    again = run(out, files, capsys, model=plain)
    assert again["benchmarks"] == value["benchmarks"]  # what drew them is still what drew them
    assert again["protocol"]["versions"] == {"torch": "another"}
    assert {path: text for path, text in contents(out).items() if path.name != "results.json"} == {
        path: text for path, text in before.items() if path.name != "results.json"
    }


class Replies:
    """An engine that answers from a list, by the seed of the request."""

    policy_version = 0
    texts = ("so</think>\\boxed{A}", "</think>Answer: B", "</think>**C**", "</think>I give up", "</think>(A) or not?")

    def sample(self, requests, settings, report=lambda finished: None):
        return [attempt(self.texts[request.seed % len(self.texts)]) for request in requests]


def test_cons_at_k_is_the_majority_counted_by_hand(tmp_path, files, capsys, monkeypatch):
    monkeypatch.setattr(direct, "open_engine", lambda *arguments: nullcontext(Replies()))
    summary = run(tmp_path / "out", files, capsys, "gpqa-d", k=7)["benchmarks"]["gpqa-d"]["summary"]
    chosen = direct.problem_set(str(tmp_path / "gpqa-d.jsonl"), "all", None, "choice")
    wins = []
    for group in direct.read_pool(tmp_path / "out" / "gpqa-d", chosen):
        letters = [
            {0: "A", 1: "B", 2: "C"}.get(Replies.texts.index(rollout.completion.text)) for rollout in group.rollouts
        ]
        most = max(letters.count(letter) for letter in "ABC")
        first = next(letter for letter in letters if letter and letters.count(letter) == most)  # ties: the first given
        wins.append(first == group.problem.answer)
    assert 0 < sum(wins) < len(wins) == 12
    assert summary["maj_at_k"] == pytest.approx(sum(wins) / 12)
    assert summary["accuracy"]["value"] != pytest.approx(summary["maj_at_k"])


def test_a_run_that_draws_more_notes_what_drew(tmp_path, files, capsys, monkeypatch):
    first = run(tmp_path / "out", files, capsys, "gpqa-d", k=1)
    monkeypatch.setattr(r1_eval_commands, "all_versions", lambda: {"torch": "another"})
    second = run(tmp_path / "out", files, capsys, "gpqa-d", k=2)
    assert [noted["versions"] for noted in second["benchmarks"]["gpqa-d"]["drawn_with"]] == [
        first["protocol"]["versions"],
        {"torch": "another"},
    ]


def test_what_is_not_measured_is_said():
    assert "livecodebench  not measured: give --file livecodebench=PATH" in results_text({}, ["livecodebench"])
