"""`reason preview`: what each length objective would do to the samples of a pool, before anything is trained.

    reason preview POOL                                            every objective at its paper's weight
    reason preview POOL --objective kimi --weight 1 --set gate=any-right --out plots
    reason preview POOL --objective laser --set target=60 --scope think --model MODEL

A parameter that an objective needs and that is not given is taken from the pool: target and limits the median of the
right lengths, buffer a fifth of max_tokens, keep half a group. What an objective remembers comes from this pool too. A
pool holds its prompts as tokens: with --model the budgets that they state are read, and no target is made up.
`cli.py` registers `preview_command`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recipes.options import JsonOption, PoolArgument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from long2short.length_objectives import GroupLengths, LengthObjective
    from long2short.length_preview import Preview
    from long2short.length_reward import TokenCount
    from recipes.length_keys import Length
    from rl.pool import Pool
    from rl.types import RolloutGroup

PLOT = "preview.svg"


def preview_command(
    pool: PoolArgument,
    objectives: Annotated[
        list[str] | None, typer.Option("--objective", metavar="NAME", help="May be repeated  [all of them]")
    ] = None,
    weight: Annotated[float | None, typer.Option("--weight", min=0, help="Of the length reward  [the paper's]")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A key of `length:`, such as target=60.")
    ] = None,
    reward_accuracy: Annotated[
        float | None, typer.Option("--reward-accuracy", min=0, help="Reward of a right answer  [the paper's]")
    ] = None,
    reward_format: Annotated[
        float, typer.Option("--reward-format", min=0, help="Reward of the right format, for the bound of the weight.")
    ] = 0.1,
    scope: Annotated[
        str, typer.Option("--scope", help="Which tokens count: total, think or answer. The last two need --model.")
    ] = "total",
    model: Annotated[
        str | None,
        typer.Option("--model", help="The model of the pool: its tokenizer reads thoughts and stated budgets."),
    ] = None,
    verifier: Annotated[
        str | None, typer.Option("--verifier", metavar="VERSION", help="Whose verdicts  [the one that judged last]")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help=f"Folder for the plot, {PLOT}.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Value against length, signal and known traps of length objectives, on the lengths of a pool."""
    from recipes.console import show
    from recipes.direct import pool_folder

    keys = [read_keys(name, weight, settings or ()) for name in checked_names(objectives or ())]
    refuse_unread(keys, settings or ())
    folder = pool_folder(pool)
    tokenizer = tokenizer_of(scope, model)
    found = preview_pool(
        folder, keys, scope_of(scope, tokenizer), verifier, reward_accuracy, reward_format, tokenizer=tokenizer
    )
    value: dict[str, Any] = {
        "pool": str(folder),
        "groups": len(found.groups),
        "samples": sum(len(group.lengths) for group in found.groups),
        "objectives": [{**row.to_json(), "keys": found.keys[row.objective]} for row in found.rows],
        "notes": found.notes,
    }
    if out is not None:
        from long2short.length_preview import plot
        from rl.runs import write_file

        titles = {row.objective: _title(row, found.keys[row.objective]) for row in found.rows}
        write_file(out / PLOT, plot(found.groups, found.values, titles), "preview.plot")
        value["plot"] = str(out / PLOT)
    show(value, preview_text(value, found), as_json)


# --- from words to keys -----------------------------------------------------------------------------------------------


def checked_names(names: Sequence[str]) -> list[str]:
    """The objectives, each once; all of them for none. ValueError for an unknown one."""
    from typing import get_args

    from recipes.length_keys import ObjectiveName
    from recipes.loader import likely

    known = get_args(ObjectiveName)
    for name in names:
        if name not in known:
            raise ValueError(f"--objective: there is no {name[:40]!r}{likely(name, known) or ''}; {', '.join(known)}")
    return list(dict.fromkeys(names or known))


