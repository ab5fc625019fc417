"""The methods a recipe can name, each a thin adapter: the typed keys of a stage become flat arguments of one function.

This is the door at which configuration stops. Nothing is decided here; a method's module says what it does. Methods are
imported inside their adapter, so that checking a recipe never loads torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from recipes.engines import open_engine
from recipes.keys import SamplingKeys, Split
from recipes.methods import (
    Dpo,
    Evaluate,
    Frontier,
    ImportGguf,
    MakeTests,
    Merge,
    Pairs,
    Pretrain,
    Race,
    Sample,
    Select,
    Sft,
    Shortest,
    Traces,
    WordProblems,
    WorkedSolutions,
)
from recipes.problem_keys import source_kind
from recipes.rl_keys import Grpo
from recipes.runner import StageContext, StageFunction
from recipes.schema import Recipe
from recipes.tasks import load_problems, open_task
from rl.problems import BadProblems, read_solved_problems
from rl.runs import append_line, folder_hash, read_json, read_lines, write_json
from rl.tasks.base import Task
from rl.types import Problem, RolloutGroup

if TYPE_CHECKING:
    from long2short.report import StageTime, TrainingCurve
    from rl.samplers.base import SamplingSettings, StreamingSampler
    from rl.tasks.code_generation import UntestedProblem


PROBLEMS = "problems.jsonl"  # what a stage that makes problems writes


def task_of(recipe: Recipe) -> Task:
    """How the recipe's answers are judged."""
    return open_task(recipe.problems)


def problems_of(context: StageContext, split: Split, count: int | None = None) -> list[Problem]:
    """At most `count` problems of a split, in the order of the source; an empty split is an error, not an empty run."""
    section = context.recipe.problems
    wanted = getattr(section, split)
    path = context.recipe.problems_file
    if source_kind(section.source) == "stage":
        path = context.inputs[section.source] / PROBLEMS
    elif source_kind(section.source) == "file" and path is None:
        raise BadProblems(section.source, [(0, not_set(section.source))])
    return load_problems(section, split, wanted if count is None else min(wanted, count), path)


def not_set(ref: str, where_from: str = "") -> str:
    """What to do about `$NAME/file` where NAME is not set."""
    name = ref.removeprefix("$").partition("/")[0]
    return f"{name} is not set: `export {name}=FOLDER`, the folder with this file. {where_from}".rstrip()


def settings_of(stage: SamplingKeys) -> SamplingSettings:
    """The sampling settings of a stage; the recipe's defaults were filled in when it was checked."""
    from rl.samplers.base import SamplingSettings

    assert stage.temperature is not None and stage.top_p is not None and stage.max_tokens is not None
    return SamplingSettings(stage.temperature, stage.top_p, stage.max_tokens)


