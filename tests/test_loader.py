"""The strict YAML loader: what it reads, what it refuses, and at which line."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.loader import (
    MAX_BYTES,
    Document,
    Fault,
    RecipeError,
    dotted,
    likely,
    parse_recipe,
    parse_value,
    read_recipe_file,
)


def refusal(text: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    return caught.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("0", 0),
        ("-12", -12),
        ("+3", 3),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("''", ""),
        # What YAML 1.1 would have made something else of.
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("True", "True"),
        ("017", "017"),
        ("0x1F", "0x1F"),
        ("0o17", "0o17"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
        ("nan", "nan"),
        ("1.2.3", "1.2.3"),
        ("'16'", "16"),
        ('"1e-5"', "1e-5"),
        ("[1, no, 2.0]", [1, "no", 2.0]),
        ("{a: 1, b: [x]}", {"a": 1, "b": ["x"]}),
    ],
)
def test_scalars(text: str, value: object):
    read = parse_recipe(f"key: {text}\n", "r.yaml").values["key"]
    assert read == value
    assert type(read) is type(value)
    assert parse_value(text, "--set key") == value


def test_every_key_has_its_line():
    document = parse_recipe(
        "# a comment\nname: x\nstages:\n  a: {method: grpo,\n      steps: 3}\n  b:\n  - 1\n  - 2\n", "r.yaml"
    )
    assert document.lines == {
        ("name",): 2,
        ("stages",): 3,
        ("stages", "a"): 4,
        ("stages", "a", "method"): 4,
        ("stages", "a", "steps"): 5,
        ("stages", "b"): 6,
        ("stages", "b", 0): 7,
        ("stages", "b", 1): 8,
    }


def test_a_fault_without_a_line_of_its_own_takes_that_of_the_key_around_it():
    document = parse_recipe("name: x\nstages:\n  a:\n    steps: 3\n", "r.yaml")
    assert str(document.fault(("stages", "a", "model"), "required")) == "r.yaml:3: stages.a.model: required"
    document.options[("stages", "a", "steps")] = "--set a.steps=x"
    assert str(document.fault(("stages", "a", "steps"), "no")) == "--set a.steps=x: stages.a.steps: no"


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "duplicate key; first given on line 1"),
        ("a:\n  b: 1\n  b: 1\n", 3, "a.b: duplicate key"),
        ("a: 1\n\tb: 2\n", 2, "tab character"),
        ("a:\t1\n", 1, "tab character"),
        ("a: !!python/object/apply:os.system ['true']\n", 1, "tags"),
        ("a: 1\nb: !!int '3'\n", 2, "tags"),
        ("!x {a: 1}\n", 1, "tags"),
        ("a: .nan\n", 1, "not a finite number"),
        ("a: 1\nb: [1, -.inf]\n", 2, "b[1]: -.inf is not a finite number"),
        ("a: 1e999\n", 1, "not a finite number"),
        ("a: " + "9" * 5000 + "\n", 1, "too long"),
        ("1: a\n", 1, "must be a text, not 1"),
        ("true: a\n", 1, "must be a text, not true"),
        ("? [a, b]\n: c\n", 1, "must be a text, not a list"),
        ("? {a: b}\n: c\n", 1, "must be a text, not a list, a mapping"),
        ("null: c\n", 1, "must be a text, not empty"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", 3, "merge keys"),
        ("a: *nowhere\n", 1, "nowhere"),
        ("a: &x [*x]\n", 1, "names no anchor"),
        ("a: 1\n---\nb: 2\n", 2, "second document"),
        ("a: [1, 2\nb: 3\n", 2, "not valid YAML"),
        ("a: b: c\n", 1, "not valid YAML"),
        ("a: 'x\n", 2, "not valid YAML"),
        ("a: 1\n b: 2\n", 2, "not valid YAML"),
        ("- a\n- b\n", 1, "must be a mapping of keys, not a list"),
        ("just text\n", 1, "must be a mapping of keys, not the text"),
        ("42\n", 1, "must be a mapping of keys, not 42"),
        ("a: x\x00y\n", 1, "U+0000"),
        ("a: 1\nb: \x1b[31m\n", 2, "U+001B"),
        ("a: " + "[" * 50 + "]" * 50 + "\n", 1, "nested more than"),
        ("a: " + "{b: " * 50 + "1" + "}" * 50 + "\n", 1, "nested more than"),
        ("a: [" + "1, " * 20_000 + "1]\n", 1, "more than 10,000 values"),
        ("a: &x 1\nb: [" + "*x, " * 200 + "*x]\n", 2, "more than 100 aliases"),
    ],
)
def test_refusals_name_their_line(text: str, line: int, part: str):
    error = refusal(text)
    assert part in str(error)
    assert str(error).startswith(f"r.yaml:{line}: ")
    assert error.line == line
    assert error.path == "r.yaml"


def test_an_alias_bomb_is_stopped_while_it_is_read():
    text = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    for level, name in enumerate("bcdefghi"):
        text += f"{name}: &{name} [{', '.join(['*' + 'abcdefgh'[level]] * 10)}]\n"
    started = time.perf_counter()
    error = refusal(text)
    assert time.perf_counter() - started < 2
    assert "values" in str(error) or "aliases" in str(error)


def test_aliases_within_bounds_are_values():
    assert parse_recipe("a: &x {b: 1}\nc: *x\n", "r.yaml").values == {"a": {"b": 1}, "c": {"b": 1}}


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "~\n"])
def test_an_empty_file_is_named(text: str):
    assert str(refusal(text)) == "r.yaml: is empty"


def test_several_faults_are_listed_together_and_at_most_ten():
    error = refusal("".join(f"k{n}: .nan\n" for n in range(30)))
    assert len(error.faults) == 30
    lines = str(error).splitlines()
    assert lines[0] == "r.yaml:1: k0: .nan is not a finite number"
    assert lines[9] == "r.yaml:10: k9: .nan is not a finite number"
    assert lines[10:] == ["and 20 more"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a: \xff\xfe\n", "r.yaml:1: is not UTF-8 text"),
        (b"a: 1\nb: caf\xe9\n", "r.yaml:2: is not UTF-8 text"),
        (b"a: " + b"x" * MAX_BYTES, "larger than 1,000,000 bytes"),
    ],
)
def test_bytes_that_are_not_a_recipe(tmp_path: Path, data: bytes, message: str):
    (tmp_path / "r.yaml").write_bytes(data)
    with pytest.raises(RecipeError, match=message):
        read_recipe_file(tmp_path / "r.yaml")


def test_a_large_file_is_refused_in_time(tmp_path: Path):
    (tmp_path / "r.yaml").write_text("".join(f"key{n}: [1, 2, 3]\n" for n in range(45_000)))
    started = time.perf_counter()
    with pytest.raises(RecipeError, match="more than 10,000 values"):
        read_recipe_file(tmp_path / "r.yaml")
    assert time.perf_counter() - started < 3


def test_missing_files_and_folders(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"nothing\.yaml: there is no such file"):
        read_recipe_file(tmp_path / "nothing.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        read_recipe_file(tmp_path)


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path):
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb:\r\n  c: x\r\n")
    document = read_recipe_file(tmp_path / "r.yaml")
    assert document.values == {"a": 1, "b": {"c": "x"}}
    assert document.lines["b", "c"] == 3


def test_small_helpers():
    assert dotted(("stages", "a", "betas", 0)) == "stages.a.betas[0]"
    assert likely("group_sise", ["group_size", "steps"]) == "; did you mean group_size?"
    assert likely("zzz", ["group_size"]) == ""
    assert str(Fault("unknown key", "r.yaml", 12, "a.b")) == "r.yaml:12: a.b: unknown key"
    assert len(str(Fault("x" * 5000, "r.yaml", 1, "k"))) == 400


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab:- \n[]{},&*!'\"#|>?%@`\\1.e~\t<"), max_size=60))
def test_any_text_is_read_or_refused_in_words(text: str):
    try:
        document = parse_recipe(text, "r.yaml")
    except RecipeError as error:
        refused = str(error)
    else:
        assert isinstance(document, Document)
        assert all(isinstance(key, str) for key in document.values)
        return
    assert refused.startswith("r.yaml")
    assert len(refused.splitlines()) <= 11
