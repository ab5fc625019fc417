"""Whether two mathematical answers are equal, decided in a process that can be killed (`rl.tasks.math_worker` as main).

Expressions are parsed by math-verify 0.9.0's grammar (latex2sympy2_extended), never evaluated as code. Two expressions
are first compared by their values, to 30 digits: of numbers once, of functions at fixed points. Where that gives no
answer, math-verify's own comparison decides. Values come first because symbolic simplification is slow, may hang, and
calls 1/3 and 0.333333 equal; decimals are turned into fractions before anything else.

Requests: `{"gold": ..., "answer": ..., "question": ...}` -> `[gold can be read, equal]`;
`{"gold": ...}` -> `[gold can be read, null]`; `{"gold": ..., "text": ...}` -> what math-verify alone makes of a text.
"""

from __future__ import annotations

import logging
import re
import sys
from fractions import Fraction
from functools import cache, lru_cache
from hashlib import sha256
from typing import Any

from rl.tasks.math_equal import equal, readable
from rl.tasks.math_shape import Unreadable
from rl.worker_main import serve

DIGITS = 60  # computed with
AGREE = 30  # compared; the others are for what cancels
MANY = 500  # computed with for numbers that agree in the first: 1/6 is not 1/6 + 3^-701
POINTS = 4  # at which functions are compared; at half of them at least both must have a value
MEMORY = 2 * 2**30  # bytes of address space

_DECIMAL = re.compile(r"(?<![0-9A-Za-z_.])([0-9]+)\.([0-9]*)(?:\\overline\{([0-9]+)\}|\\dot\{([0-9])\})?")
_MIXED = re.compile(r"(?<![0-9}!)\\^_A-Za-z])([0-9]+)\s*\\frac\{([0-9]+)\}\{([0-9]+)\}")
# A letter with a power could have a subscript too, over which the parser's quick mode stumbles; in braces it cannot.
_POWER = re.compile(r"(?<![A-Za-z\\_^])((?!e)[A-Za-z])\s*\^")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_DEGREES = re.compile(r"([0-9]+(?:\.[0-9]+)?|\\frac\{[0-9]+\}\{[0-9]+\})\s*\^\{\\circ\}")


def exact(latex: str) -> str:
    """An expression that means the same and holds no decimals, mixed numbers or degrees; `x^{2}` becomes `{x}^{2}`.

    `exact("0.25x") == r"(\\frac{25}{100})x"`, `exact(r"3\\frac{1}{2}") == r"(3+\\frac{1}{2})"`,
    `exact(r"0.\\overline{3}") == r"(\\frac{3}{9})"`. Braces would make a set of one.
    """
    latex = _MIXED.sub(_mixed, latex)
    if _TRIGONOMETRY.search(latex):
        latex = _DEGREES.sub(lambda match: rf"(\frac{{{match.group(1)} \pi}}{{180}})", latex)
    else:
        latex = latex.replace(r"^{\circ}", "")
    return _POWER.sub(r"{\1}^", _DECIMAL.sub(_fraction, latex))


def _mixed(match: re.Match[str]) -> str:
    whole, top, bottom = match.groups()
    return rf"({whole}+\frac{{{top}}}{{{bottom}}})" if int(top) < int(bottom) else match.group()


def _fraction(match: re.Match[str]) -> str:
    whole, digits, recurring = match.group(1), match.group(2), match.group(3) or match.group(4)
    if recurring is None:
        value = (int(whole + digits), 10 ** len(digits))
    else:  # 0.1\overline{6}: (16 - 1) / 90
        value = (int(whole + digits + recurring) - int(whole + digits), 10 ** len(digits) * (10 ** len(recurring) - 1))
    return rf"(\frac{{{value[0]}}}{{{value[1]}}})"