def model_fingerprint(name: str) -> str:
    """The content of a model folder, or the name of a hub id: what a pool's samples are samples of."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    return hashlib.sha256(json.dumps(folder_hash(folder), sort_keys=True).encode()).hexdigest()


def files_of(context: StageContext, where_from: str = "") -> list[Path]:
    """The files that the running stage reads; BadProblems for one in a folder whose environment variable is not set."""
    references = [read for read in context.recipe.stages[context.name].references() if read.wants == "file"]
    for read in references:
        if read.path is None:
            raise BadProblems(read.ref, [(0, not_set(read.ref, where_from))])
    return [read.path for read in references if read.path is not None]


# --- making models ----------------------------------------------------------------------------------------------------


def import_gguf(context: StageContext) -> None:
    from rl.gguf import find_gguf
    from rl.gguf import import_gguf as run

    stage: ImportGguf = context.stage
    path = find_gguf(stage.package) if stage.package is not None else files_of(context)[0]
    summary = run(path, context.folder / "model", stage.sha256)
    write_json(context.folder / "summary.json", summary, "gguf.summary")


def pretrain(context: StageContext) -> None:
    from rl.tasks.tiny_models import pretrain as run

    stage: Pretrain = context.stage

    def report(step: int, metrics: Mapping[str, float]) -> None:
        append_line(context.folder / "metrics.jsonl", {"step": step, **metrics})
        context.progress(step, stage.steps, f"loss {metrics['loss']:.3f}")

    (context.folder / "metrics.jsonl").unlink(missing_ok=True)
    run(
        context.folder / "model",
        start=None if stage.start is None else context.model(stage.start),
        hidden=stage.hidden or 0,
        layers=stage.layers or 0,
        heads=stage.heads or 0,
        steps=stage.steps,
        batch_size=stage.batch_size,
        learning_rate=stage.learning_rate,
        styles=stage.styles.model_dump(),
        levels=tuple(stage.levels or ()),
        seed=context.seed,
        report=report,
    )


def grpo(context: StageContext) -> None:
    from recipes.rl_stage import run_rl

    stage: Grpo = context.stage
    dev = problems_of(context, "dev", stage.eval_problems) if stage.eval_every else []
    run_rl(context, problems_of(context, "train"), dev, task_of(context.recipe), settings_of(stage))


def sft(context: StageContext) -> None:
    from distill.sft import train
    from distill.traces import read_traces

    stage: Sft = context.stage
    train(
        context.folder,
        model=context.model(stage.model),
        traces=read_traces(context.inputs[stage.traces] / "traces.jsonl"),
        epochs=stage.epochs,
        learning_rate=stage.learning_rate,
        batch_size=stage.batch_size,
        max_length=stage.max_length,
        seed=context.seed,
        suffix=context.recipe.problems.prompt_suffix,
        overflow=stage.overflow,
        warmup_ratio=stage.warmup_ratio,
        min_lr_ratio=stage.min_lr_ratio,
        weight_decay=stage.weight_decay,
        save_every=stage.save_every,
        report=_loss_report(context),
    )


def dpo(context: StageContext) -> None:
    from long2short.dpo import train_dpo
    from long2short.preference import read_pairs

    stage: Dpo = context.stage
    train_dpo(
        context.folder,
        model=context.model(stage.model),
        pairs=read_pairs(context.inputs[stage.pairs] / "pairs.jsonl"),
        beta=stage.beta,
        learning_rate=stage.learning_rate,
        epochs=stage.epochs,
        batch_size=stage.batch_size,
        max_length=stage.max_length,
        seed=context.seed,
        suffix=context.recipe.problems.prompt_suffix,
        overflow=stage.overflow,
        save_every=stage.save_every,
        report=_loss_report(context),
    )


def merge(context: StageContext) -> None:
    from long2short.merge import merge as run

    stage: Merge = context.stage
    summary = run(
        context.folder / "model",
        long=context.model(stage.long),
        short=context.model(stage.short),
        weight=stage.weight,
        report=lambda done, total: context.progress(done, total, "tensors"),
    )
    write_json(context.folder / "summary.json", summary, "merge.summary")


def select(context: StageContext) -> None:
    from long2short.select import select_model

    stage: Select = context.stage
    select_model(
        {ref: context.model(ref) for ref in stage.candidates},
        context.model(stage.parent),
        problems_of(context, "dev", stage.count),
        task_of(context.recipe),
        context.folder,
        samples=stage.samples,
        settings=settings_of(stage),
        tolerance=stage.tolerance,
        seed=context.seed,
        suffix=context.recipe.problems.prompt_suffix,
        open_sampler=partial(open_engine, context.recipe.sampling.choice),
        progress=context.progress,
    )


def _loss_report(context: StageContext):
    def report(step: int, steps: int, metrics: Mapping[str, float]) -> None:
        context.progress(step, steps, f"loss {metrics['loss']:.3f}" if "loss" in metrics else "")

    return report


# --- sampling and what is made from samples ---------------------------------------------------------------------------


def sample(context: StageContext) -> None:
    stage: Sample | Evaluate = context.stage
    _fill(context, stage, problems_of(context, stage.problems, stage.count))


def evaluate(context: StageContext) -> None:
    from rl.evaluate import summarize

    stage: Evaluate = context.stage
    groups = _fill(context, stage, problems_of(context, stage.problems, stage.count))
    summary = summarize(groups, task_of(context.recipe))
    write_json(context.folder / "summary.json", summary.to_json(), "evaluate.summary")


def _fill(context: StageContext, stage: Sample | Evaluate, problems: list[Problem]) -> list[RolloutGroup]:
    from rl.policy import load_tokenizer
    from rl.pool import Pool, fill_pool, pool_address

    name, suffix, settings = context.model(stage.model), context.recipe.problems.prompt_suffix, settings_of(stage)
    tokenizer, task = load_tokenizer(name), task_of(context.recipe)
    engine = context.recipe.sampling.choice
    address = pool_address(
        model_fingerprint(name), problems, tokenizer, settings, context.seed, suffix, native=engine.request
    )
    pool = Pool.open(context.folder / "pool", address)
    with open_engine(engine, name, tokenizer) as sampler:
        fill_pool(
            pool, sampler, tokenizer, problems, task, stage.samples, settings, context.seed, suffix,
            shard_size=engine.shard_size(stage.samples * len(problems)),
            progress=lambda done, total: context.progress(done, total, "completions"),
        )  # fmt: skip
    return pool.groups(problems, task.verifier_version, stage.samples)


def _pool_groups(context: StageContext, pool_stage: str, samples: int | None = None) -> list[RolloutGroup]:
    """The judged groups of a `sample` stage, with the problems that stage was given."""
    from rl.pool import Pool

    filled = context.recipe.stages[pool_stage].config
    assert isinstance(filled, Sample)
    problems = problems_of(context, filled.problems, filled.count)
    pool = Pool.open(context.inputs[pool_stage] / "pool")
    return pool.groups(problems, task_of(context.recipe).verifier_version, samples)


def _thinks_by_template(context: StageContext, pool_stage: str) -> tuple[bool, frozenset[str]]:
    """Whether the pool's template opens `<think>`, and the special tokens no text may contain."""
    from rl.policy import load_tokenizer
    from rl.prompts import prefills_think

    filled = context.recipe.stages[pool_stage].config
    assert isinstance(filled, Sample)
    tokenizer = load_tokenizer(context.model(filled.model))
    return prefills_think(tokenizer), frozenset(tokenizer.all_special_tokens)