def read_keys(name: str, weight: float | None, settings: Sequence[str]) -> dict[str, Any]:
    """The keys of `length:` for one objective, of the --set those that it reads; not yet checked."""
    from long2short.length_catalog import CATALOG
    from recipes.length_keys import AROUND, GFPO, reads

    given = {key: value for key, value in _parsed(settings) if key in reads(name) or (key in AROUND and name != GFPO)}
    if name != GFPO:
        given["weight"] = CATALOG[name].weight if weight is None else weight
    return {"objective": name} | given


def refuse_unread(keys: Sequence[Mapping[str, Any]], settings: Sequence[str]) -> None:
    """ValueError for a --set that none of the objectives reads."""
    from recipes.length_keys import AROUND, reads

    names = [str(one["objective"]) for one in keys]
    known = sorted({key for name in names for key in reads(name)})
    steps = ("warmup_steps", "ramp_steps", "accuracy_floor", "reference")  # of a run; a pool has no steps
    for key, _ in _parsed(settings):
        if key == "scope":
            raise ValueError("--set scope: write --scope, which needs --model")
        if key in steps or not any(key in one for one in keys):
            raise ValueError(
                f"--set {key}: no effect on {', '.join(names[:5])}{' and others' if names[5:] else ''}; they read "
                f"{', '.join([*known, *(one for one in AROUND if one not in (*steps, 'scope'))])}"
            )


def _parsed(settings: Sequence[str]) -> Iterator[tuple[str, Any]]:
    from recipes.loader import parse_value

    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {text[:60]}: write it as KEY=VALUE, such as target=60")
        yield key.strip(), parse_value(value, f"--set {text[:60]}")


