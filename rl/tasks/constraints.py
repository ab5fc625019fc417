"""Instruction constraints: right if a response keeps to every one of them (TÜLU 3, 2411.15124, section 6, RLVR).

    {"question": "Name a fruit.", "constraints": [{"check": "word_count", "relation": "exactly", "count": 1}]}

The checks and their arguments are in rl/tasks/constraint_checks.py. A problem carries its constraints as JSON in
`Problem.spec` and has no reference answer. What is judged is the response: the text after the last `</think>`, or all
of it where there is none, without outer blanks. Wrong, besides a response that breaks a constraint, are a completion
that did not end by itself (TÜLU's non-stop), a thought that was never closed, a response without a word, and one that
is the question again. Constraints that cannot be read make the verdict undecided.

TÜLU 3 pays a verified response 10 and any other 0: that is the recipe key `reward_accuracy`, which the preset
`tulu3.1-rlvr` sets to 10. (TÜLU 3 is trained with PPO; the preset is TÜLU 3.1's GRPO.)

`read_constraint_problems` also reads allenai/RLVR-IFeval, whose verifier (open-instruct, if_functions.py) is laxer than
its instructions in places. Where the two differ we follow the instruction: keywords are whole words, not substrings; a
choice is one of the options, not any part of one; a title, a highlight or a placeholder holds something; a repeated
prompt is followed by an answer; sections are numbered, paragraph dividers stand on a line; "around" n is within a tenth
of n, and within 1, for words, sentences and capitals alike.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import Any

from rl.problems import MAX_LINE_BYTES, BadProblems
from rl.tasks.base import REFLECTION_WORDS, Task, one_by_one
from rl.tasks.constraint_arguments import Relation
from rl.tasks.constraint_checks import CHECKS, Check, Fault
from rl.tasks.constraint_text import folded, has_word, visible
from rl.tasks.extraction import final_part, no_answer_reason
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, TextPart, Verdict


class BadConstraints(ValueError):
    """Constraints that cannot be read; the message names the check, the argument and the likely spelling."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """One check with its arguments; as text `word_count(relation="at most", count=50)`."""

    check: Check
    arguments: Mapping[str, Any]

    def fault(self, response: str) -> Fault:
        """What is wrong with a response, "" if nothing is."""
        return self.check.fault(response, self.arguments)

    def __str__(self) -> str:
        given = ", ".join(
            f"{name}={json.dumps(value, ensure_ascii=False)[:60]}" for name, value in self.arguments.items()
        )
        return f"{self.check.name}({given})"


# --- reading constraints ----------------------------------------------------------------------------------------------


def parse_constraints(values: Any) -> tuple[Constraint, ...]:
    """The constraints of a list of `{"check": name, ...arguments}`, in order.

    Errors: BadConstraints, such as "word_count has no argument 'cuont'; did you mean 'count'?"; also for an empty list
    and for a constraint that every response keeps, with which everything would be right.
    """
    if not isinstance(values, list) or not values:
        raise BadConstraints(f"constraints must be a list with at least one, not {str(values)[:80]!r}")
    return tuple(_constraint(value) for value in values)


def _constraint(value: Any) -> Constraint:
    if not isinstance(value, dict) or not isinstance(value.get("check"), str):
        raise BadConstraints(f"a constraint is an object with the name of its check, not {str(value)[:80]!r}")
    name = value["check"]
    if name not in CHECKS:
        raise BadConstraints(f"there is no check {name[:80]!r}{_likely(name, CHECKS)}")
    check = CHECKS[name]
    given = {key: argument for key, argument in value.items() if key != "check"}
    for key in given:
        if key not in check.parsers:
            raise BadConstraints(f"{name} has no argument {key[:80]!r}{_likely(key, check.parsers)}")
    arguments = {}
    for key, parse in check.parsers.items():
        if key in given:
            try:
                arguments[key] = parse(given[key])
            except ValueError as error:
                raise BadConstraints(f"{name}: {key} {error}") from None
        elif key not in check.optional:
            raise BadConstraints(f"{name} needs {key}")
    if isinstance(relation := arguments.get("relation"), Relation):
        _require_a_choice(name, relation, arguments["count"])
    return Constraint(check, arguments)


def _require_a_choice(name: str, relation: Relation, count: int) -> None:
    if relation is Relation.AT_LEAST and count == 0:
        raise BadConstraints(f"{name}: every response has at least 0")
    if relation is Relation.LESS_THAN and count < 2:
        raise BadConstraints(f"{name}: less than {count} leaves only 0; that is 'exactly' 0")


def _likely(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(sorted(known)) or 'none'}"


def constraints_of(problem: Problem) -> tuple[Constraint, ...]:
    """The constraints in a problem's spec; BadConstraints if it cannot be read."""
    return parse_constraints(_json(problem.spec, "the spec"))


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise BadConstraints(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise BadConstraints(f"{what} is not JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)[:40]!r} stands there twice")
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


# --- judging ----------------------------------------------------------------------------------------------------------


def judge(problem: Problem, completion: Completion) -> Verdict:
    """Right if the response keeps to all constraints of the problem; the reason names the first that it breaks."""
    try:
        constraints = constraints_of(problem)
    except BadConstraints as error:
        return Verdict.undecided(JudgeFailure.UNPARSEABLE_GOLD, f"problem {problem.id}: {error}")
    response = final_part(completion.text)
    if response is None:
        return Verdict(Outcome.WRONG, no_answer_reason(completion))
    if completion.finish_reason is not FinishReason.STOP:
        return Verdict(Outcome.WRONG, f"did not end by itself (finish reason {completion.finish_reason})")
    seen = visible(response)
    if not has_word(seen):
        return Verdict(Outcome.WRONG, "a response without a word")
    if folded(seen) == folded(visible(problem.text)):
        return Verdict(Outcome.WRONG, "the question again")
    for constraint in constraints:
        if fault := constraint.fault(response):
            return Verdict(Outcome.WRONG, f"{constraint}: {fault}")
    return Verdict(Outcome.RIGHT)


def answer_of(text: str) -> str | None:
    """None: responses that keep to the same constraints are no votes for one answer."""
    return None


TASK = Task(
    name="constraints",
    judge=one_by_one(judge),
    answer_of=answer_of,
    verifier_version="constraints-1",
    reflection_words=REFLECTION_WORDS,
)

# --- reading problems -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _As:
    """What a function of RLVR-IFeval is here: a check, its arguments (our name: their name), and the fixed ones."""

    check: str
    arguments: Mapping[str, str]
    fixed: Mapping[str, Any]


def _as(check: str, arguments: Mapping[str, str] | None = None, **fixed: Any) -> _As:
    return _As(check, arguments or {}, fixed)


_BY_N = {"count": "N"}
_BY_QUANTIFIER = {"relation": "quantifier", "count": "N"}

# All functions of open-instruct's if_functions.py, with the parameters that they have there.
RLVR_FUNCTIONS: Mapping[str, tuple[_As, ...]] = {
    "verify_keywords": (_as("keywords_present", {"keywords": "keyword_list"}),),
    "verify_keyword_frequency": (_as("keyword_count", {"keyword": "word", **_BY_N}, relation="exactly"),),
    "validate_forbidden_words": (_as("keywords_absent", {"keywords": "forbidden_words"}),),
    "verify_letter_frequency": (
        _as("letter_count", {"letter": "letter", **_BY_N}, relation="exactly", ignore_case=False),
    ),
    "validate_response_language": (_as("language", {"code": "language"}),),
    "verify_paragraph_count": (_as("part_count", _BY_N, divider="* * *", relation="exactly"),),
    "validate_word_constraint": (_as("word_count", _BY_QUANTIFIER),),
    "verify_sentence_constraint": (_as("sentence_count", _BY_QUANTIFIER),),
    "validate_paragraphs": (
        _as("paragraph_count", _BY_N, relation="exactly"),
        _as("paragraph_first_word", {"paragraph": "i", "word": "first_word"}),
    ),
    "verify_postscript": (_as("postscript", {"marker": "postscript_marker"}),),
    "validate_placeholders": (_as("placeholder_count", _BY_N, relation="at least"),),
    "verify_bullet_points": (_as("bullet_count", _BY_N, relation="exactly"),),
    "validate_title": (_as("title"),),
    "validate_choice": (_as("one_of", {"options": "options"}),),
    "validate_highlighted_sections": (_as("highlight_count", _BY_N, relation="at least"),),
    "validate_sections": (_as("section_count", {"marker": "section_splitter", **_BY_N}, relation="exactly"),),
    "validate_json_format": (_as("json_only"),),
    "validate_repeat_prompt": (_as("repeats_prompt", {"prompt": "original_prompt"}),),
    "validate_two_responses": (_as("two_responses"),),
    "validate_uppercase": (_as("all_uppercase"),),
    "validate_lowercase": (_as("all_lowercase"),),
    "validate_frequency_capital_words": (_as("capital_word_count", _BY_QUANTIFIER),),
    "validate_end": (_as("ends_with", {"phrase": "end_phrase"}),),
    "validate_quotation": (_as("wrapped_in_quotes"),),
    "validate_no_commas": (_as("no_comma"),),
}


def rlvr_constraints(call: Any) -> list[dict[str, Any]]:
    """The constraints that a `ground_truth` of RLVR-IFeval asks for; its parameters that are null are not given.

    `{"func_name": "validate_word_constraint", "N": 50, "quantifier": "at least", "letter": None}` is
    `[{"check": "word_count", "relation": "at least", "count": 50}]`. BadConstraints for an unknown function, a missing
    parameter, or one that the function does not have.
    """
    if not isinstance(call, dict) or not isinstance(call.get("func_name"), str):
        raise BadConstraints(f"ground_truth must name a function (func_name), not {str(call)[:80]!r}")
    name = call["func_name"]
    if name not in RLVR_FUNCTIONS:
        raise BadConstraints(f"there is no function {name[:80]!r}{_likely(name, RLVR_FUNCTIONS)}")
    given = {key: value for key, value in call.items() if key != "func_name" and value is not None}
    known = {theirs for check in RLVR_FUNCTIONS[name] for theirs in check.arguments.values()}
    for key in sorted(known - given.keys()):
        raise BadConstraints(f"{name} needs {key}")
    for key in sorted(given.keys() - known):
        raise BadConstraints(f"{name} has no parameter {key[:80]!r}{_likely(key, known)}")
    return [
        {"check": check.check, **{ours: given[theirs] for ours, theirs in check.arguments.items()}, **check.fixed}
        for check in RLVR_FUNCTIONS[name]
    ]


def read_constraint_problems(path: str | Path) -> list[Problem]:
    """The problems of a JSONL file (.gz too): rows with `question` and `constraints`, or as RLVR-IFeval has them, with
    `messages` (one, the user's) and `ground_truth`. `id` and `level` are optional, other fields are ignored.

    Errors: BadProblems with the line and the reason of every row that is not such a problem.
    """
    problems: list[Problem] = []
    bad: list[tuple[int, str]] = []
    seen: dict[str, int] = {}
    line = 0
    try:
        with gzip.open(path, "rb") if str(path).endswith(".gz") else open(path, "rb") as file:
            for line, data in enumerate(file, start=1):
                try:
                    problem = _problem(data, f"{path}:{line}")
                    if problem.id in seen:
                        raise BadConstraints(f"the same id or question as line {seen[problem.id]}")
                except BadConstraints as reason:
                    bad.append((line, str(reason)))
                else:
                    seen[problem.id] = line
                    problems.append(problem)
    except OSError as error:
        raise BadProblems(path, [(0, f"cannot be read: {error.strerror or error}")]) from None
    if bad or not problems:
        raise BadProblems(path, bad or [(0, "is empty: expected one problem a line")])
    return problems


def _problem(data: bytes, source: str) -> Problem:
    if len(data) > MAX_LINE_BYTES:
        raise BadConstraints(f"the line is longer than {MAX_LINE_BYTES:,} bytes")
    try:
        row = _json(data.decode(), "the line")
    except UnicodeDecodeError as error:
        raise BadConstraints(f"is not UTF-8 (byte {error.start + 1} of the line)") from None
    if not isinstance(row, dict):
        raise BadConstraints("the line is no object with question and constraints")
    if "ground_truth" in row:
        question, constraints = _asked(row.get("messages")), row["ground_truth"]
        constraints = rlvr_constraints(
            _json(constraints, "ground_truth") if isinstance(constraints, str) else constraints
        )
    else:
        question, constraints = row.get("question"), row.get("constraints")
    if not isinstance(question, str) or not question.strip():
        raise BadConstraints(f"question must be a text, not {str(question)[:80]!r}")
    parse_constraints(constraints)
    identity, level = row.get("id"), row.get("level")
    if identity is not None and not (type(identity) in (str, int) and 0 < len(str(identity)) <= 200):
        raise BadConstraints(f"id must be a text of 1 to 200 characters, not {str(identity)[:80]!r}")
    if level is not None and not (type(level) is int and level >= 0):
        raise BadConstraints(f"level must be a whole number from 0, not {str(level)[:80]!r}")
    spec = json.dumps(constraints, ensure_ascii=False)
    if any("\ud800" <= character <= "\udfff" for character in f"{question}{spec}{identity}"):
        raise BadConstraints("has half of a surrogate pair, which is not a character")
    return Problem(
        id=sha256(question.encode()).hexdigest()[:16] if identity is None else str(identity),
        question=(TextPart(question),),
        answer="",
        source=source,
        level=level,
        spec=spec,
    )


def _asked(messages: Any) -> Any:
    if not isinstance(messages, Sequence) or len(messages) != 1 or not isinstance(messages[0], dict):
        raise BadConstraints("messages must be one message of the user")
    if messages[0].get("role") != "user":
        raise BadConstraints(f"messages must be one message of the user, not of {str(messages[0].get('role'))[:20]!r}")
    return messages[0].get("content")