def traces(context: StageContext) -> None:
    from distill.traces import select_traces, write_traces

    stage: Traces = context.stage
    prefilled, forbidden = _thinks_by_template(context, stage.pool)
    selection = select_traces(
        _pool_groups(context, stage.pool),
        teacher=stage.pool,
        seed=context.seed,
        per_problem=stage.per_problem,
        min_tokens=stage.min_tokens,
        prefilled=prefilled,
        forbidden=forbidden,
    )
    write_traces(context.folder / "traces.jsonl", selection.traces)
    write_json(context.folder / "summary.json", selection.summary(), "traces.summary")


def shortest(context: StageContext) -> None:
    from distill.traces import write_traces
    from long2short.shortest import select_shortest

    stage: Shortest = context.stage
    prefilled, forbidden = _thinks_by_template(context, stage.pool)
    selection = select_shortest(
        _pool_groups(context, stage.pool, stage.samples),
        teacher=stage.pool,
        samples=stage.samples,
        majority=task_of(context.recipe).answer_of if stage.majority else None,
        min_tokens=stage.min_tokens,
        prefilled=prefilled,
        forbidden=forbidden,
    )
    write_traces(context.folder / "traces.jsonl", selection.traces)
    write_json(context.folder / "summary.json", selection.summary(), "traces.summary")


def race(context: StageContext) -> None:
    from distill.traces import write_traces
    from long2short.race_pool import race_into_pool
    from rl.policy import load_tokenizer
    from rl.pool import Pool, pool_address
    from rl.prompts import prefills_think

    stage: Race = context.stage
    name, suffix, settings = context.model(stage.model), context.recipe.problems.prompt_suffix, settings_of(stage)
    engine = replace(context.recipe.sampling.choice, replicas=1)  # samples of one problem race on one engine
    tokenizer, problems = load_tokenizer(name), problems_of(context, "train", stage.count)
    address = pool_address(
        model_fingerprint(name), problems, tokenizer, settings, context.seed, suffix, racing=True, native=engine.request
    )
    with open_engine(engine, name, tokenizer) as sampler:
        selection = race_into_pool(
            Pool.open(context.folder / "pool", address), cast("StreamingSampler", sampler), tokenizer, problems,
            task_of(context.recipe), stage.samples, settings, context.seed, suffix,
            teacher=stage.model, min_tokens=stage.min_tokens,
            prefilled=prefills_think(tokenizer), forbidden=frozenset(tokenizer.all_special_tokens),
            progress=lambda done, total: context.progress(done, total, "completions"),
        )  # fmt: skip
    write_traces(context.folder / "traces.jsonl", selection.traces)
    write_json(context.folder / "summary.json", selection.summary(), "traces.summary")


def pairs(context: StageContext) -> None:
    from long2short.preference import select_pairs, write_pairs

    stage: Pairs = context.stage
    prefilled, forbidden = _thinks_by_template(context, stage.pool)
    selection = select_pairs(
        _pool_groups(context, stage.pool),
        min_ratio=stage.min_ratio,
        per_problem=stage.per_problem,
        prefilled=prefilled,
        forbidden=forbidden,
    )
    write_pairs(context.folder / "pairs.jsonl", selection.pairs)
    write_json(context.folder / "summary.json", selection.summary(), "pairs.summary")


# --- problems and their solutions -------------------------------------------------------------------------------------


def word_problems(context: StageContext) -> None:
    from rl.tasks.word_problems import WHERE_FROM, select_problems, write_problems

    stage: WordProblems = context.stage
    selection = select_problems(files_of(context, WHERE_FROM), stage.max_steps)
    write_problems(context.folder / PROBLEMS, selection.problems)
    write_json(context.folder / "summary.json", selection.summary(), "problems.summary")


def make_tests(context: StageContext) -> None:
    from rl.sandbox.ladder import find_sandbox
    from rl.tasks import code_generation

    stage: MakeTests = context.stage
    problems = code_generation.read_untested(files_of(context)[0])
    without = [problem for problem in problems if not problem.generator.strip()]
    if stage.model is not None and without:
        written = iter(_generators(context, stage.model, without))
        problems = [problem if problem.generator.strip() else next(written) for problem in problems]
    rules = code_generation.MakingRules(stage.inputs, stage.submissions, stage.agree, stage.valid, stage.passing)
    made = code_generation.make_tests(find_sandbox(), problems, rules, seed=context.seed)
    code_generation.write_made(context.folder / PROBLEMS, made)
    write_json(context.folder / "summary.json", made.summary(), "problems.summary")


