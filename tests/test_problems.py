"""Your own problems: every bad row is named with file and line, none is dropped, and answers keep their characters."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.problems import BadProblems, read_problems
from rl.tasks.exact import judge
from rl.types import Completion, FinishReason

GOOD_ROW = b'{"question": "1+1?", "answer": 2}'


def write(folder: Path, *rows: bytes, end: bytes = b"\n") -> Path:
    path = folder / "p.jsonl"
    path.write_bytes(b"".join(row + end for row in rows))
    return path


def refusal(path: Path) -> BadProblems:
    with pytest.raises(BadProblems) as caught:
        read_problems(path)
    return caught.value


def test_rows_become_problems_in_order(tmp_path: Path):
    path = write(
        tmp_path,
        b'{"question": "What is 6 x 7?", "answer": 42}',
        b'{"question": "2 + 2?", "answer": "4", "id": "warm-up", "level": 1, "source": "my notes"}',
        b'{"answer": 1.10, "question": "A price?", "id": 7, "level": null}',
    )
    first, second, third = read_problems(path)
    assert (first.text, first.answer, first.level, first.source) == ("What is 6 x 7?", "42", None, f"{path}:1")
    assert (second.id, second.level, second.answer) == ("warm-up", 1, "4")
    assert (third.id, third.answer) == ("7", "1.10")
    assert all(type(problem.answer) is str and type(problem.id) is str for problem in (first, second, third))


def test_an_id_that_is_not_given_is_a_hash_of_the_question(tmp_path: Path):
    rows = [b'{"question": "a", "answer": 1}', b'{"question": "b", "answer": 2}']
    ids = {problem.text: problem.id for problem in read_problems(write(tmp_path, *rows))}
    again = {problem.text: problem.id for problem in read_problems(write(tmp_path, *reversed(rows)))}
    assert ids == again
    assert ids["a"] == "ca978112ca1bbdca"  # sha256 of "a"


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ('"1.10"', "1.10"),
        ("1.10", "1.10"),
        ("1e400", "1e400"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("-0", "-0"),
        ('"2026-01-01 00:00:00"', "2026-01-01 00:00:00"),
        ('" 4 "', " 4 "),
        ('"\\u00e9\\u2028"', "é\u2028"),
        ('"caf\u00e9 \u2028 x"', "café \u2028 x"),
        ('"a\\tb"', "a\tb"),
        ('"12 / 2 = <<12/2=6>>6\\n#### 6"', "6"),
        ('"#### 1 #### 1,250"', "1,250"),
    ],
)
def test_answers_keep_their_characters(tmp_path: Path, answer: str, gold: str):
    row = f'{{"question": "q", "answer": {answer}}}'.encode()
    assert read_problems(write(tmp_path, row))[0].answer == gold


def test_line_ends(tmp_path: Path):
    rows = (GOOD_ROW, b'{"question": "b", "answer": 2}')
    assert len(read_problems(write(tmp_path, *rows, end=b"\r\n"))) == 2
    path = tmp_path / "no-end.jsonl"
    path.write_bytes(b"\n".join(rows))
    assert len(read_problems(path)) == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"question": "half a r', "is not JSON"),
        (b'{"question": "q", "answer": 1', "is not JSON"),
        (b'{"question": "q", "answer": 1}}', "is not JSON: Extra data"),
        (b'{"question": "q\x00", "answer": 1}', "NUL byte"),
        (b"\x00\x00\x00", "NUL byte"),
        (b'{"question": "q\\u0000", "answer": 1}', "question has a NUL character"),
        (b'{"question": "\\ud800", "answer": 1}', "question has half of a surrogate pair"),
        (b'{"question": "q", "answer": "\\udc00"}', "answer has half of a surrogate pair"),
        (b'{"question": "caf\xe9", "answer": 1}', "is not UTF-8 (byte 18 of the line)"),
        (b'{"question": "q", "question": "r", "answer": 1}', "has the key 'question' twice"),
        (b'{"question": "q", "answer": 1, "x": {"a": 1, "a": 2}}', "has the key 'a' twice"),
        (b'{"question": "q", "answer": NaN}', "has NaN"),
        (b'{"question": "q", "answer": -Infinity}', "has -Infinity"),
        (b'{"question": "q", "answer": 1, "x": NaN}', "has NaN"),
        (b'{"question": "q"}', "no answer (the fields are: question)"),
        (b'{"problem": "q", "answer": 1}', "no question (the fields are: problem, answer)"),
        (b"{}", "no question and no answer (the fields are: none)"),
        (b'{"question": "q", "answer": null}', "answer must be a text or a number, not null"),
        (b'{"question": "q", "answer": ""}', "answer is empty"),
        (b'{"question": "q", "answer": "  "}', "answer is empty"),
        (b'{"question": "q", "answer": "so\\n#### "}', "answer has nothing after ####"),
        (b'{"question": "", "answer": 1}', "question is empty"),
        (b'{"question": 5, "answer": 1}', "question must be a text, not the number 5"),
        (b'{"question": ["q"], "answer": 1}', "question must be a text, not a list"),
        (b'{"question": "q", "answer": true}', "answer must be a text or a number, not true"),
        (b'{"question": "q", "answer": [1]}', "answer must be a text or a number, not a list"),
        (b'{"question": "q", "answer": {"a": 1}}', "answer must be a text or a number, not an object"),
        (b'{"question": "q", "answer": 1, "id": ""}', "id is empty"),
        (b'{"question": "q", "answer": 1, "id": true}', "id must be a text or a number, not true"),
        (b'{"question": "q", "answer": 1, "id": "' + b"x" * 201 + b'"}', "id is longer than 200"),
        (
            b'{"question": "q", "answer": 1, "level": "hard"}',
            "level must be a whole number from 0, not the text 'hard'",
        ),
        (b'{"question": "q", "answer": 1, "level": -1}', "level must be a whole number from 0, not -1"),
        (b'{"question": "q", "answer": 1, "level": 1.5}', "level must be a whole number from 0, not 1.5"),
        (b'{"question": "q", "answer": 1, "level": true}', "level must be a whole number from 0, not true"),
        (b'["q", 1]', "is a list, not an object"),
        (b'"text"', "is the text 'text', not an object"),
        (b"42", "is the number 42, not an object"),
        (b"null", "is null, not an object"),
        (b"", "is an empty line"),
        (b"   ", "is an empty line"),
        (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, "is nested too deeply"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"question": "1+1?", "answer": 3}', "the same id or question as line 1"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path: Path, row: bytes, reason: str):
    path = write(tmp_path, GOOD_ROW, row, b'{"question": "last", "answer": 3}')
    error = refusal(path)
    assert error.rows[0][0] == 2
    assert len(error.rows) == 1
    assert f"{path}:2: " in str(error)
    assert reason in str(error)


def test_a_byte_order_mark_is_named(tmp_path: Path):
    assert "p.jsonl:1: starts with a byte-order mark" in str(refusal(write(tmp_path, b"\xef\xbb\xbf" + GOOD_ROW)))


def test_an_id_given_twice_names_the_first(tmp_path: Path):
    path = write(tmp_path, b'{"question": "a", "answer": 1, "id": "x"}', b'{"question": "b", "answer": 1, "id": "x"}')
    assert str(refusal(path)) == f"{path}:2: the same id or question as line 1 (id 'x')"


def test_a_line_of_fifty_megabytes_is_never_held(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    with open(path, "wb") as file:
        file.write(GOOD_ROW + b"\n")
        for _ in range(50):
            file.write(b"x" * 1_000_000)
        file.write(b"\n" + b'{"question": "b"}\n')
    error = refusal(path)
    assert [line for line, _ in error.rows] == [2, 3]
    assert "longer than 1,000,000 bytes" in str(error)


def test_files_that_hold_no_row(tmp_path: Path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert str(refusal(tmp_path / "empty.jsonl")).endswith("empty.jsonl: is empty: expected one problem a line")
    assert "No such file" in str(refusal(tmp_path / "nothing.jsonl"))
    assert "directory" in str(refusal(tmp_path))


def test_the_first_twenty_of_many_are_shown_and_all_are_counted(tmp_path: Path):
    error = refusal(write(tmp_path, *[b"bad"] * 30))
    assert len(error.rows) == 30
    lines = str(error).splitlines()
    assert len(lines) == 21
    assert lines[19].startswith(f"{tmp_path / 'p.jsonl'}:20: ")
    assert lines[20] == "and 10 more bad lines"


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.binary(max_size=30).filter(lambda row: b"\n" not in row), min_size=1, max_size=5))
def test_no_line_is_lost(rows: list[bytes], tmp_path_factory: pytest.TempPathFactory):
    """Every line of any file is either a problem or named."""
    path = write(tmp_path_factory.mktemp("fuzz"), GOOD_ROW, *rows)
    error = refusal(path)  # none of the random rows can be a problem: the shortest has 27 characters with both keys
    assert [line for line, _ in error.rows] == list(range(2, len(rows) + 2))


def gsm8k_rows() -> bytes:
    """Twenty rows in the form of GSM8K: a worked solution, then `#### number`."""
    rows = []
    for n in range(1, 21):
        total = n * 125 * (-1 if n == 7 else 1)
        shown = f"{total:,}"
        solution = f"Each box holds 125 pens.\n{n} boxes hold {n}*125=<<{n}*125={total}>>{shown} pens.\n#### {shown}"
        rows.append(json.dumps({"question": f"How many pens are in {n} boxes of 125?", "answer": solution}))
    return "\n".join(rows).encode() + b"\n"


def gsm8k_files(folder: Path) -> list[Path]:
    made = folder / "made.jsonl"
    made.write_bytes(gsm8k_rows())
    real = Path(os.environ.get("REASON_DATA", folder)) / "gsm8k-train.jsonl"
    return [made, *([real] if real.is_file() else [])]


def test_solutions_in_the_form_of_gsm8k(tmp_path: Path):
    for path in gsm8k_files(tmp_path):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        problems = read_problems(path)
        assert len(problems) == len(rows)
        for problem, row in zip(problems, rows, strict=True):
            assert problem.text == row["question"]
            assert row["answer"].endswith(f"#### {problem.answer}")
            for text in (
                row["answer"],
                f"So <think>hm</think>It is \\boxed{{{problem.answer}}}.",
                f"{problem.answer}.",
            ):
                assert judge(problem, Completion(text, (), (), FinishReason.STOP)).right
            wrong = f"\\boxed{{{problem.answer}1}}"
            assert not judge(problem, Completion(wrong, (), (), FinishReason.STOP)).right
