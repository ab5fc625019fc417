"""Whether an answer equals a reference answer: the rules that a computer algebra system does not know.

What equals what:

* Exact values are equal in whatever exact form they are written; a decimal is an exact number (0.333 is not 1/3).
* `a = b`: sides that only name the rest (`x`, `f(2)`) do not count, every other side must equal the reference, so
  `6 = 5` is no 5; nor does an expression in variables that the question asks for (`m + n = 113`). `a ≈ b`: what stands
  first is the answer, unless the reference is a decimal; what follows is near it.
* A value, no calculation: for a plain number as the reference `3+4` and `6 \\cdot 7` are not answers; powers, roots,
  fractions, factorials are. An answer that only repeats a part of the question is none either.
* `p%` is p/100; it also equals p where the question asks for a percentage. Degrees, money and units may be missing on
  one side; two different units are different. A base must be the same, and be there unless the question names it.
* Lists and sets have no order, tuples, intervals and matrices have; there are as many parts as in the reference.
* Words are equal whatever their case, single letters are not.

Standard library only: what is left to compute is asked of an `Algebra` (rl/tasks/math_worker.py has the real one).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from rl.tasks.math_shape import Chain, Matrix, Relation, Several, Shape, Union, Unreadable, Value, Words, read
from rl.tasks.math_text import CLOSE_TEXT, OPEN_TEXT, as_rational, clean

MAX_ANSWER = 1_000  # characters; a longer one is no answer
NEAR = Fraction(1, 100)  # how far off what follows a ≈ may be


class Algebra(Protocol):
    """Questions about single expressions, in LaTeX without units and words."""

    def readable(self, latex: str) -> bool: ...

    def same(self, first: str, second: str) -> bool:
        """Equal as numbers, or as functions of their variables."""
        ...

    def near(self, first: str, second: str, share: Fraction) -> bool:
        """Whether the second number is within `share` of the first."""
        ...

    def same_equation(self, first: tuple[str, str], second: tuple[str, str]) -> bool:
        """Whether left − right of both are the same but for a constant factor that is not 0."""
        ...


@dataclass(frozen=True, slots=True)
class Asked:
    """What the question settles.

    Example: `Asked.by("What percent of 50 is 10?")` -> percent True, base False, interval False.
    """

    text: str  # cleaned, without blanks; to find echoes
    percent: bool  # it asks for a percentage
    base: bool  # it names a number base
    interval: bool  # it speaks of an interval or an inequality

    @classmethod
    def by(cls, question: str) -> Asked:
        number = r"(?:\d+|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|sixteen|b)"
        base = rf"\bbase[\s-]*\$?_?\{{?{number}\b|\bbinary\b|\boctal\b|\bhexadecimal\b"
        interval = r"\b(?:interval|inequalit|range|domain|solve|solution set|values of|for which|set of all)"
        return cls(
            text=_packed(clean(question[:20_000])),
            percent=re.search(r"%|\bpercent", _last_sentence(question), re.IGNORECASE) is not None,
            base=re.search(base, question, re.IGNORECASE) is not None,
            interval=re.search(interval, question, re.IGNORECASE) is not None,
        )


def _last_sentence(question: str) -> str:
    """Where a question says what it wants: "He pays 20 % tax. How much is left?" asks for no percentage."""
    return re.split(r"(?<=[.?!])\s+", question.strip())[-1]


def equal(gold: str, answer: str, question: str, algebra: Algebra) -> bool:
    """Whether `answer` equals the reference `gold` under the rules above.

    Errors: Unreadable if the reference itself has no shape; for an answer without one this is False.
    """
    expected = read(gold)
    if not answer.strip() or len(answer) > MAX_ANSWER:
        return False
    if _packed(clean(answer)) == _packed(clean(gold)):
        return True
    try:
        given = read(answer)
    except Unreadable:
        return False
    asked = Asked.by(question)
    if isinstance(expected, Value) and as_rational(expected.latex) is not None and not _states_a_value(given):
        return False
    if not _equal(expected, given, asked, algebra):
        return False
    return not _echoes(given, answer, asked)


def readable(gold: str, algebra: Algebra) -> bool:
    """Whether a reference answer can be compared with anything: it has a shape, and every leaf of it can be parsed."""
    try:
        shape = read(gold)
    except Unreadable:
        return False
    return all(_is_text(leaf.latex) or algebra.readable(leaf.latex) for leaf in _leaves(shape))


def _leaves(shape: Shape) -> list[Value]:
    match shape:
        case Value():
            return [shape]
        case Words():
            return []
        case Several(items=parts) | Union(parts=parts) | Chain(sides=parts) | Relation(sides=parts):
            return [leaf for part in parts for leaf in _leaves(part)]
        case Matrix(rows=rows):
            return [leaf for row in rows for cell in row for leaf in _leaves(cell)]


def _is_text(latex: str) -> bool:
    """A time, a ratio, a set by its property: compared as text, never computed."""
    return re.fullmatch(r"[0-9]+(?:\s*:\s*[0-9]+)+(?:\s*[ap]\.?m\.?)?", latex, re.IGNORECASE) is not None or (
        latex.startswith(r"\{")
    )


# --- shapes ----------------------------------------------------------------------------------------------------------


def _equal(gold: Shape, given: Shape, asked: Asked, algebra: Algebra) -> bool:
    if isinstance(gold, Chain) or isinstance(given, Chain):
        return _equal_chains(gold, given, asked, algebra)
    match gold, given:
        case Words(), Words():
            return gold.text == given.text
        case Value(), Value():
            return _equal_values(gold, given, asked, algebra)
        case Several(), Several():
            return _equal_lists(gold, given, asked, algebra)
        case Union(), Union():
            return _matched(gold.parts, given.parts, asked, algebra)
        case Relation(), Relation():
            same = gold.operators == given.operators and len(gold.sides) == len(given.sides)
            return same and _each(gold.sides, given.sides, asked, algebra)
        case Matrix(), Matrix():
            if [len(row) for row in gold.rows] != [len(row) for row in given.rows]:
                return False
            return all(_each(one, other, asked, algebra) for one, other in zip(gold.rows, given.rows, strict=True))
    return False


def _each(golds: Sequence[Shape], given: Sequence[Shape], asked: Asked, algebra: Algebra) -> bool:
    return len(golds) == len(given) and all(
        _equal(one, other, asked, algebra) for one, other in zip(golds, given, strict=True)
    )


def _matched(golds: Sequence[Shape], given: Sequence[Shape], asked: Asked, algebra: Algebra) -> bool:
    """Each of one side has its own equal on the other, in any order."""
    if len(golds) != len(given):
        return False
    left = list(given)
    for gold in golds:
        found = next((i for i, other in enumerate(left) if _equal(gold, other, asked, algebra)), None)
        if found is None:
            return False
        del left[found]
    return True


def _equal_lists(gold: Several, given: Several, asked: Asked, algebra: Algebra) -> bool:
    if bool(gold.of) != bool(given.of) and not asked.interval:
        return False  # (1, 2) is a point as well as an interval
    if gold.of and given.of and gold.of != given.of:
        return False
    if not gold.ordered and not given.ordered:
        return _matched(gold.items, given.items, asked, algebra)
    tuples = ("", "()")
    if gold.brackets != given.brackets and not (gold.brackets in tuples and given.brackets in tuples):
        return False
    return _each(gold.items, given.items, asked, algebra)


def _equal_chains(gold: Shape, given: Shape, asked: Asked, algebra: Algebra) -> bool:
    if isinstance(gold, Chain) and len(gold.sides) == 1:  # y = 2x + 1, so 2x + 1
        if isinstance(given, Chain) and not _names_fit(gold.names, given.names):
            return False
        if isinstance(given, Chain) and len(given.sides) > 1 and len(gold.names) == 1:
            named = Chain((), (Value(gold.names[0]), *gold.sides), 2)
            if _equal_equations(named, given, algebra):
                return True
        return _equal(gold.sides[0], given, asked, algebra)
    if isinstance(gold, Chain):
        if not isinstance(given, Chain):
            return False
        if len(given.sides) == 1 and len(given.names) == 1:
            given = Chain((), (Value(given.names[0]), *given.sides), 2)
        return _equal_equations(gold, given, algebra)
    assert isinstance(given, Chain)
    return _equal_to_chain(gold, given, asked, algebra)


def _names_fit(gold: tuple[str, ...], given: tuple[str, ...]) -> bool:
    """`x = 5` is not `y = 5`; `f(x) = 5` may be `y = 5`, and words name anything."""
    letters = [name for name in (*gold, *given) if re.fullmatch(r"[A-Za-z]", name)]
    return not gold or not given or len(letters) < 2 or bool(set(gold) & set(given))


def _equal_equations(gold: Chain, given: Chain, algebra: Algebra) -> bool:
    sides = []
    for chain in (gold, given):
        if len(chain.sides) != 2 or chain.names or chain.exact != 2:
            return False
        pair = [side.latex for side in chain.sides if isinstance(side, Value)]
        if len(pair) != 2:
            return False
        sides.append((pair[0], pair[1]))
    return algebra.same_equation(sides[0], sides[1])


def _equal_to_chain(gold: Shape, given: Chain, asked: Asked, algebra: Algebra) -> bool:
    """Every side of the chain is the answer again; see the rules for ≈."""
    exact, rounded = given.sides[: given.exact], given.sides[given.exact :]
    if len(exact) > 1:  # "m + n = 113", where m + n is what was asked for
        exact = tuple(side for side in exact if not _asked_for(side, asked)) or exact
    if all(_equal(gold, side, asked, algebra) for side in exact):
        return all(_near(gold, side, algebra) for side in rounded)
    decimal = isinstance(gold, Value) and re.fullmatch(r"-?[0-9]+\.[0-9]+", gold.latex) is not None
    if not decimal or not any(_equal(gold, side, asked, algebra) for side in rounded):
        return False
    return all(_near(gold, side, algebra) for side in given.sides)


def _asked_for(side: Shape, asked: Asked) -> bool:
    return isinstance(side, Value) and bool(symbols(side.latex)) and _packed(side.latex) in asked.text


def _near(gold: Shape, given: Shape, algebra: Algebra) -> bool:
    return isinstance(gold, Value) and isinstance(given, Value) and algebra.near(gold.latex, given.latex, NEAR)


# --- values ----------------------------------------------------------------------------------------------------------


def _equal_values(gold: Value, given: Value, asked: Asked, algebra: Algebra) -> bool:
    if gold.unit and given.unit and gold.unit != given.unit:
        return False
    if gold.base != given.base:
        if (gold.base and given.base) or not asked.base:
            return False
        return gold.latex.lstrip("0") == given.latex.lstrip("0")
    if gold.base:
        return gold.latex.lstrip("0") == given.latex.lstrip("0")
    if gold.percent != given.percent:
        return (asked.percent and _same(gold.latex, given.latex, algebra)) or _same(
            _hundredth(gold), _hundredth(given), algebra
        )
    if gold.degrees != given.degrees and (gold.unit or given.unit or gold.percent):
        return False
    return _same(gold.latex, given.latex, algebra)


def _hundredth(value: Value) -> str:
    return rf"\frac{{{value.latex}}}{{100}}" if value.percent else value.latex


def _same(first: str, second: str, algebra: Algebra) -> bool:
    if _packed(first) == _packed(second):
        return True
    if _is_text(first) or _is_text(second):
        return False
    numbers = as_rational(first), as_rational(second)
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0] == numbers[1]
    if first.startswith(r"\frac{") and (numbers[0] is None) != (numbers[1] is None):
        pass  # a fraction of something else: left to the algebra
    return symbols(first) == symbols(second) and algebra.same(first, second)


_NO_SYMBOLS = frozenset(("e", "i", "d"))  # Euler's number, the imaginary unit, the d of an integral
_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau phi varphi chi psi omega "
    "Gamma Delta Theta Lambda Sigma Phi Psi Omega"
)
_SYMBOL = re.compile(r"\\(?:" + "|".join(_GREEK.split(" ")) + r")(?![A-Za-z])'*|\\[A-Za-z]+|[A-Za-z]'*")


def symbols(latex: str) -> frozenset[str]:
    """The names in an expression. A parser that lowers its input takes `X` for `x` and `x'` for `x`; we do not.

    `symbols(r"\\\\frac{X}{x'} + e^{\\\\alpha}") == {"X", "x'", "\\\\alpha"}`
    """
    found = (match.group() for match in _SYMBOL.finditer(latex))
    greek = frozenset(_GREEK.split(" "))
    return frozenset(
        name for name in found if name not in _NO_SYMBOLS and (name[0] != "\\" or name[1:].rstrip("'") in greek)
    )


# --- what is no answer -----------------------------------------------------------------------------------------------

# A sum or difference of numbers, a product or quotient of two whole ones: `3+4`, `2^{3-1}`, `6 \cdot 7`, `2(3)`.
_CALCULATION = re.compile(
    r"(?<=[0-9})!i])\s*[+-]\s*(?=[0-9\\({])"
    r"|(?<![0-9.^{])[0-9]+\s*(?:\\cdot|\\times|\\div|\*)\s*-?(?!10\s*\^)[0-9]+(?![0-9]*\s*\^)"
    r"|\\div(?![A-Za-z])|[0-9)]\s*\(\s*-?[0-9]|\)\s*[0-9]"
    r"|\\(?:sum|prod|int|lim)(?![A-Za-z])"
)


def is_calculation(latex: str) -> bool:
    """Whether an expression leaves work to be done, as far as plain numbers go.

    True for `3+4`, `6 \\\\cdot 7`, `2(3)`; False for `2^{10}`, `-3`, `\\\\frac{84}{2}`, `1.2 \\\\times 10^{3}`.
    """
    return as_rational(latex) is None and _CALCULATION.search(latex) is not None


def _states_a_value(given: Shape) -> bool:
    """False for an answer all of whose sides are calculations; of a chain one side must be the result."""
    if isinstance(given, Value):
        return not is_calculation(given.latex)
    if isinstance(given, Chain):
        return any(_states_a_value(side) for side in given.sides)
    return True


def _echoes(given: Shape, answer: str, asked: Asked) -> bool:
    """Whether an answer only repeats an expression of the question. Its plain numbers may be the answer; a calculation
    that it states may not."""
    if isinstance(given, Value) and as_rational(given.latex) is not None:
        return False
    text = _packed(clean(answer))
    return len(text) >= 2 and re.search(r"[\^+*/\\!-]", text) is not None and text in asked.text


def _packed(text: str) -> str:
    return re.sub(rf"[\s{OPEN_TEXT}{CLOSE_TEXT}]", "", text)