def _generators(context: StageContext, model: str, problems: list[UntestedProblem]) -> list[UntestedProblem]:
    """The problems with generators that a model writes."""
    from rl.policy import load_tokenizer
    from rl.prompts import render_prompt
    from rl.tasks.code_generation import write_generators

    name = context.model(model)
    tokenizer = load_tokenizer(name)
    with open_engine(context.recipe.sampling.choice, name, tokenizer) as sampler:
        return write_generators(
            sampler, partial(render_prompt, tokenizer), problems, settings_of(context.stage), context.seed
        )


def worked_solutions(context: StageContext) -> None:
    from distill.rewrite import rewrite_solutions
    from distill.traces import write_traces
    from rl.policy import load_tokenizer
    from rl.prompts import prefills_think

    stage: WorkedSolutions = context.stage
    tokenizer = load_tokenizer(context.model(stage.model))
    selection = rewrite_solutions(
        read_solved_problems(context.inputs[stage.problems] / PROBLEMS),
        count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
        prefilled=prefills_think(tokenizer),
        forbidden=frozenset(tokenizer.all_special_tokens),
        count=stage.count,
    )
    write_traces(context.folder / "traces.jsonl", selection.traces)
    write_json(context.folder / "summary.json", selection.summary(), "traces.summary")


# --- comparing --------------------------------------------------------------------------------------------------------


def frontier(context: StageContext) -> None:
    from long2short.frontier import Arm
    from long2short.frontier import frontier as compare_arms
    from long2short.report import write_report
    from rl.evaluate import EvalSummary
    from rl.pool import Pool

    stage: Frontier = context.stage
    task, problems = task_of(context.recipe), problems_of(context, stage.problems, stage.count)
    arms = []
    for position, (name, ref) in enumerate(stage.arms.items()):
        context.progress(position, len(stage.arms), name)
        folder = context.inputs[f"{context.name}.{name}"]
        groups = Pool.open(folder / "pool").groups(problems, task.verifier_version, stage.samples)
        summary = EvalSummary.from_json(read_json(folder / "summary.json"))
        arms.append(Arm(name, tuple(groups), summary, _family(context, ref)))
    write_report(
        context.folder,
        compare_arms(arms, stage.parent, stage.compare),
        arms,
        title=f"{context.recipe.name}: accuracy and tokens",
        curves=_curves(context),
        times=_times(context),
        facts=_facts(context, stage, len(problems)),
    )


def _family(context: StageContext, ref: str) -> str:
    """The method that made an arm; it sets the colour. A model from outside the recipe is a start."""
    made_by = context.recipe.stages.get(ref)
    return made_by.method if made_by is not None else "start"


def _curves(context: StageContext) -> list[TrainingCurve]:
    from long2short.report import TrainingCurve

    return [
        TrainingCurve(name, tuple(read_lines(folder / "metrics.jsonl")))
        for name, folder in context.inputs.items()
        if (folder / "metrics.jsonl").is_file()
    ]


def _times(context: StageContext) -> list[StageTime]:
    from long2short.report import StageTime

    manifests = {name: read_json(folder / "manifest.json") for name, folder in context.inputs.items()}
    return [StageTime(name, manifest["method"], manifest["seconds"]) for name, manifest in manifests.items()]


def _facts(context: StageContext, stage: Frontier, num_problems: int) -> list[tuple[str, str]]:
    return [
        ("recipe", context.recipe.name),
        ("seed", str(context.recipe.seed)),
        ("problems", f"{num_problems} of the {stage.problems} split, {context.recipe.problems.source}"),
        ("samples", f"{stage.samples} a problem"),
        ("sampling", f"temperature {stage.temperature}, top-p {stage.top_p}, at most {stage.max_tokens} tokens"),
    ]


METHODS: dict[str, StageFunction] = {
    "pretrain": pretrain,
    "grpo": grpo,
    "length_rl": grpo,
    "sample": sample,
    "traces": traces,
    "shortest": shortest,
    "race": race,
    "sft": sft,
    "pairs": pairs,
    "dpo": dpo,
    "merge": merge,
    "select": select,
    "evaluate": evaluate,
    "frontier": frontier,
    "import_gguf": import_gguf,
    "word_problems": word_problems,
    "worked_solutions": worked_solutions,
    "make_tests": make_tests,
}

# Methods that all processes of a run work on together; the others are run by the first one alone.
COLLECTIVE = frozenset({"grpo", "length_rl"})
