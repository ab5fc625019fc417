"""The `reason` command: parse, check, call one function. Imports no torch before a command needs it.

Exit codes: 0 done, 2 usage or recipe, 3 the doctor or preflight found a defect, 4 the run failed, 130 interrupted.
"""

from __future__ import annotations

import os
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

from recipes.budget_commands import budget_command
from recipes.compare_commands import FormOption, compare_command, frontier_forms
from recipes.export_commands import export_command
from recipes.frontier_commands import (
    ArmsOption,
    OutOption,
    ParentOption,
    ProblemsOption,
    TokenizerOption,
    frontier_of_pools,
    refuse_options,
)
from recipes.options import (
    BatchOption,
    CountOption,
    EngineOption,
    JsonOption,
    MaxTokensOption,
    ModelArgument,
    PoolArgument,
    ProblemsArgument,
    RecipeArgument,
    ReplicasOption,
    RootSeedOption,
    RunsOption,
    SeedOption,
    ServerOption,
    SetOption,
    SplitOption,
    SuffixOption,
    TaskOption,
    TemperatureOption,
    TopPOption,
    VllmOption,
)
from recipes.plan_commands import plan_command
from recipes.pool_commands import pool_app
from recipes.preflight_commands import preflight_command
from recipes.preview_commands import preview_command
from recipes.r1_eval_commands import r1_eval_command
from recipes.recipe_commands import recipes_app
from recipes.trace_commands import import_command, traces_app

if TYPE_CHECKING:
    from recipes.direct import Draw, ProblemSet
    from recipes.schema import Recipe

EXIT_USAGE, EXIT_DEFECT, EXIT_FAILED, EXIT_INTERRUPTED = 2, 3, 4, 130


class Door(TyperGroup):
    """Turns what a command raises into a message on stderr (with --json also an object on stdout) and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["reason.json"] = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        as_json = bool(ctx.meta["reason.json"])
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):  # typer ends these quietly: `reason recipes schema | head`
            raise
        except KeyboardInterrupt:
            _fail("interrupted; run the same command to go on", EXIT_INTERRUPTED, as_json)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            _fail(*_explain(error), as_json)


def _fail(message: str, code: int, as_json: bool) -> NoReturn:
    from recipes.console import one_screen, say, show

    say(one_screen(message))
    if as_json:
        show({"error": message, "exit_code": code}, "", as_json)
    raise typer.Exit(code)


def _explain(error: BaseException) -> tuple[str, int]:
    """The message and the exit code for what a command raised."""
    from rl.problems import BadProblems
    from rl.runs import DamagedFolder, RunLocked

    if isinstance(error, RunLocked | DamagedFolder):
        return str(error), EXIT_FAILED
    if isinstance(error, BadProblems | ValueError):  # every user error of the house is a ValueError; RecipeError is one
        return str(error) or type(error).__name__, EXIT_USAGE
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename}" if error.filename else str(error), EXIT_FAILED
    return f"{type(error).__name__}: {error}", EXIT_FAILED


app = typer.Typer(
    name="reason",
    help="Makes small models reason, and then makes them reason briefly.",
    no_args_is_help=True,
    cls=Door,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(recipes_app, name="recipes")
app.add_typer(pool_app, name="pool")
app.add_typer(traces_app, name="traces")
pool_app.command("import")(import_command)
RUNS = Path("runs")


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"reason {version('reason')}")
        except PackageNotFoundError:
            print("reason (not installed)")
        raise typer.Exit


@app.callback()
def _reason(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


# --- recipes that run ------------------------------------------------------------------------------------------------


@app.command()
def run(
    recipe: RecipeArgument,
    stage: Annotated[
        str | None, typer.Argument(metavar="STAGE", help="Only this stage and what it needs.", show_default=False)
    ] = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Run everything in a recipe, or up to a stage; what is finished is reused."""
    loaded = _load(recipe, overrides, seed)
    _run(loaded, None if stage is None else [loaded.stage(stage).name], runs, as_json)


