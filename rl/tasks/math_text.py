"""The text of a mathematical answer: one spelling for what is spelled in several ways, numbers, units.

Nothing here changes what a text means, and nothing is computed but exact fractions. Standard library only.
"""

from __future__ import annotations

import re
from fractions import Fraction

OPEN_TEXT, CLOSE_TEXT = "\u27e6", "\u27e7"  # where \text{...} began and ended


# --- cleaning --------------------------------------------------------------------------------------------------------

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SIGNS = {
    "\u2212": "-", "\u2013": "-", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ", "\u00d7": r"\times ", "\u00f7": r"\div ",
    "\u03c0": r"\pi ", "\u221e": r"\infty ",
    "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u2248": r"\approx ",
    "\u222a": r"\cup ", "\u2205": r"\emptyset ", "\u00b1": r"\pm ", "\u00b0": r"^{\circ}", "\u2208": r"\in ",
    "\u03b8": r"\theta ", "\u03b1": r"\alpha ", "\u03b2": r"\beta ", "\u03bb": r"\lambda ",
    "\u00bd": r"\frac{1}{2}", "\u00bc": r"\frac{1}{4}", "\u00be": r"\frac{3}{4}", "\u2153": r"\frac{1}{3}",
    "\u2154": r"\frac{2}{3}", "\u2044": "/", "\u2009": " ", "\u202f": " ", "\u00a0": " ", "\u3000": " ",
    "\u2019": "'", "\u2032": "'",
    "\uff08": "(", "\uff09": ")", "\uff0c": ",", "\uff1b": ";", "\uff1a": ":",
    "\uff1d": "=", "\uff0d": "-", "\uff0b": "+",
}  # fmt: skip
_FULLWIDTH = str.maketrans("０１２３４５６７８９", "0123456789")  # how Chinese and Japanese keyboards write digits

_REPLACEMENTS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), with_)
    for pattern, with_ in (
        (r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|middle)(?![A-Za-z])\s*", ""),
        (r"\\(?:displaystyle|textstyle|limits|nolimits|boxed)(?![A-Za-z])", ""),
        (r"(?<=[0-9])(?: ?\\, ?|\{,\})(?=[0-9]{3}(?![0-9]))", ""),
        (r"(?<=[0-9]),\s?\\!\s?(?=[0-9]{3}(?![0-9]))", ""),
        (r"(?<!\\)\\[!;:> ]|\\q?quad(?![A-Za-z])|~", " "),
        (r"\\,", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]?binom(?![A-Za-z])", r"\\binom"),
        (r"\\(?:leq|leqslant|leqq)(?![A-Za-z])", r"\\le"),
        (r"\\(?:geq|geqslant|geqq)(?![A-Za-z])", r"\\ge"),
        (r"\\neq(?![A-Za-z])", r"\\ne"),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"!=", r"\\ne "),
        (r"\\(?:lt)(?![A-Za-z])", "<"),
        (r"\\(?:gt)(?![A-Za-z])", ">"),
        (r"\\(?:approxeq|thickapprox|simeq)(?![A-Za-z])", r"\\approx"),
        (r"\\(?:varnothing)(?![A-Za-z])", r"\\emptyset"),
        (r"\\(?:lbrace)(?![A-Za-z])", r"\\{"),
        (r"\\(?:rbrace)(?![A-Za-z])", r"\\}"),
        (r"\\(?:vee|lor)(?![A-Za-z])", f" {OPEN_TEXT}or{CLOSE_TEXT} "),
        (r"\\(?:wedge|land)(?![A-Za-z])", f" {OPEN_TEXT}and{CLOSE_TEXT} "),
        (r"\\(?:degree)(?![A-Za-z])|\^\s*\\circ(?![A-Za-z])|\^\s*\{\s*\\circ\s*\}", r"^{\\circ}"),
        (r"\\(?:operatorname|mathop)\s*\{\s*([A-Za-z]+)\s*\}", r"\\\1 "),
        (r"\\(?:infinity|infin)(?![A-Za-z])", r"\\infty"),
        (r"\*\*", "^"),
        (r"(?<![\\A-Za-z])(sin|cos|tan|cot|sec|csc|log|ln|exp|pi)(?![A-Za-z])", r"\\\1 "),
    )
)
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|texttt|mbox|mathrm|mathbf|mathit|mathsf|bf|rm)\s*\{([^{}]*)\}"
)
_LETTER = re.compile(r"\\(?:mathrm|text|rm|mathit)\s*\{\s*([ei])\s*\}")
_WRAPS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"))


def clean(text: str) -> str:
    """One spelling for what can be spelled in several ways; nothing that changes the meaning.

    `clean(r"$\\dfrac12$.")` == `clean("½")` == `"\\\\frac{1}{2}"`
    """
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text)
    for sign, latex in _SIGNS.items():
        text = text.replace(sign, latex)
    text = re.sub("\u221a\\s*", r"\\sqrt ", text.translate(_FULLWIDTH))
    text = _unwrapped(re.sub(r"\s+", " ", text).strip())
    text = _LETTER.sub(r"\1", text)  # an upright e is the number
    for _ in range(4):  # \textbf{(\text{B})}
        text, found = _TEXT.subn(lambda m: f"{OPEN_TEXT}{m.group(1)}{CLOSE_TEXT}", text)
        text = re.sub(
            f"{OPEN_TEXT}([^{CLOSE_TEXT}]*){OPEN_TEXT}([^{CLOSE_TEXT}]*){CLOSE_TEXT}", rf"{OPEN_TEXT}\1\2", text
        )
        if not found:
            break
    for pattern, with_ in _REPLACEMENTS:
        text = pattern.sub(with_, text)
    text = re.sub(r"\\\$|\$", lambda m: "\\$", text)
    text = re.sub(r"\\%|%", r"\\%", text)
    text = _braced(text)
    text = re.sub(r"(?<![0-9])\.(?=[0-9])", "0.", text)
    text = re.sub(r"(?<![0-9./])([0-9]+) ([0-9]+)/([0-9]+)(?![0-9/.])", r"\1\\frac{\2}{\3}", text)  # 1 1/4
    return re.sub(r"\s+", " ", text).strip()


