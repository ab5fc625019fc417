"""Text from outside on the page: problems, completions, reasons, names. It is shown, and nothing else happens to it.

Three layers. Here characters that hide or reorder text become their code, and long texts lose their middle. Jinja
escapes what stands in the HTML; what the page's script shows travels as JSON (`json_block`), in which no `<` is left,
and is set as text, never as HTML. The content security policy of the page runs no other script.
"""

from __future__ import annotations

import json
import re
import unicodedata
from functools import lru_cache
from typing import Any

from markupsafe import Markup

TEXT_LIMIT = 8_000  # characters of one completion on the page; the middle of a longer one is left out, and said so

_UNUSUAL = re.compile(r"[^\x20-\x7e\n\t]")  # what `visible` has to look at; a page holds megabytes that it has not to
# `<` ends a script or begins a comment in one, `>` and `&` do in older parsers; the last two end a line in JavaScript.
_JSON_ESCAPED = "<>&\u2028\u2029"


def visible(text: str) -> str:
    """Text with every character that hides or reorders text shown by its code.

    Control characters, marks of direction, zero-width characters and lone surrogates: NUL becomes ⟨U+0000⟩, a
    right-to-left override ⟨U+202E⟩. Newlines, tabs and the joiners that scripts need stay.
    """
    return _UNUSUAL.sub(_shown, text)


def _shown(found: re.Match[str]) -> str:
    return _by_code(found.group())


@lru_cache(maxsize=4096)
def _by_code(character: str) -> str:
    hides = unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"} and character not in "\u200c\u200d"
    return f"⟨U+{ord(character):04X}⟩" if hides else character


def shortened(text: str, limit: int = TEXT_LIMIT) -> str:
    """At most `limit` characters of a text, three quarters from its start; what is left out is counted in its place."""
    if len(text) <= limit:
        return text
    head, tail = limit * 3 // 4, limit // 4
    return f"{text[:head]}\n[… {len(text) - head - tail:,} characters left out …]\n{text[-tail:]}"


def readable(text: str, limit: int = TEXT_LIMIT) -> str:
    """What the page shows of a text from outside: `shortened`, then `visible`."""
    return visible(shortened(text, limit))


def typeset(text: str) -> str:
    """A minus sign for the hyphen before a number, for the page: "[-1.5%, 2%]" -> "[−1.5%, 2%]"."""
    return re.sub(r"(?<![\w.])-(?=\d)", "\u2212", text)


def json_text(value: Any) -> str:
    """Compact JSON that may stand in a `<script type="application/json">`: `{"a": "</script>"}` gives
    `{"a":"\\u003c/script\\u003e"}`. ValueError for NaN and infinities."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in _JSON_ESCAPED:  # five passes in C, a tenth of what `translate` takes
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def json_block(value: Any) -> Markup:
    """`json_text` for a template: nothing in it is left to escape."""
    return Markup(json_text(value))
