"""The card of a set of traces: what is in it, what was left out and why, from whom it is and under which terms.

Written beside `traces.jsonl` by every stage that selects or mixes traces, as `data_card.json` for tools and
`data_card.md` for people, in the spirit of Datasheets for Datasets (Gebru et al., 1803.09010). Every figure is counted
from the rows themselves: kept and dropped rows must be the rows of the pool, or there is no card.

Licences are what the recipe says of a source, word for word; a source of which it says nothing has none here, which
means that nobody has looked.

Line: `reason distill RECIPE`, a stage with `method: traces` or `method: mix`.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from distill.traces import Trace, TraceSelection
from rl.decontamination import EvaluationIndex
from rl.runs import write_file, write_json
from rl.types import Problem

CARD_JSON, CARD_TEXT = "data_card.json", "data_card.md"
EXAMPLES = 5  # of leaked problems
MAX_SHOWN = 200  # characters of an example


def data_card(
    title: str,
    selection: TraceSelection,
    *,
    pool: int,
    teachers: Mapping[str, Mapping[str, Any]],
    seed: int,
    licences: Mapping[str, str],
    decontamination: Mapping[str, Any] | None = None,
    parts: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The card as JSON values.

    `pool`: rows that there were, counted apart from the selection. `teachers`: name -> what it was (a fingerprint, how
    it was sampled). `decontamination`: as `leak_evidence` gives it. `parts`: of a mix, name -> rows taken and offered.

    Example: 5 rows in the pool, 3 kept of 10, 20 and 60 tokens, {"wrong": 2} dropped -> "rows" 3, "tokens"
    {"mean": 30.0, "median": 20, "p95": 60, "sum": 90, "longest": 60}.

    Errors: RuntimeError where kept and dropped are not the pool; ValueError for a licence of no source here.
    """
    if selection.kept + sum(selection.dropped.values()) != pool:
        raise RuntimeError(
            f"{title}: {selection.kept} rows kept and {sum(selection.dropped.values())} dropped are not the {pool} "
            "rows of the pool: a drop was not counted"
        )
    sources = _grouped(selection.traces, lambda trace: trace.source or "unknown")
    strangers = sorted(licences.keys() - sources.keys())
    if strangers and selection.traces:
        raise ValueError(
            f"licences: {strangers[0]!r} is no source of these traces; they come from {', '.join(sorted(sources))}"
        )
    levels = _grouped(selection.traces, lambda trace: "none" if trace.level is None else str(trace.level))
    return {
        "title": title,
        "rows": selection.kept,
        "problems": len({trace.problem_id for trace in selection.traces}),
        "without_thought": sum(not trace.thinks for trace in selection.traces),
        "tokens": token_figures([trace.num_tokens for trace in selection.traces]),
        "pool": pool,
        "dropped": dict(selection.dropped),
        "sources": {name: figures | {"licence": licences.get(name)} for name, figures in sources.items()},
        "levels": levels,
        "teachers": {name: dict(facts) for name, facts in teachers.items()},
        "parts": None if parts is None else {name: dict(facts) for name, facts in parts.items()},
        "decontamination": None if decontamination is None else dict(decontamination),
        "seed": seed,
    }


def token_figures(tokens: Sequence[int]) -> dict[str, float | int | None]:
    """Mean, median, 95th percentile (nearest rank), sum and longest; None of no rows, whose sum is 0."""
    if not tokens:
        return {"mean": None, "median": None, "p95": None, "sum": 0, "longest": None}
    return {
        "mean": fmean(tokens),
        "median": median(tokens),
        "p95": percentile(tokens, 95),
        "sum": sum(tokens),
        "longest": max(tokens),
    }


def percentile(values: Sequence[int], percent: float) -> int:
    """The nearest-rank percentile: the least value that at least `percent` of them do not exceed.

    `percentile([10, 20, 30, 40], 50) == 20`, `percentile([10, 20, 30, 40], 51) == 30`
    """
    return sorted(values)[max(math.ceil(percent * len(values) / 100), 1) - 1]


