"""How answers are cleaned and read: spellings, numbers, units, lists, intervals, chains. Nothing is computed."""

import contextlib
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.tasks.math_equal import Asked, is_calculation, symbols
from rl.tasks.math_shape import Chain, Matrix, Relation, Several, Union, Unreadable, Value, Words, read
from rl.tasks.math_text import as_rational, clean, unit_name


@pytest.mark.parametrize(
    ("text", "spelling"),
    [
        (r"$\dfrac12$.", r"\frac{1}{2}"),
        ("½", r"\frac{1}{2}"),
        (r"\left( 1,\, 2 \right)", "( 1, 2 )"),
        ("x²", "x^{2}"),
        ("√2", r"\sqrt{2}"),
        ("√(x+1)", r"\sqrt{x+1}"),
        ("−3", "-3"),
        ("３", "3"),
        (r"1{,}234", "1234"),
        (r"12\,345", "12345"),
        ("90°", r"90^{\circ}"),
        (r"90^\circ", r"90^{\circ}"),
        (".5", "0.5"),
        (r"**$x$**", "x"),
        (r"x \leqslant 2", r"x \le 2"),
        ("x<=2", r"x\le 2"),
        (r"\frac1{2}", r"\frac{1}{2}"),
        ("2**3", "2^{3}"),
        (r"\operatorname{lcm}(4, 6)", r"\lcm (4, 6)"),
    ],
)
def test_one_spelling(text, spelling):
    assert clean(text) == spelling
    assert clean(spelling) == spelling


def test_numbers_are_exact():
    assert as_rational("0.50") == as_rational(r"\frac{1}{2}") == Fraction(1, 2)
    assert as_rational(r"3\frac{1}{2}") == Fraction(7, 2)
    assert as_rational(r"-\frac{3}{4}") == as_rational("-3/4") == Fraction(-3, 4)
    for text in (r"\frac{1}{0}", "1/0", "x", "1/2/3", r"2\frac{x}{3}", r"3\frac{5}{2}", "", "1" * 300):
        assert as_rational(text) is None


def test_units_have_one_name():
    assert unit_name("centimeters") == unit_name(" cm ") == "cm"
    assert unit_name("cm^2") == unit_name("square cm") == unit_name("sq. centimeters") == "cm2"
    assert unit_name("miles per hour") == "mi per h"
    assert unit_name("apples") == unit_name("apple") == "apple"


VALUES = {
    r"50\%": Value("50", percent=True),
    "50 percent": Value("50", percent=True),
    "101_2": Value("101", base="2"),
    r"101_{2}": Value("101", base="2"),
    r"90^\circ": Value("90", degrees=True),
    r"\sin 30^\circ": Value(r"\sin 30^{\circ}"),
    "5 cm": Value("5", unit="cm"),
    r"5\text{ cm}^2": Value("5", unit="cm2"),
    "5 m": Value("5", unit="m"),
    "5m": Value("5m"),
    r"\$5.00": Value("5.00", unit="$"),
    "5 dollars": Value("5", unit="$"),
    "1,234 apples": Value("1234", unit="apple"),
    r"20^\circ C": Value("20", unit="°C"),
    r"\text{(B)}": Value("B"),
    r"\textbf{(\text{B})}": Value("B"),
    "(5)": Value("5"),
    "2x+1": Value("2x+1"),
    r"|x|": Value("|x|"),
}


@pytest.mark.parametrize("text", VALUES)
def test_values(text):
    assert read(text) == VALUES[text]


def values(*texts):
    return tuple(map(Value, texts))