class SympyAlgebra:
    """`rl.tasks.math_equal.Algebra` by math-verify's parser and sympy's numbers."""

    def readable(self, latex: str) -> bool:
        return parse(latex) is not None

    def same(self, first: str, second: str) -> bool:
        one, other = parse(first), parse(second)
        if one is None or other is None:
            return False
        found = same_values(one, other)
        return symbolically_same(one, other) if found is None else found

    def near(self, first: str, second: str, share: Fraction) -> bool:
        one, other = number(parse(first)), number(parse(second))
        return one is not None and other is not None and abs(one - other) <= float(share) * abs(one)

    def same_equation(self, first: tuple[str, str], second: tuple[str, str]) -> bool:
        one, other = (difference(*sides) for sides in (first, second))
        if one is None or other is None:
            return False
        ratios = []
        for point in range(POINTS):
            top, bottom = value_at(one, point), value_at(other, point)
            if top is None or bottom is None or abs(bottom) < 1e-12:
                continue
            ratios.append(top / bottom)
        return (
            len(ratios) >= POINTS // 2 and all(close(ratio, ratios[0]) for ratio in ratios) and abs(ratios[0]) > 1e-12
        )


@lru_cache(maxsize=512)
def parse(latex: str) -> Any:
    """A sympy expression, unevaluated; None for what the grammar does not know or what is nested too deeply for it.

    ANTLR's quick prediction mode comes first: where it succeeds its tree is that of the full mode, which takes ten
    times as long and is needed for one expression in fifty.
    """
    from antlr4.atn.PredictionMode import PredictionMode
    from sympy import Basic, I, Symbol

    parsed = None
    for mode in (PredictionMode.SLL, PredictionMode.LL):
        try:
            parsed = _grammar(mode)(is_real=True, convert_degrees=False).parse(exact(latex))
            break
        except MemoryError:
            raise
        except Exception:  # the grammar raises bare exceptions
            continue
    if not isinstance(parsed, Basic):
        return None
    units = {symbol: I for symbol in parsed.free_symbols if isinstance(symbol, Symbol) and symbol.name == "i"}
    return parsed.xreplace(units) if units else parsed


@cache
def _grammar(mode: Any) -> type:
    """math-verify's parser in one of ANTLR's prediction modes. Numbers are read as exact ones: the original hands their
    text to sympy's `Number`, which evaluates it."""
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
    from sympy import Integer, Rational

    class Grammar(_Latex2Sympy):
        def create_parser(self, latex_str: str) -> Any:
            parser = super().create_parser(latex_str)
            parser._interp.predictionMode = mode
            return parser

        def parse_number(self, text: str) -> Any:
            digits = text.replace(",", "")
            return Integer(digits) if digits.isdecimal() else Rational(digits)

    return Grammar


def difference(left: str, right: str) -> Any:
    one, other = parse(left), parse(right)
    if one is None or other is None:
        return None
    from sympy import Add, Expr, Mul

    if not (isinstance(one, Expr) and isinstance(other, Expr)):
        return None
    return Add(one, Mul(-1, other, evaluate=False), evaluate=False)


def number(expression: Any, digits: int = DIGITS) -> Any:
    """The value of an expression without variables, a complex number; None if it has none."""
    if expression is None or getattr(expression, "free_symbols", True):
        return None
    return value_at(expression, 0, digits)


def value_at(expression: Any, point: int, digits: int = DIGITS) -> Any:
    """The value with every variable set to the fixed number that its name and the point give it."""
    from sympy import Float

    chosen = {}
    for symbol in expression.free_symbols:
        digest = int.from_bytes(sha256(f"{symbol} {point}".encode()).digest()[:4], "big")
        # As a float, since an exact power of a fraction may be as long as it likes.
        chosen[symbol] = Float(1 + digest % 997, 2 * digits) / (-211 if point % 3 == 2 else 211)
    try:
        return _evaluated(expression.xreplace(chosen), digits)
    except (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError):
        return None  # an integral whose variable is now a number, say