def _unwrapped(text: str) -> str:
    """Without the dollars and stars around it, and without a full stop after it."""
    before = None
    while text != before and len(text) <= 2_000:
        before = text
        text = re.sub(r"(?<!\\)[.,;:\s]+$", "", text) if not text.endswith("...") else text
        for left, right in _WRAPS:
            inner = text[len(left) : len(text) - len(right)]
            if (
                len(text) > len(left) + len(right)
                and text.startswith(left)
                and text.endswith(right)
                and left not in inner
            ):
                text = inner.strip()
    return text


def _braced(text: str) -> str:
    """`\\frac12`, `\\frac1{2}`, `\\sqrt2`, `x^2`, `\\log_28` with the braces that TeX would read."""
    text = re.sub(r"\\frac\s*([0-9A-Za-z])", r"\\frac{\1}", text)
    text = re.sub(r"(\\frac\{[^{}]*\})\s*([0-9A-Za-z]|\\[A-Za-z]+)(?![A-Za-z{])", r"\1{\2}", text)
    text = re.sub(r"\\sqrt\s*([0-9]+|[A-Za-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", text)
    text = re.sub(r"\^\s*(-?[0-9A-Za-z])", r"^{\1}", text)
    return re.sub(r"\\log_\s*([0-9])\s*", r"\\log_{\1} ", text)


# --- units -----------------------------------------------------------------------------------------------------------

UNITS: dict[str, str] = {
    "cm": "cm centimeter centimeters centimetre centimetres", "m": "m meter meters metre metres",
    "km": "km kilometer kilometers kilometre kilometres", "mm": "mm millimeter millimeters millimetre millimetres",
    "in": "in inch inches", "ft": "ft foot feet", "yd": "yd yard yards", "mi": "mi mile miles",
    "kg": "kg kilogram kilograms", "g": "g gram grams", "mg": "mg milligram milligrams", "lb": "lb lbs pound pounds",
    "oz": "oz ounce ounces", "s": "s sec secs second seconds", "min": "min mins minute minutes",
    "h": "h hr hrs hour hours", "day": "day days", "week": "week weeks", "month": "month months",
    "year": "year years yr yrs", "$": "$ dollar dollars usd", "cent": "cent cents \u00a2",
    "\u20ac": "\u20ac euro euros eur",
    "\u00a3": "\u00a3", "L": "l liter liters litre litres", "mL": "ml milliliter milliliters millilitre millilitres",
    "unit": "unit units", "rad": "rad radian radians", "degree": "degree degrees deg",
}  # fmt: skip
UNIT_OF: dict[str, str] = {spelling: unit for unit, spellings in UNITS.items() for spelling in spellings.split()}


def unit_name(text: str) -> str:
    """One name for one unit: `unit_name("centimeters") == unit_name(" cm ") == "cm"`; `cm^2`, `square cm` -> `cm2`;
    `mph`, `mi/h` -> `mi per h`."""
    text = text.strip().strip(".").lower()
    power = "2" if re.search(r"\b(?:square|sq)\b|2$", text) else "3" if re.search(r"\bcubic\b|3$", text) else ""
    text = re.sub(r"\bmph\b", "miles per hour", text.replace("/", " per "))
    found: list[str] = re.findall(r"[^\W\d_]+|[$\u00a2\u20ac\u00a3]", text)
    words = [UNIT_OF.get(word, word) for word in found]
    words = [word for word in words if word not in ("square", "sq", "cubic")]
    if words and words[-1] not in UNITS:
        words[-1] = words[-1].removesuffix("s")
    return " ".join(words) + power


# --- numbers ---------------------------------------------------------------------------------------------------------

_DECIMAL = r"[0-9]+(?:\.[0-9]+)?"
_FRACTION = re.compile(rf"([+-]?)\\frac\{{\s*([+-]?{_DECIMAL})\s*\}}\{{\s*([+-]?{_DECIMAL})\s*\}}")
_SLASH = re.compile(rf"([+-]?{_DECIMAL})(?:\s*/\s*([+-]?{_DECIMAL}))?")
_MIXED = re.compile(r"([+-]?)([0-9]+)\s*\\frac\{([0-9]+)\}\{([0-9]+)\}")


def as_rational(latex: str) -> Fraction | None:
    """An integer, decimal, fraction or mixed number as an exact fraction; None for anything else.

    `as_rational("0.50") == as_rational(r"\\frac{1}{2}") == Fraction(1, 2)`, `as_rational(r"3\\frac{1}{2}") == 7/2`
    """
    latex = latex.strip()
    if len(latex) > 200:
        return None
    if match := _SLASH.fullmatch(latex):
        top, bottom = Fraction(match.group(1)), Fraction(match.group(2) or 1)
        return top / bottom if bottom else None
    if match := _FRACTION.fullmatch(latex):
        bottom = Fraction(match.group(3))
        return Fraction(match.group(2)) / bottom * (-1 if match.group(1) == "-" else 1) if bottom else None
    if match := _MIXED.fullmatch(latex):
        sign, whole, top, bottom = match.groups()
        if int(bottom) and int(top) < int(bottom):
            return (int(whole) + Fraction(int(top), int(bottom))) * (-1 if sign == "-" else 1)
    return None