SHAPES = {
    "Paris": Words("paris"),
    r"\text{No solutions}": Words("no solution"),
    r"\varnothing": Words("no solution"),
    r"\{\}": Words("no solution"),
    "1, 2": Several(values("1", "2")),
    "2 and 1": Several(values("2", "1")),
    "B or C": Several(values("B", "C")),
    r"x=1 \text{ or } x=2": Several((Chain(("x",), values("1"), 1), Chain(("x",), values("2"), 1))),
    r"\pm 2": Several(values("2", "-2")),
    r"1, \pm 2": Several(values("1", "2", "-2")),
    r"\{1, \pm 2\}": Several(values("1", "2", "-2"), "{}"),
    r"\{1,2\}": Several(values("1", "2"), "{}"),
    "(1,2]": Several(values("1", "2"), "(]"),
    "(100,200)": Several(values("100", "200"), "()"),
    r"1<x\le 2": Several(values("1", "2"), "(]", of="x"),
    r"2 \ge x > 1": Several(values("1", "2"), "(]", of="x"),
    "x>3": Several(values("3", r"\infty"), "()", of="x"),
    "x>1 and x<3": Several(values("1", "3"), "()", of="x"),
    r"x\in[1,2]": Several(values("1", "2"), "[]"),
    r"(-\infty,2)\cup(3,\infty)": Union(
        (Several(values(r"-\infty", "2"), "()"), Several(values("3", r"\infty"), "()"))
    ),
    "x<2 or x>3": Union(
        (Several(values(r"-\infty", "2"), "()", of="x"), Several(values("3", r"\infty"), "()", of="x"))
    ),
    "6=5": Chain((), values("6", "5"), 2),
    r"5\approx 6": Chain((), values("5", "6"), 1),
    "f(2)=5": Chain(("f(2)",), values("5"), 1),
    "y=2x+1": Chain(("y",), values("2x+1"), 1),
    r"\text{Area} = 12\text{ cm}^2": Chain(("\u27e6Area\u27e7",), (Value("12", unit="cm2"),), 1),
    r"x \ne 2": Relation((r"\ne",), values("x", "2")),
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}": Matrix((values("1", "2"), values("3", "4"))),
}


@pytest.mark.parametrize("text", SHAPES)
def test_shapes(text):
    assert read(text) == SHAPES[text]


@pytest.mark.parametrize(
    "text",
    ["", "  ", "{5", "5}", "(1,2", "1,,2", "x=", "3 4", r"\text{about } 5", "[1,2,3)", "((" * 30 + "5" + "))" * 30],
)
def test_what_has_no_shape(text):
    with pytest.raises(Unreadable):
        read(text)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789xyzabc+-*/^_{}()[]\\,;=<>.% $|!&~", max_size=60))
def test_anything_is_read_or_refused(text):
    with contextlib.suppress(Unreadable):
        read(text)


@pytest.mark.parametrize(
    "text", ["{" * 500 + "}" * 500, "$" * 1000, "1," * 500, r"\text{" * 160, r"\frac{1}" * 120, "(" * 1000]
)
def test_hostile_texts_are_read_in_no_time(text):
    started = time.perf_counter()
    with contextlib.suppress(Unreadable):
        read(text)
    assert time.perf_counter() - started < 5


def test_symbols_keep_their_case_and_their_primes():
    assert symbols(r"\frac{X}{x'} + e^{\alpha}") == {"X", "x'", r"\alpha"}
    assert symbols(r"\sin 2\pi i") == frozenset()


def test_calculations():
    for latex in (
        "3+4",
        r"6 \cdot 7",
        "6*7",
        "2(3)",
        "(2)(3)",
        "2^{3-1}",
        r"84 \div 2",
        r"\sum_{i=1}^{3} i",
        r"\sqrt{9}+2",
    ):
        assert is_calculation(latex), latex
    for latex in (
        "2^{10}",
        "-3",
        r"\frac{84}{2}",
        r"1.2 \times 10^{3}",
        "10^{-2}",
        "5!",
        r"\sqrt{49}",
        r"\binom{5}{2}",
        "84/2",
    ):
        assert not is_calculation(latex), latex


def test_what_a_question_settles():
    asked = Asked.by("What percent of 50 is 10?")
    assert (asked.percent, asked.base, asked.interval) == (True, False, False)
    assert Asked.by("Write 5 in base $2$.").base and Asked.by("Write it in binary.").base
    assert not Asked.by("The base of the triangle is 5 cm.").base
    assert Asked.by("For which values of x is it positive?").interval
