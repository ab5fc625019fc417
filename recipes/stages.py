"""The methods a recipe can name, each a thin adapter: the typed keys of a stage become flat arguments of one function.

This is the door at which configuration stops. Nothing is decided here; a method's module says what it does. Methods are
imported inside their adapter, so that checking a recipe never loads torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from recipes import long2short_stages as long2short
from recipes.engines import open_engine
from recipes.frontier_stage import frontier
from recipes.length_rl_stage import length_rl
from recipes.logits_stage import logit_distill, teacher_logits
from recipes.merge_stage import merge, merge_search
from recipes.methods import (
    Evaluate,
    ImportGguf,
    MakeTests,
    Pretrain,
    Sample,
    WordProblems,
    WorkedSolutions,
)
from recipes.on_policy_stage import on_policy
from recipes.r1_stages import made_traces, preference_model
from recipes.rl_keys import Grpo
from recipes.runner import StageContext, StageFunction
from recipes.sft_stage import sft
from recipes.shortest_stage import shortest
from recipes.stage_inputs import (
    PROBLEMS,
    files_of,
    model_fingerprint,
    problems_of,
    settings_of,
    task_of,
)
from recipes.student_stage import prepare
from recipes.trace_stages import import_traces, mix, traces
from rl.problems import read_solved_problems
from rl.runs import append_line, write_json
from rl.types import Problem, RolloutGroup

if TYPE_CHECKING:
    from rl.tasks.code_generation import UntestedProblem


# --- making models ----------------------------------------------------------------------------------------------------


def import_gguf(context: StageContext) -> None:
    from rl.gguf import find_gguf
    from rl.gguf import import_gguf as run

    stage: ImportGguf = context.stage
    path = find_gguf(stage.package) if stage.package is not None else files_of(context)[0]
    summary = run(path, context.folder / "model", stage.sha256)
    write_json(context.folder / "summary.json", summary, "gguf.summary")


def pretrain(context: StageContext) -> None:
    from rl.tasks import tiny, tiny_words
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
        stream=tiny.demonstrations if stage.mixed is None else partial(tiny_words.demonstrations, mixed=stage.mixed),
        more_tokens={} if stage.mixed is None else tiny_words.NEW_TOKENS,
        report=report,
    )


def grpo(context: StageContext) -> None:
    from recipes.rl_stage import run_rl

    stage: Grpo = context.stage
    dev = problems_of(context, "dev", stage.eval_problems) if stage.eval_every else []
    run_rl(context, problems_of(context, "train"), dev, task_of(context.recipe), settings_of(stage), {})


# --- sampling and what is made from samples ---------------------------------------------------------------------------


def sample(context: StageContext) -> None:
    stage: Sample | Evaluate = context.stage
    _fill(context, stage, problems_of(context, stage.problems, stage.count))


def evaluate(context: StageContext) -> None:
    from rl.evaluate import summarize
    from rl.policy import load_tokenizer

    stage: Evaluate = context.stage
    groups = _fill(context, stage, problems_of(context, stage.problems, stage.count))
    summary = summarize(groups, task_of(context.recipe), load_tokenizer(context.model(stage.model)))
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


METHODS: dict[str, StageFunction] = {
    "pretrain": pretrain,
    "grpo": grpo,
    "length_rl": length_rl,
    "on_policy": on_policy,
    "sample": sample,
    "traces": traces,
    "shortest": shortest,
    "race": long2short.race,
    "sft": sft,
    "teacher_logits": teacher_logits,
    "logit_distill": logit_distill,
    "pairs": long2short.pairs,
    "dpo": long2short.dpo,
    "simpo": long2short.simpo,
    "merge": merge,
    "merge_search": merge_search,
    "select": long2short.select,
    "evaluate": evaluate,
    "frontier": frontier,
    "import_gguf": import_gguf,
    "word_problems": word_problems,
    "worked_solutions": worked_solutions,
    "make_tests": make_tests,
    "made_traces": made_traces,
    "preference_model": preference_model,
    "prepare": prepare,
    "mix": mix,
    "import_traces": import_traces,
}

# Methods that all processes of a run work on together; the others are run by the first one alone.
COLLECTIVE = frozenset({"grpo", "length_rl", "on_policy", "sft", "logit_distill"})