@app.command()
def rl(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    seed: SeedOption = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Run the reinforcement learning of a recipe (grpo stages) and what it needs."""
    _run_part("rl", recipe, overrides, seed, runs, as_json)


@app.command()
def distill(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    seed: SeedOption = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Run the distillation of a recipe (traces, and sft on them) and what it needs."""
    _run_part("distill", recipe, overrides, seed, runs, as_json)


@app.command()
def long2short(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    seed: SeedOption = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Run the shortening of a recipe (merge, shortest, dpo, length_rl, select, frontier) and what it needs."""
    _run_part("long2short", recipe, overrides, seed, runs, as_json)


def _load(recipe: str, overrides: list[str] | None, seed: int | None) -> Recipe:
    from recipes.schema import load_recipe

    return load_recipe(recipe, overrides or (), seed)


def _run_part(
    word: Literal["rl", "distill", "long2short"],
    recipe: str,
    overrides: list[str] | None,
    seed: int | None,
    runs: Path,
    as_json: bool,
) -> None:
    loaded = _load(recipe, overrides, seed)
    _run(loaded, loaded.part(word), runs, as_json)


def _run(recipe: Recipe, targets: list[str] | None, runs: Path, as_json: bool, markdown: FormOption = None) -> None:
    from recipes.console import PlainReport, open_report, run_result, show
    from recipes.runner import StageFailed, run_recipe
    from recipes.stages import COLLECTIVE, METHODS
    from recipes.tasks import check_rows
    from rl.problems import BadProblems
    from rl.ranks import AnotherRankFailed, start

    if recipe.problems_file is not None:
        check_rows(recipe.problems, recipe.problems_file)  # bad ones are refused before anything runs
    try:
        with start() as ranks, open_report() if ranks.first else nullcontext(PlainReport()) as report:
            results = run_recipe(
                recipe, root=runs, methods=METHODS, report=report, targets=targets, ranks=ranks, collective=COLLECTIVE
            )
    except AnotherRankFailed:  # the one that failed has said so
        raise typer.Exit(EXIT_FAILED) from None
    except StageFailed as failure:
        if isinstance(failure.__cause__, BadProblems):
            raise failure.__cause__ from None
        _fail(f"{failure}\n{_where_to_look(failure, runs / recipe.name)}", EXIT_FAILED, as_json)
    else:
        if ranks.first:
            value, text = run_result(recipe.name, recipe.seed, results)
            show(value, text if markdown is None else frontier_forms(value["frontiers"].values(), markdown), as_json)


def _where_to_look(failure: Any, folder: Path) -> str:
    """Keeps the traceback beside the stage's partial folder, and names both."""
    partial = sorted(folder.glob(f"{failure.stage}-*.partial"), key=lambda path: path.stat().st_mtime)
    lines = [f"what it wrote: {partial[-1]}"] if partial else []
    log = folder / f"{failure.stage}.error.txt"
    try:
        log.write_text("".join(traceback.format_exception(failure.__cause__)), encoding="utf-8")
        lines.append(f"traceback:     {log}")
    except OSError:  # the disk may be what failed
        lines.append("traceback:     could not be written")
    return "\n".join([*lines, "the same command goes on from there"])


# --- models and pools without a recipe -------------------------------------------------------------------------------


@app.command()
def sample(
    model: ModelArgument,
    problems: ProblemsArgument,
    out: Annotated[Path, typer.Option("--out", metavar="POOL", help="Folder of the pool; a killed fill goes on.")],
    samples: Annotated[int, typer.Option("--samples", "-k", min=1, help="Completions per problem.")] = 8,
    task: TaskOption = None,
    split: SplitOption = None,
    count: CountOption = None,
    temperature: TemperatureOption = 1.0,
    top_p: TopPOption = 1.0,
    max_tokens: MaxTokensOption = 256,
    batch_size: BatchOption = 256,
    engine: EngineOption = "transformers",
    replicas: ReplicasOption = 1,
    vllm: VllmOption = None,
    server: ServerOption = None,
    part: Annotated[
        str | None,
        typer.Option("--part", metavar="I/N", help="Only this part, for `pool join`; auto: the launcher's."),
    ] = None,
    prompt_suffix: SuffixOption = "",
    seed: RootSeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Fill a pool: k judged completions of each problem."""
    from recipes.console import show
    from recipes.direct import Draw, check_model, problem_set
    from recipes.engines import choose
    from rl.pool_parts import parse_part

    own = None if part is None else parse_part(part, os.environ)
    drawer = choose(engine, batch_size, replicas, vllm or (), server)
    draw = Draw(samples, temperature, top_p, max_tokens, drawer, seed, prompt_suffix)
    name, chosen = check_model(model), problem_set(problems, split, count, task)
    groups = _fill(name, chosen, out, draw, own)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    value = {
        "pool": str(out),
        "num_problems": len(groups),
        "samples": samples,
        "right": sum(rollout.right for rollout in rollouts),
        "tokens": sum(rollout.num_tokens for rollout in rollouts),
    }
    text = (
        f"{len(groups)} problems x {samples} samples in {out}: {value['right'] / max(len(rollouts), 1):.1%} right, "
        f"{value['tokens'] / max(len(rollouts), 1):.1f} tokens on average"
    )
    show(value, text, as_json)


@app.command()
def evaluate(
    model: ModelArgument,
    problems: ProblemsArgument,
    samples: Annotated[int, typer.Option("--samples", "-k", min=1, help="Completions per problem.")] = 4,
    out: Annotated[Path | None, typer.Option("--out", metavar="POOL", help="Keep the pool in this folder.")] = None,
    parent: Annotated[
        Path | None, typer.Option("--parent", metavar="POOL", help="Pool of the model to compare with, same problems.")
    ] = None,
    task: TaskOption = None,
    split: SplitOption = None,
    count: CountOption = None,
    temperature: TemperatureOption = 1.0,
    top_p: TopPOption = 1.0,
    max_tokens: MaxTokensOption = 256,
    batch_size: BatchOption = 256,
    engine: EngineOption = "transformers",
    replicas: ReplicasOption = 1,
    vllm: VllmOption = None,
    server: ServerOption = None,
    prompt_suffix: SuffixOption = "",
    seed: RootSeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Score a model on problems: accuracy and tokens with 95 % intervals."""
    from tempfile import TemporaryDirectory

    from recipes import direct
    from recipes.console import show, summary_text
    from recipes.engines import choose

    drawer = choose(engine, batch_size, replicas, vllm or (), server)
    draw = direct.Draw(samples, temperature, top_p, max_tokens, drawer, seed, prompt_suffix)
    name, chosen = direct.check_model(model), direct.problem_set(problems, split, count, task)
    parent_pool = None if parent is None else direct.pool_folder(parent)
    with TemporaryDirectory(prefix="reason-") as temporary:
        groups = _fill(name, chosen, out or Path(temporary), draw)
        summary, difference = direct.evaluate(groups, chosen, parent_pool)
    value = {"model": model, "problems": problems, "pool": None if out is None else str(out), "summary": summary}
    show(value | {"difference": difference}, summary_text(summary, difference), as_json)


def _fill(model: str, chosen: ProblemSet, out: Path, draw: Draw, part: tuple[int, int] | None = None) -> Any:
    from recipes.console import open_report
    from recipes.direct import sample as fill

    with open_report() as report:
        return fill(
            model, chosen, out, draw,
            lambda done, total: report.stage_progress("sampling", done, total, "completions"), part,
        )  # fmt: skip


@app.command()
def frontier(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="Run a recipe's frontier stages.", show_default=False)
    ] = None,
    arms: ArmsOption = None,
    parent: ParentOption = None,
    problems: ProblemsOption = None,
    tokenizer: TokenizerOption = None,
    out: OutOption = None,
    task: TaskOption = None,
    split: SplitOption = None,
    count: CountOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    runs: RunsOption = RUNS,
    markdown: FormOption = None,
    as_json: JsonOption = False,
) -> None:
    """Finish and print the accuracy-token frontier of a recipe, or of pools."""
    if (recipe is None) == (not arms):
        raise typer.BadParameter("give either a RECIPE or --arm NAME=POOL (repeated) with --parent NAME")
    if recipe is not None:
        of_arms = {"--parent": parent, "--problems": problems, "--task": task, "--split": split, "--count": count}
        refuse_options(True, of_arms | {"--tokenizer": tokenizer, "--out": out})
        loaded = _load(recipe, overrides, seed)
        names = [stage.name for stage in loaded.stages.values() if stage.method == "frontier"]
        if not names:
            raise ValueError(f"recipe {loaded.name} has no frontier stage")
        _run(loaded, names, runs, as_json, markdown)
        return
    from recipes.console import frontier_text, say, show

    refuse_options(False, {"--set": overrides, "--seed": seed is not None, "--runs": runs != RUNS})
    value, lines = frontier_of_pools(arms or (), parent, problems, task, split, count, tokenizer, out)
    if markdown is not None:
        for line in lines:
            say(line)  # beside the table, which may go into a file
    table = frontier_text(value) if markdown is None else frontier_forms([value], markdown)
    show(value, table if markdown is not None else "\n".join([table, *lines]), as_json)


# --- problem sets and pools looked after ------------------------------------------------------------------------------


@app.command()
def rescore(
    pool: PoolArgument,
    problems: ProblemsArgument,
    task: TaskOption = None,
    before: Annotated[
        str | None, typer.Option("--before", metavar="VERSION", help="Verifier to compare with  [the last one]")
    ] = None,
    second: Annotated[
        str | None,
        typer.Option("--second", metavar="TASK", help="Audit against a second verifier: a task, or math-verify."),
    ] = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Print at most this many changed verdicts.")] = 5,
    split: SplitOption = None,
    count: CountOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge a pool again, without sampling: what changed, and how far two verifiers agree."""
    from recipes import direct, upkeep
    from recipes.console import show as put

    folder, chosen = direct.pool_folder(pool), direct.problem_set(problems, split, count, task)
    if second is not None:
        other = upkeep.second_task(second)
        audited = upkeep.audit(folder, chosen, other)
        path = upkeep.audit_file(folder, chosen.task, other)
        put(audited.to_json() | {"disagreements": str(path)}, upkeep.audit_text(audited, path), as_json)
        return
    found = upkeep.rescore(folder, chosen, before)
    put(found.to_json(), upkeep.rescored_text(found, folder, show), as_json)


@app.command()
def curate(
    problems: ProblemsArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for what is kept, what is not, and why.")],
    against: Annotated[
        list[Path] | None, typer.Option("--against", metavar="FILE", help="An evaluation set, JSONL. May be repeated.")
    ] = None,
    pool: Annotated[
        Path | None, typer.Option("--pool", metavar="POOL", help="Judged samples to take pass rates from.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Draw samples and guesses with this model: pass rates, guess filter.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-k", min=1, help="Samples per problem for its rate.")] = 10,
    guesses: Annotated[int, typer.Option("--guesses", min=1, help="Guesses without thought per problem.")] = 8,
    keep_forms: Annotated[bool, typer.Option("--keep-forms", help="Keep multiple choice, yes or no, proofs.")] = False,
    keep_duplicates: Annotated[bool, typer.Option("--keep-duplicates", help="Keep near duplicates.")] = False,
    drop_unsolved: Annotated[bool, typer.Option("--drop-unsolved", help="Drop what is never right.")] = False,
    drop_solved: Annotated[bool, typer.Option("--drop-solved", help="Drop what is always right.")] = False,
    task: TaskOption = None,
    temperature: TemperatureOption = 1.0,
    max_tokens: MaxTokensOption = 256,
    batch_size: BatchOption = 256,
    engine: EngineOption = "transformers",
    replicas: ReplicasOption = 1,
    vllm: VllmOption = None,
    server: ServerOption = None,
    prompt_suffix: SuffixOption = "",
    seed: RootSeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Clean a set of problems: forms that are guessed, leaks, near duplicates, difficulty."""
    from recipes import direct, upkeep
    from recipes.console import open_report, show
    from recipes.engines import choose

    if pool is not None and model is not None:
        raise typer.BadParameter("give either --pool or --model: both say where pass rates come from")
    told = upkeep.Curation(
        tuple(against or ()), keep_forms, keep_duplicates, None if pool is None else direct.pool_folder(pool),
        None if model is None else direct.check_model(model), samples, guesses, drop_unsolved, drop_solved,
    )  # fmt: skip
    drawer = choose(engine, batch_size, replicas, vllm or (), server)
    draw = direct.Draw(samples, temperature, 1.0, max_tokens, drawer, seed, prompt_suffix)
    chosen = direct.problem_set(problems, "all", None, task)
    with open_report() as report:
        found = upkeep.curate(
            told, chosen, out, draw, lambda step, done, total: report.stage_progress(step, done, total, "problems")
        )
    value = {"out": str(out), **found.summary()}
    lines = [f"{len(found.kept)} of {value['read']} problems kept in {out / 'problems.jsonl'}"]
    lines += [f"  {reason}: {number}" for reason, number in found.reasons.items()]
    show(value, "\n".join([*lines, f"examples and evidence: {out / 'report.md'}"]), as_json)


app.command("budget")(budget_command)
app.command("compare")(compare_command)
app.command("export")(export_command)
app.command("plan")(plan_command)
app.command("preflight")(preflight_command)
app.command("preview")(preview_command)
app.command("r1-eval")(r1_eval_command)


# --- the machine -----------------------------------------------------------------------------------------------------


@app.command()
def doctor(
    runs: RunsOption = RUNS,
    speed: Annotated[
        str | None, typer.Option("--speed", metavar="ENGINE", help="Also measure an engine: transformers or vllm.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What works on this machine: versions, devices, folders, speed. Exit code 3 if something is broken."""
    from dataclasses import asdict

    from recipes.console import columns, show
    from recipes.doctor import examine
    from recipes.engines import choose

    checks = examine(runs, None if speed is None else choose(speed, 256, 1, ()))
    defects = sum(check.status == "defect" for check in checks)
    table = columns(["check", "", "found"], [[check.name, check.status, check.detail] for check in checks])
    verdict = f"{defects} defects" if defects else "no defect"
    show({"checks": [asdict(check) for check in checks], "defects": defects}, f"{table}\n\n{verdict}", as_json)
    if defects:
        raise typer.Exit(EXIT_DEFECT)


def main() -> None:
    """The entry point of the `reason` command."""
    # Small models meet a barrier between threads thousands of times a second. By default each thread spins there for
    # long, so one other busy process makes a run ten times slower; a short spin costs nothing on an idle machine.
    # Read by OpenMP when torch is loaded, so it is set before that.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    try:
        app()
    except SystemExit as leaving:
        if "WORLD_SIZE" not in os.environ:
            raise
        from rl.ranks import end_process

        end_process(leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None))


if __name__ == "__main__":
    main()