def tokenizer_of(scope: str, model: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of --model. ValueError for a folder that is no model, a scope that is unknown or needs one."""
    from recipes.direct import check_model

    if scope not in ("total", "think", "answer"):
        raise ValueError(f"--scope must be total, think or answer, not {scope[:40]!r}")
    if scope != "total" and model is None:
        raise ValueError(f"--scope {scope}: give --model, whose tokenizer finds the end of the thought")
    if model is None:
        return None
    name = check_model(model)
    from rl.policy import load_tokenizer

    return load_tokenizer(name)


def scope_of(scope: str, tokenizer: PreTrainedTokenizerBase | None) -> TokenCount:
    """Which tokens count."""
    from long2short.length_reward import AnswerTokens, ThinkTokens, total_tokens

    if scope == "total" or tokenizer is None:
        return total_tokens
    return (ThinkTokens if scope == "think" else AnswerTokens)(tokenizer)


# --- the preview of a pool --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Previewed:
    """What `preview_pool` found: a row an objective, the values behind it, the keys that it was made with; and notes on
    what was assumed or left out."""

    groups: list[GroupLengths]
    rows: list[Preview] = field(default_factory=list)
    values: dict[str, list[list[float]]] = field(default_factory=dict)
    keys: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def preview_pool(
    folder: Path,
    keys: Sequence[Mapping[str, Any]],
    scope: TokenCount,
    verifier: str | None = None,
    reward_accuracy: float | None = None,
    reward_format: float = 0.1,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Previewed:
    """Every objective of `keys` on a pool; `tokenizer` reads its prompts. ValueError for a pool without verdicts, for
    keys that are refused, and where no objective is left."""
    from long2short.length_catalog import CATALOG
    from long2short.length_preview import kept_values, preview, preview_filter
    from long2short.length_reward import lengths_of
    from recipes.length_keys import GFPO
    from rl.pool import Pool

    pool = Pool.open(folder)
    groups = _groups(pool, verifier, tokenizer)
    seen = [one for one in (lengths_of(group, 1, scope) for group in groups) if one is not None]
    if not seen:
        raise ValueError(f"{folder} holds no sample with a verdict: fill or judge it first (reason sample, rescore)")
    found = Previewed(seen)
    for raw in keys:
        checked, filled = _filled(raw, seen, pool.address.max_tokens)
        name = checked.objective
        if name == GFPO:
            assert checked.keep is not None
            found.keys[name] = filled
            found.values[name] = [kept_values(one, checked.keep, checked.prefer == "efficient") for one in seen]
            found.rows.append(preview_filter(name, seen, found.values[name]))
            continue
        try:
            valued = _valued(checked, seen, pool.address.max_tokens)
        except ValueError as error:  # a budget that is to be read in the prompts, and is not there
            found.notes.append(f"{name} is left out: {error}")
            continue
        found.keys[name] = filled
        accuracy = CATALOG[name].reward_accuracy if reward_accuracy is None else reward_accuracy
        found.values[name] = [valued.value(group) for group in valued.groups]
        assert checked.weight is not None
        found.rows.append(
            preview(
                name, valued.groups, found.values[name], checked.weight, valued.objective.bound(),
                weak_bound=valued.objective.weak_bound(), again=valued.value, reward_accuracy=accuracy,
                reward_format=reward_format,
            )
        )  # fmt: skip
    if not found.rows:
        raise ValueError("; ".join(found.notes))
    found.notes += _assumed(found, keys, reward_accuracy is None, tokenizer is None)
    return found


def _assumed(found: Previewed, keys: Sequence[Mapping[str, Any]], papers_accuracy: bool, unread: bool) -> Iterator[str]:
    """What the rows take for granted that a stage may have otherwise."""
    from long2short.length_catalog import reads_budget
    from recipes.rl_keys import Grpo

    default = Grpo.model_fields["reward_accuracy"].default
    others: dict[float, list[str]] = {}
    for row in found.rows:
        if row.reward_accuracy is not None and row.reward_accuracy != default:
            others.setdefault(row.reward_accuracy, []).append(row.objective)
    for accuracy, names in others.items() if papers_accuracy else ():
        yield (
            f"{', '.join(names)}: with reward_accuracy {accuracy:g}, the paper's; a stage that does not say has "
            f"{default:g}: write reward_accuracy: {accuracy:g} beside length, or preview with --reward-accuracy "
            f"{default:g}"
        )
    given = {str(raw["objective"]) for raw in keys if "target" in raw}
    made = [name for name, used in found.keys.items() if reads_budget(name) and "target" in used and name not in given]
    if made:
        where = "reads the budget that the prompt states, as preview does with --model" if unread else "is refused here"
        stated = "" if unread else "no prompt states a budget, so "
        yield f"{', '.join(made)}: {stated}target is the median of the right lengths; a stage without target {where}"


def _groups(pool: Pool, verifier: str | None, tokenizer: PreTrainedTokenizerBase | None) -> list[RolloutGroup]:
    """The judged samples of a pool as groups. The question of each is the whole prompt, as far as it can be read."""
    from rl.types import Problem, Rollout, RolloutGroup, TextPart

    known = pool.verifiers()
    if not known or verifier not in (None, *known):
        raise ValueError(
            f"{pool.folder} has not been judged by {verifier or 'any verifier'}; its verifiers: "
            f"{', '.join(known) or 'none'}. Judge it: reason rescore"
        )
    verdicts = pool.verdicts(verifier or known[-1])
    groups = []
    for name, rows in groupby(pool.in_order(), key=lambda row: row[0][0]):
        samples = list(rows)
        _, prompt_ids, _ = samples[0]
        text = "" if tokenizer is None else str(tokenizer.decode(list(prompt_ids)))
        rollouts = tuple(Rollout(completion, verdicts[key]) for key, _, completion in samples)
        groups.append(RolloutGroup(Problem(name, (TextPart(text),), ""), prompt_ids, rollouts))
    return groups


def _filled(raw: Mapping[str, Any], seen: Sequence[GroupLengths], max_tokens: int) -> tuple[Length, dict[str, Any]]:
    """The checked keys, with what is missing taken from the pool; and the keys as they are shown."""
    from pydantic import ValidationError

    from long2short.length_catalog import reads_budget
    from long2short.length_limits import stated_budget
    from recipes.length_keys import Length, reads

    lengths = [length for one in seen for length in one.right_lengths] or [n for one in seen for n in one.lengths]
    middle = max(1, round(median(lengths)))
    from_pool = {
        "target": middle,
        "limits": [[1, middle]],
        "buffer": max(1, max_tokens // 5),
        "keep": max(2, min(len(one.lengths) for one in seen) // 2),
    }
    if reads_budget(raw["objective"]) and any(stated_budget(one.prompt) for one in seen):
        del from_pool["target"]
    filled = {key: value for key, value in from_pool.items() if key in reads(raw["objective"])} | dict(raw)
    try:
        checked = Length.model_validate_json(json.dumps(filled))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"] if not where else f"{where}: {first['msg']}, not {str(first['input'])[:40]}"
        raise ValueError(f"--objective {raw['objective']}: {message}") from None
    group_size = max(2, *(len(one.lengths) for one in seen))  # as a stage has at the least
    if wrong := [*checked.problems_with_limit(max_tokens), *checked.problems_with_stage(0, group_size)]:
        raise ValueError(f"--objective {raw['objective']}: {'; '.join(f'{key}: {message}' for key, message in wrong)}")
    return checked, {key: value for key, value in filled.items() if key not in ("objective", "weight")}


@dataclass(frozen=True, slots=True)
class _Valued:
    """One objective on the groups: they with their references, and the function of one group with its gates."""

    objective: LengthObjective
    groups: list[GroupLengths]
    value: Callable[[GroupLengths], list[float]]


def _valued(checked: Length, seen: Sequence[GroupLengths], max_tokens: int) -> _Valued:
    from recipes.length_keys import gates_of

    chosen = checked.chosen(max_tokens)
    groups = list(seen)
    if chosen.memory is not None:  # once to learn, once to be asked
        for one in seen:
            chosen.memory.recall(replace(one, step=0))
        groups = [replace(one, reference=chosen.memory.recall(one)) for one in seen]
    gates = gates_of(checked)

    def value(group: GroupLengths) -> list[float]:
        return chosen.objective(group) if all(gate(group) for gate in gates) else [0.0] * len(group.lengths)

    return _Valued(chosen.objective, groups, value)


# --- words ------------------------------------------------------------------------------------------------------------


def _title(row: Preview, keys: Mapping[str, Any]) -> str:
    told = [f"{key} {value}" for key, value in keys.items()]
    return ", ".join([row.objective, *([] if row.weight is None else [f"weight {row.weight:g}"]), *told])


def preview_text(value: Mapping[str, Any], found: Previewed) -> str:
    """The table and the traps, for people."""
    from recipes.console import columns

    head = ["objective", "weight", "right", "wrong", "rank", "signal", "wrong >= right", "safe below", "keys"]
    rows = [
        [
            row.objective,
            "-" if row.weight is None else f"{row.weight:g}",
            _number(row.mean_right),
            _number(row.mean_wrong),
            _number(row.rank),
            f"{row.signal_before:.0%} -> {row.signal_after:.0%}",
            "-" if row.wrong_above_right is None else f"{row.wrong_above_right:.1%}",
            "-" if row.weight is None else "any" if row.safe_weight is None else f"{row.safe_weight:.3g}",
            ", ".join(f"{key} {one}" for key, one in found.keys[row.objective].items()),
        ]
        for row in found.rows
    ]
    traps: dict[str, list[tuple[str, Any]]] = {}
    for row in found.rows:
        for trap in row.traps:
            traps.setdefault(trap.name, []).append((row.objective, trap))
    lines = [
        f"{value['samples']} samples of {value['groups']} problems in {value['pool']}",
        "",
        columns(head, rows),
        "",
        "right, wrong: mean value. rank: of value and length among the right answers of a group. signal: groups with a "
        "gradient, by accuracy alone and with the length reward.",
        *(f"\n{note}" for note in found.notes),
    ]
    for name, hits in traps.items():
        lines += ["", f"trap: {name}"]
        for said in dict.fromkeys((trap.what, trap.fix) for _, trap in hits):
            here = [f"{who} {trap.count} of {trap.of}" for who, trap in hits if (trap.what, trap.fix) == said]
            lines += [f"  {', '.join(here)} groups {said[0]}", f"  fix: {said[1]}"]
    if "plot" in value:
        lines += ["", f"plot: {value['plot']}"]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
