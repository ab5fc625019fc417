"""Words for what is wrong with a recipe, and the `--set key=value` overrides: used by recipes/schema.py alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from recipes.keys import MAPPING, PLAIN, StageKeys, key_descriptions
from recipes.loader import Document, Fault, Loc, RecipeError, describe, likely, parse_value
from recipes.methods import METHOD_KEYS


def listed(words: Iterable[str], most: int = 20) -> str:
    """`listed(["a", "b"]) == "a, b"`, "none" for nothing."""
    words = list(words)
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "") or "none"


def split_key(key: str) -> Loc:
    """`split_key("candidates[0]") == ("candidates", 0)`, `split_key("length.weight") == ("length", "weight")`"""
    return tuple(int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", key))


# --- overrides -------------------------------------------------------------------------------------------------------


def override(document: Document, text: str, reserved: Sequence[str]) -> Iterator[Fault]:
    """Write one `key=value` into the document; yields what is wrong with it. Key names are checked with the recipe."""
    option = f"--set {text if len(text) <= 80 else text[:77] + '...'}"
    key, equals, value_text = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        yield Fault("write it as key=value, such as teacher.steps=5", option)
        return
    stages = document.values.get("stages")
    names = list(stages) if isinstance(stages, dict) else []
    if parts[0] not in reserved:
        if parts[0] not in names:
            known = [*names, "seed", "problems", "sampling"]
            hint = likely(parts[0], known) or f"; the recipe has {listed(known)}"
            yield Fault(f"there is no stage or key {parts[0][:64]!r}{hint}", option)
            return
        if len(parts) == 1:
            yield Fault(f"{parts[0]} is a stage; name one of its keys, such as {parts[0]}.method=...", option)
            return
        parts = ["stages", *parts]
    elif parts[0] == "stages" and (len(parts) < 3 or parts[1] not in names):
        hint = likely(parts[1], names) if len(parts) > 1 else ""
        yield Fault(f"there is no such stage{hint or f'; the recipe has {listed(names)}'}", option)
        return
    try:
        value = parse_value(value_text, option)
    except RecipeError as error:
        yield from error.faults
        return
    target = document.values
    for depth, part in enumerate(parts[:-1]):
        inner = target.get(part)
        if inner is None:
            inner = target[part] = {}
            document.options[tuple(parts[: depth + 1])] = option
        if not isinstance(inner, dict):
            yield Fault(f"{'.'.join(parts[: depth + 1])} is {describe(inner)}, it has no keys", option)
            return
        target = inner
    target[parts[-1]] = value
    document.options[tuple(parts)] = option


# --- pydantic's errors in the words of a recipe ----------------------------------------------------------------------

_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
}
_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def explain(document: Document, error: Any, root: type[BaseModel]) -> Fault:
    """One error of pydantic as a fault of the document. `root` is the model of the whole document."""
    loc: Loc = tuple(error["loc"])
    if loc[:1] == ("stages",) and len(loc) > 2 and loc[2] in METHOD_KEYS:
        loc = loc[:2] + loc[3:]  # pydantic names the method, which is not a key
    loc = tuple(part for part in loc if part not in (PLAIN, MAPPING))
    last = loc[len(loc) - 1] if loc else ""
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return document.fault(loc, _unknown_key(_model_at(document, loc[:-1], root), str(last)))
    if kind == "missing":
        return document.fault(loc, _missing_key(_model_at(document, loc[:-1], root), last))
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return document.fault((*loc, "method"), _bad_method(given))
    if kind == "keys":
        (key, message), *others = context["found"]
        message += "".join(f"; {other}: {text}" for other, text in others)
        return document.fault((*loc, *split_key(key)), message)
    if kind in _KINDS:
        return document.fault(loc, f"must be {_KINDS[kind]}, not {describe(given)}{_type_hint(kind, given)}")
    if kind in _BOUNDS:
        word, key = _BOUNDS[kind]
        return document.fault(loc, f"must be {word} {context[key]}, not {describe(given)}")
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        hint = likely(given, allowed) if isinstance(given, str) else ""
        if len(allowed) > 12:  # the hint first: a long message is cut at its end
            known = listed(allowed, len(allowed))
            return document.fault(loc, f"cannot be {describe(given)}{hint or '.'} It must be one of {known}")
        return document.fault(loc, f"must be {' or '.join(allowed)}, not {describe(given)}{hint}")
    if kind == "string_pattern_mismatch":
        loc = loc[:-1] if loc[-1:] == ("[key]",) else loc
        signs = "-, _ and ." if "." in context["pattern"] else "- and _"
        return document.fault(loc, f"a name is letters, digits, {signs}, at most 64, and starts with a letter")
    if kind in ("too_short", "string_too_short"):
        return document.fault(loc, "must not be empty")
    return document.fault(loc, str(error["msg"])[:200])


def _type_hint(kind: str, given: Any) -> str:
    if isinstance(given, str) and kind in ("int_type", "float_type") and re.fullmatch(r"[-+]?[1-9][0-9.e-]*", given):
        return "; remove the quotes"
    if isinstance(given, str) and kind == "bool_type" and given.lower() in ("yes", "on", "true"):
        return "; write true"
    if isinstance(given, str) and kind == "bool_type" and given.lower() in ("no", "off", "false"):
        return "; write false"
    if kind == "string_type" and isinstance(given, bool | int | float):
        return "; put it in quotes"
    return ""


def _model_at(document: Document, loc: Loc, root: type[BaseModel]) -> type[BaseModel] | None:
    """The pydantic model that holds the keys at a place of the document."""
    model = root
    values: Any = document.values
    index = 0
    while index < len(loc):
        values = values.get(loc[index]) if isinstance(values, dict) else None
        if model is root and loc[index] == "stages" and len(loc) > 1:
            values = values.get(loc[1]) if isinstance(values, dict) else None
            method = values.get("method") if isinstance(values, dict) else None
            if method not in METHOD_KEYS:
                return None
            model, index = METHOD_KEYS[method], 2
            continue
        annotation = model.model_fields[str(loc[index])].annotation if loc[index] in model.model_fields else None
        models = [kind for kind in _types_in(annotation) if issubclass(kind, BaseModel)]
        if not models:
            return None
        model, index = models[0], index + 1
    return model


def _types_in(annotation: Any) -> Iterator[type]:
    """The classes that an annotation is made of: `Annotated[int, ...] | Keys | None` has int, Keys and NoneType."""
    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    for part in get_args(annotation):
        yield from _types_in(part)


def _unknown_key(model: type[BaseModel] | None, key: str) -> str:
    if model is None:
        return "unknown key"
    known = list(model.model_fields)
    of = f" of method {get_args(model.model_fields['method'].annotation)[0]}" if issubclass(model, StageKeys) else ""
    return f"unknown key{of}{likely(key, known) or f'; its keys are {listed(known, 30)}'}"


def _missing_key(model: type[BaseModel] | None, key: str | int) -> str:
    if isinstance(key, int):
        return "the list is too short"
    words = key_descriptions(model).get(key) if model is not None else None
    about = f" ({words.split('. ')[0].rstrip('.')})" if words else ""
    return f"required key is missing{about}"


def _bad_method(given: Any) -> str:
    if not isinstance(given, dict):
        return f"must be a mapping of keys, not {describe(given)}"
    if "method" not in given:
        return f"required key is missing; methods are {listed(METHOD_KEYS)}"
    word = given["method"]
    hint = likely(word, METHOD_KEYS) if isinstance(word, str) else ""
    return f"there is no method {describe(word)}{hint or f'; methods are {listed(METHOD_KEYS)}'}"