def _evaluated(expression: Any, digits: int) -> Any:
    from mpmath import mp, mpc
    from sympy import Expr, N, nan, oo, zoo

    if not isinstance(expression, Expr):
        return None
    found = N(expression, digits)
    if not found.is_number or found.free_symbols:
        found = N(expression.doit(), digits)
    if found in (oo, -oo, zoo, nan) or found.has(oo, zoo, nan):
        return None
    real, imaginary = found.as_real_imag()
    if not (real.is_Float or real.is_Rational) or not (imaginary.is_Float or imaginary.is_Rational):
        return None
    mp.dps = digits
    return mpc(real._to_mpmath(mp.prec), imaginary._to_mpmath(mp.prec))


def close(one: Any, other: Any, digits: int = AGREE) -> bool:
    """Equal to that many digits of the larger one, so that 1/2004! is not 1/2006!. Where one is 0 exactly, what is left
    of the other after all digits have cancelled is 0 too."""
    from mpmath import mpf

    larger, least = max(abs(one), abs(other)), mpf(10) ** -digits
    if not one or not other:
        return larger <= least
    return abs(one - other) <= least * larger


def same_values(gold: Any, given: Any) -> bool | None:
    """Whether two expressions have the same values; None where they cannot be had.

    Points at which the reference has no real value are outside of its domain and do not count.
    """
    from sympy import Expr

    if not (isinstance(gold, Expr) and isinstance(given, Expr)):
        return None
    if not gold.free_symbols and not given.free_symbols:
        one, other = number(gold), number(given)
        if one is None or other is None or not close(one, other):
            return None if one is None or other is None else False
        one, other = number(gold, MANY), number(given, MANY)
        return one is None or other is None or close(one, other, MANY - DIGITS)
    compared = 0
    for point in range(POINTS):
        one, other = value_at(gold, point), value_at(given, point)
        if one is None or other is None or abs(one.imag) > 1e-20:
            continue
        if not close(one, other):
            return False
        compared += 1
    return True if compared >= POINTS // 2 else None


def symbolically_same(gold: Any, given: Any) -> bool:
    """What math-verify says of the two, in the order in which it is asked."""
    from math_verify import verify

    return bool(verify(gold, given, timeout_seconds=None))


def math_verify_alone(gold: str, text: str) -> list[bool | None]:
    """math-verify with its own extraction and comparison, for audits. Not its second extractor, for text without LaTeX:
    that one evaluates what the model wrote."""
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig()]
    expected = parse(f"${gold}$", extraction_config=config, parsing_timeout=0)
    if not expected:
        return [False, None]
    return [True, bool(verify(expected, parse(text, extraction_config=config, parsing_timeout=0), timeout_seconds=0))]


def answer(request: dict[str, str]) -> list[bool | None]:
    algebra = SympyAlgebra()
    gold = request["gold"]
    if "text" in request:
        return math_verify_alone(gold, request["text"])
    if "answer" not in request:
        return [readable(gold, algebra), None]
    try:
        return [True, equal(gold, request["answer"], request["question"], algebra)]
    except Unreadable:
        return [False, None]


# What ANTLR learns from these it need not learn from the first answers, at a tenth of a second each.
_USUAL = (
    r"\frac{1}{2}x^{2}+3x-\sqrt{2}", r"(x+1)(x-2)", r"\frac{\sqrt{3}+1}{2\pi}", r"2^{n}-1", r"-\frac{3}{4}",
    r"e^{2x}+\ln 3", r"\sin x \cdot \cos 2x", r"\binom{5}{2}", "5!", r"a_{1}+b", r"\log_{2} 8", "1+2i", r"\infty",
)  # fmt: skip


def main() -> None:
    logging.disable(logging.CRITICAL)  # math-verify warns that its own timeouts are off; ours are not
    import math_verify  # noqa: F401  the imports count as starting up, not as the first request
    import sympy  # noqa: F401

    for latex in _USUAL:
        value_at(parse(latex), 0)
    serve(answer, seconds=float(sys.argv[1]), memory=MEMORY)


if __name__ == "__main__":
    main()
