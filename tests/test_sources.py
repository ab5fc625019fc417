"""Data sets in the forms they are published in become problems; what is none is named."""

import gzip
import json
import os
from pathlib import Path

import pytest

from rl.problems import BadProblems, Columns, form_of, read_problems, read_solved_problems
from rl.sources import is_hub_source, read_source
from rl.tasks.mathematics import math_judge, require_golds


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PUBLISHED = {
    "gsm8k": ({"question": "Q?", "answer": "4 / 2 = <<4/2=2>>2\n#### 2"}, "2", None),
    "math": (
        {"problem": "Q?", "level": "Level 5", "type": "Algebra", "solution": r"So \boxed{\frac{1}{2}}."},
        r"\frac{1}{2}", 5,
    ),
    "math-500": (
        {"problem": "Q?", "solution": r"\boxed{3}", "answer": "p - q", "subject": "A", "level": 2, "unique_id": "t/1"},
        "p - q", 2,
    ),
    "aime-2024": ({"ID": "2024-I-1", "Problem": "Q?", "Solution": "s", "Answer": 204}, "204", None),
    "aime-qwen": ({"id": 60, "problem": "Q?", "solution": "s", "answer": "204"}, "204", None),
    "amc": ({"id": 0, "problem": "Q?", "answer": 142.0, "url": "u"}, "142.0", None),
    "mawps": ({"input": "Q?", "target": 43.0}, "43.0", None),
    "unknown level": ({"problem": "Q?", "level": "Level ?", "solution": r"\boxed{3}"}, "3", None),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_forms_are_recognised(tmp_path, name):
    row, answer, level = PUBLISHED[name]
    (problem,) = read_source(write(tmp_path / "p.jsonl", row))
    assert (problem.text, problem.answer, problem.level) == ("Q?", answer, level)
    assert problem.id == str(row.get("unique_id", row.get("ID", row.get("id", problem.id))))


def test_worked_solutions_come_along(tmp_path):
    path = write(
        tmp_path / "p.jsonl", PUBLISHED["math"][0], {"problem": "R?", "level": "Level 1", "solution": r"\boxed{1}"}
    )
    assert [solution for _, solution in read_solved_problems(path)] == [r"So \boxed{\frac{1}{2}}.", r"\boxed{1}"]


def test_columns_can_be_told(tmp_path):
    row = {"prompt": "Q?", "target": "7", "nr": "a", "hard": 3}
    path = write(tmp_path / "p.jsonl", row)
    with pytest.raises(BadProblems, match="no question and no answer .the fields are: prompt, target, nr, hard"):
        read_source(path)
    (problem,) = read_source(path, Columns("prompt", "target", id="nr", level="hard"))
    assert (problem.id, problem.answer, problem.level) == ("a", "7", 3)


def test_what_is_no_problem_is_named(tmp_path):
    path = write(
        tmp_path / "p.jsonl", {"problem": "Q?", "solution": r"\boxed{3}"}, {"problem": "R?", "solution": "so 3"}
    )
    with pytest.raises(BadProblems, match=r"p.jsonl:2: solution has no \\boxed answer"):
        read_source(path)
    with pytest.raises(BadProblems, match="neither a file of a known kind"):
        read_source("problems.txt")
    with pytest.raises(BadProblems, match="no such file"):
        read_source(tmp_path / "none.parquet")
    with pytest.raises(BadProblems, match="nobody/nothing:test: cannot be loaded"):
        read_source("nobody/nothing:test")  # offline


def test_tables_and_compressed_files_give_the_same_problems(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"problem": f"Q{n}?", "solution": "s", "answer": str(n)} for n in range(3)]
    plain = read_source(write(tmp_path / "p.jsonl", *rows))
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress((tmp_path / "p.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    (tmp_path / "p.csv").write_text("problem,solution,answer\n" + "".join(f"Q{n}?,s,{n}\n" for n in range(3)))
    for name in ("p.jsonl.gz", "p.parquet", "p.csv"):
        found = read_source(tmp_path / name)
        assert [(p.id, p.text, p.answer) for p in found] == [(p.id, p.text, p.answer) for p in plain], name


def test_a_spec_keeps_its_numbers(tmp_path):
    spec = {"tests": [{"input": [1, 2.5, "3"], "output": True}]}
    (problem,) = read_problems(write(tmp_path / "p.jsonl", {"question": "Q?", "answer": "x", "spec": spec}))
    assert json.loads(problem.spec) == spec
    with pytest.raises(BadProblems, match="spec must be an object or a list, not the number 3"):
        read_problems(write(tmp_path / "p.jsonl", {"question": "Q?", "answer": "x", "spec": 3}))


def test_hub_names():
    assert is_hub_source("openai/gsm8k/main:train") and is_hub_source("HuggingFaceH4/MATH-500:test")
    assert not is_hub_source("./problems.jsonl") and not is_hub_source("problems.jsonl") and not is_hub_source("/a/b")


def test_a_row_that_repeats_another_exactly_is_there_once(tmp_path):
    path = write(tmp_path / "p.jsonl", *[{"input": "Q?", "target": 4}] * 2, {"input": "R?", "target": 4})
    assert [problem.text for problem in read_source(path)] == ["Q?", "R?"]
    with pytest.raises(BadProblems, match="p.jsonl:2: the same id or question as line 1"):
        read_source(write(tmp_path / "p.jsonl", {"input": "Q?", "target": 4}, {"input": "Q?", "target": 5}))


def test_a_form_needs_its_columns():
    assert form_of({"problem": 1, "answer": 2, "unique_id": 3}) == Columns(
        "problem", "answer", "solution", id="unique_id"
    )
    assert form_of({"problem": 1, "answer": 2}) == Columns("problem", "answer", "solution")
    assert form_of({"text": 1}) is None


def test_references_that_cannot_be_read_are_refused_with_their_lines(tmp_path):
    rows = [
        {"question": f"Q{n}?", "answer": answer}
        for n, answer in enumerate(("3", r"\frac{1}{2}", r"\frac{1}{", "(1, 2"))
    ]
    path = write(tmp_path / "p.jsonl", *rows)
    judge = math_judge(workers=1)
    with pytest.raises(BadProblems) as refused:
        require_golds(judge, str(path), read_problems(path))
    judge.pool.close()
    assert [line for line, _ in refused.value.rows] == [3, 4]
    assert "cannot be read as mathematics" in str(refused.value)


MADE = [
    "3", "-7", "1,080", r"\frac{3}{4}", "0.25", r"2\sqrt{3}", "x^2+1", "(1, 2)", r"\{1, 2\}", "[0, 1)",
    "Paris", r"\text{(B)}",
    r"90^\circ", r"5\text{ cm}", r"50\%", "101_2", r"\pi", r"\begin{pmatrix}1\\2\end{pmatrix}", "x=5", r"\emptyset",
]  # fmt: skip


def golds():
    yield "made", MADE
    folder = os.environ.get("REASON_DATA")
    if folder:
        for path in sorted(Path(folder).glob("*.jsonl")):
            yield path.name, [problem.answer for problem in read_source(path)]


def test_every_reference_can_be_read_and_earns_one():
    """The positive control: the reference as the answer is right, in a box, for the made ones and all real ones."""
    from rl.tasks.mathematics import math_task
    from rl.types import Completion, FinishReason, Problem

    judge = math_judge(workers=1)
    task = math_task(judge)
    for name, answers in golds():
        assert judge.unreadable(answers) == [], name
        attempts = [
            (Problem(f"{n}", (), gold), Completion(rf"<think>hm</think> \boxed{{{gold}}}", (), (), FinishReason.STOP))
            for n, gold in enumerate(answers)
        ]
        assert all(verdict.right for verdict in task.judge(attempts)), name
    judge.pool.close()