def leak_evidence(index: EvaluationIndex, problems: Sequence[Problem]) -> dict[str, Any]:
    """Which sets the problems of a pool were held against, how many of them stand in one, and examples of both texts.

    {"sets": {"aime24": 30}, "problems": 4000, "leaked": 2, "by_set": {"aime24": 2}, "examples": [...]}
    """
    by_set: Counter[str] = Counter()
    examples: list[dict[str, Any]] = []
    leaked = 0
    for problem in problems:
        overlaps = index.leaks(problem)
        if not overlaps:
            continue
        leaked += 1
        by_set.update({overlap.item.evaluation for overlap in overlaps})
        if len(examples) < EXAMPLES:
            first = overlaps[0]
            examples.append(
                {
                    "problem": problem.id,
                    "question": problem.text[:MAX_SHOWN],
                    "set": first.item.evaluation,
                    "id": first.item.id,
                    "kind": str(first.kind),
                    "shared": first.shared[:MAX_SHOWN],
                }
            )
    return {
        "sets": dict(sorted(Counter(item.evaluation for item in index.items).items())),
        "problems": len(problems),
        "leaked": leaked,
        "by_set": dict(sorted(by_set.items())),
        "examples": examples,
    }


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """`data_card.json` and `data_card.md` in a stage's folder."""
    write_json(folder / CARD_JSON, card, "traces.summary")
    write_file(folder / CARD_TEXT, card_text(card), "traces.summary")


def card_text(card: Mapping[str, Any]) -> str:
    """The card as Markdown, of the JSON values alone."""
    tokens = card["tokens"]
    parts = [
        f"# Traces: {card['title']}",
        f"{card['rows']:,} rows of {card['problems']:,} problems, {card['without_thought']:,} of them without a "
        f"thought; {card['pool']:,} rows were in the pool.",
        "## Tokens",
        "In the teacher's tokens, EOS included.",
        _table(["mean", "median", "95th percentile", "longest", "sum"], [[
            _number(tokens[name]) for name in ("mean", "median", "p95", "longest", "sum")
        ]]),
        "## Sources and licences",
        _table(["source", "rows", "tokens", "licence"], [
            [name, f"{facts['rows']:,}", f"{facts['tokens']:,}", facts["licence"] or "not given: look it up before use"]
            for name, facts in card["sources"].items()
        ]),
        "## Levels",
        _table(["level", "rows", "tokens"], [
            [name, f"{facts['rows']:,}", f"{facts['tokens']:,}"] for name, facts in card["levels"].items()
        ]),
        "## What was left out",
        _table(["reason", "rows"], [
            *([reason, f"{count:,}"] for reason, count in card["dropped"].items()),
            ["kept", f"{card['rows']:,}"],
            ["all of the pool", f"{card['pool']:,}"],
        ]),
    ]  # fmt: skip
    if card["parts"] is not None:
        rows = [
            [name, f"{facts['rows']:,}", f"{facts['offered']:,}", f"{facts['long']:,}"]
            for name, facts in card["parts"].items()
        ]
        parts += ["## Parts", _table(["part", "rows", "offered", "long"], rows)]
    parts += ["## Decontamination", _leaks(card["decontamination"])]
    parts += ["## Teachers", _table(["teacher", "what it was"], [
        [name, ", ".join(f"{key} {value}" for key, value in facts.items()) or "unknown"]
        for name, facts in card["teachers"].items()
    ])]  # fmt: skip
    parts += ["## Seed", str(card["seed"])]
    return "\n\n".join(parts) + "\n"


def _grouped(traces: Sequence[Trace], name_of: Callable[[Trace], str]) -> dict[str, dict[str, Any]]:
    """{name: {"rows", "tokens"}} in the order of the names."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    for trace in traces:
        found[name_of(trace)].append(trace.num_tokens)
    return {name: {"rows": len(tokens), "tokens": sum(tokens)} for name, tokens in sorted(found.items())}


def _leaks(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "None: the problems were held against no evaluation set."
    sets = ", ".join(f"{name} ({count:,} questions)" for name, count in found["sets"].items())
    lines = [f"Held against {sets}: {found['leaked']:,} of {found['problems']:,} problems of the pool stand in one."]
    lines += [f"* {name}: {count:,} problems" for name, count in found["by_set"].items()]
    lines += [
        f'* for example {json.dumps(one["question"], ensure_ascii=False)} shares "{one["shared"]}" with {one["id"]} '
        f"of {one['set']} ({one['kind']})"
        for one in found["examples"]
    ]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = ([" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"
