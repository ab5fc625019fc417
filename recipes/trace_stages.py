"""The stages that make traces: typed keys become flat arguments and functions. Nothing is decided here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recipes.filter_stage import stage_filters
from recipes.runner import StageContext
from recipes.stage_inputs import (
    model_fingerprint,
    not_set,
    pool_groups,
    problems_of,
    task_of,
    thinks_by_template,
)
from recipes.trace_keys import ImportTraces, Mix, TraceJudge, Traces
from rl.problems import BadProblems
from rl.runs import write_json

if TYPE_CHECKING:
    from pathlib import Path

    from distill.selection import Scorer
    from distill.traces import Trace

TRACES = "traces.jsonl"
SUMMARY = "summary.json"


def traces(context: StageContext) -> None:
    from distill import selection
    from distill.data_card import data_card, leak_evidence, write_card
    from distill.traces import select_traces, write_traces
    from rl.decontamination import EvaluationIndex, read_items

    stage: Traces = context.stage
    prefilled, forbidden = thinks_by_template(context, stage.pool)
    groups = pool_groups(context, stage.pool)
    problems = [group.problem for group in groups]
    choosers = {"shortest": selection.shortest, "stratified": selection.stratified}
    selected = select_traces(
        groups,
        teacher=stage.pool,
        seed=context.seed,
        per_problem=None if stage.keep == "all" else stage.per_problem,
        choose=choosers.get(stage.keep, selection.at_random)
        if stage.judge is None
        else selection.best_by(_scorer(context, stage.judge)),
        filters=stage_filters(context, stage.filters, problems, prefilled),
        per_level=stage.per_level,
        per_source=stage.per_source,
        min_tokens=stage.min_tokens,
        prefilled=prefilled,
        forbidden=forbidden,
    )
    evaluations = _files(context, "filters.decontaminate")
    index = EvaluationIndex([item for path in evaluations for item in read_items(path)]) if evaluations else None
    card = data_card(
        f"{context.recipe.name}/{context.name}",
        selected,
        pool=sum(len(group.rollouts) for group in groups),
        teachers={stage.pool: _teacher(context, stage.pool)},
        seed=context.seed,
        licences=stage.licences,
        decontamination=None if index is None else leak_evidence(index, problems),
    )
    write_traces(context.folder / TRACES, selected.traces)
    write_card(context.folder, card)
    write_json(context.folder / SUMMARY, selected.summary(), "traces.summary")


def mix(context: StageContext) -> None:
    from dataclasses import asdict

    from distill.data_card import CARD_JSON, data_card, percentile, write_card
    from distill.mix import LongShare, Part, mix_traces
    from distill.traces import read_traces, write_traces
    from rl.runs import read_json

    stage: Mix = context.stage
    parts: list[Part] = []
    teachers: dict[str, dict[str, Any]] = {}
    for name, keys in stage.parts.items():
        if keys.traces is not None:
            folder = context.inputs[keys.traces]
            found = read_traces(folder / TRACES)
            card = folder / CARD_JSON
            known = read_json(card)["teachers"] if card.is_file() else {}
            teachers |= {trace.teacher: known.get(trace.teacher, {}) for trace in found}
        else:
            (path,) = _files(context, f"parts.{name}.file")
            found = _plain_rows(context, name, path)
            teachers[name] = {"rows of": path.name}
        parts.append(Part(name, found, keys.share, keys.count))
    long = None
    if stage.long is not None:
        lengths = [trace.num_tokens for part in parts for trace in part.traces if trace.thinks]
        tokens = stage.long.tokens or percentile(lengths, stage.long.percentile or 0.0)
        long = LongShare(stage.long.share, tokens)
    mixed = mix_traces(parts, seed=context.seed, rows=stage.rows, long=long)
    card = data_card(
        f"{context.recipe.name}/{context.name}",
        mixed.selection,
        pool=sum(len(part.traces) for part in parts),
        teachers=teachers,
        seed=context.seed,
        licences=stage.licences,
        parts={name: asdict(taken) for name, taken in mixed.parts.items()},
    )
    write_traces(context.folder / TRACES, mixed.selection.traces)
    write_card(context.folder, card)
    about = {"parts": card["parts"], "long_from": None if long is None else long.tokens}
    write_json(context.folder / SUMMARY, mixed.selection.summary() | about, "traces.summary")


def import_traces(context: StageContext) -> None:
    from distill.foreign import TraceColumns, read_foreign
    from distill.imported import import_traces as run
    from rl.policy import load_tokenizer
    from rl.runs import file_hash, model_hash

    stage: ImportTraces = context.stage
    columns = None if stage.columns is None else TraceColumns(**stage.columns.model_dump())
    files = _files(context, "source")
    path = files[0] if files else None
    origin: dict[str, Any] = {"source": stage.source if path is None else path.name}
    if path is not None:
        origin["sha256"] = model_hash(path) if path.is_dir() else file_hash(path)
    summary = run(
        context.folder / "pool",
        read_foreign(stage.source if path is None else path, columns),
        teacher=stage.teacher,
        origin=origin,
        problems=problems_of(context, "train"),
        task=task_of(context.recipe),
        tokenizer=load_tokenizer(context.model(stage.model)),
        suffix=context.recipe.problems.prompt_suffix,
        strip=stage.strip,
        seed=context.seed,
        progress=lambda done, total: context.progress(done, total, "completions"),
    )
    write_json(context.folder / SUMMARY, summary, "traces.summary")


def _scorer(context: StageContext, keys: TraceJudge) -> Scorer:
    """What scores the completions of a group, by the kind that the keys name."""
    if keys.kind == "preference":
        from rl.preference_model import PreferenceModel, PreferenceReward

        return PreferenceReward(PreferenceModel(context.model(keys.model)))
    from rl.samplers.openai import OpenAIChat
    from rl.tasks.judge import helpfulness

    assert keys.url is not None
    return helpfulness(OpenAIChat(keys.url, keys.model, api_key_variable=keys.key_variable))


def _teacher(context: StageContext, pool_stage: str) -> dict[str, Any]:
    """Who filled a pool and how, for the data card; of a hub id its name, of a folder its fingerprint."""
    from rl.pool import Pool

    address = Pool.open(context.inputs[pool_stage] / "pool").address
    facts = {"model": address.model, "max_tokens": address.max_tokens, "seed": address.seed}
    filled = context.recipe.stages[pool_stage].config
    if isinstance(filled, ImportTraces):
        return facts | {"source": filled.source, "counted by": model_fingerprint(context.model(filled.model))}
    return facts | {"temperature": address.temperature, "top_p": address.top_p}


def _files(context: StageContext, key: str) -> list[Path]:
    """The files that a key of the running stage names; BadProblems where an environment variable is not set."""
    found = []
    for read in context.recipe.stages[context.name].references():
        if read.wants == "file" and read.key.partition("[")[0] == key:
            if read.path is None:
                raise BadProblems(read.ref, [(0, not_set(read.ref))])
            found.append(read.path)
    return found


def _plain_rows(context: StageContext, name: str, path: Path) -> list[Trace]:
    """The rows of a file as traces without a thought, in the form of the student's template."""
    from distill.foreign import read_foreign
    from distill.imported import opened, plain_traces
    from rl.policy import load_tokenizer

    stage: Mix = context.stage
    assert stage.model is not None
    tokenizer = load_tokenizer(context.model(stage.model))
    return plain_traces(
        read_foreign(path),
        source=path.name,
        teacher=name,
        tail=opened(tokenizer),
        forbidden=frozenset(tokenizer.all_special_tokens),
        count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1,
    )
