"""`reason budget`: what a thinking budget costs and buys, on the samples of a pool.

    reason budget MODEL PROBLEMS --pool POOL --budgets 16,32,64           cut every thought there, and answer
    reason budget MODEL PROBLEMS --pool POOL --budgets 16,32,64 --free    count what is right and short enough
    reason budget MODEL PROBLEMS --pool POOL --wait 2 --max-think 128     draw again with held thoughts, and compare

`cli.py` registers `budget_command`. Arguments are checked before torch is imported, so a misspelt path is refused at
once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recipes.options import (
    BatchOption,
    CountOption,
    EngineOption,
    JsonOption,
    ServerOption,
    SplitOption,
    TaskOption,
    VllmOption,
)

if TYPE_CHECKING:
    from recipes.direct import ProblemSet
    from recipes.engines import EngineChoice
    from rl.budget import ThinkingControl
    from rl.budget_curve import BudgetCurve
    from rl.pool import PoolAddress
    from rl.stats import Estimate
    from rl.types import RolloutGroup

Progress = Callable[[int, int], None]  # done, total


@dataclass(frozen=True, slots=True)
class Answering:
    """How answers are drawn. None: as the pool was. `Answering(tokens=64, temperature=0.1)`"""

    tokens: int = 64
    temperature: float | None = None
    closing: str | None = None
    seed: int = 0


def budget_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model of the pool: a folder or a hub id.")],
    problems: Annotated[
        str, typer.Argument(metavar="PROBLEMS", help="The problems of the pool: `tiny`, a file or a hub id.")
    ],
    pool: Annotated[
        Path, typer.Option("--pool", metavar="POOL", help="A pool's folder, or the stage's that holds it.")
    ],
    budgets: Annotated[
        str | None, typer.Option("--budgets", metavar="N,N,..", help="Tokens of thought, such as 16,32,64.")
    ] = None,
    free: Annotated[
        bool, typer.Option("--free", help="Draw nothing: count what is right within so many tokens in all.")
    ] = False,
    wait: Annotated[
        int | None, typer.Option("--wait", min=0, help="Replace an early end of the thought so many times.")
    ] = None,
    max_think: Annotated[
        int | None, typer.Option("--max-think", min=1, help="Close a thought by force after so many tokens.")
    ] = None,
    min_think: Annotated[
        int | None, typer.Option("--min-think", min=1, help="With --wait: an end before that is early  [every end is]")
    ] = None,
    wait_text: Annotated[
        str, typer.Option("--wait-text", help="What replaces an early end; tiny knows ' wait '.")
    ] = "Wait",
    closing_text: Annotated[
        str | None, typer.Option("--closing-text", help="What closes a thought  [</think>, as the template has it]")
    ] = None,
    answer_tokens: Annotated[
        int, typer.Option("--answer-tokens", min=1, help="Longest answer behind a forced closing.")
    ] = 64,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Of the answers at the budgets  [the pool's]")
    ] = None,
    task: TaskOption = None,
    split: SplitOption = None,
    count: CountOption = None,
    batch_size: BatchOption = 256,
    engine: EngineOption = "transformers",
    vllm: VllmOption = None,
    server: ServerOption = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Root seed of the answers at the budgets.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Accuracy as a function of the thinking budget, or with thoughts made longer or shorter by force."""
    from recipes import direct
    from recipes.console import open_report, show
    from recipes.engines import choose
    from rl.budget import ThinkingControl

    drawer = choose(engine, batch_size, 1, vllm or (), server)
    held = wait is not None or max_think is not None or min_think is not None
    if held == (budgets is not None):
        raise typer.BadParameter("give either --budgets, or --wait and --max-think")
    if free and held:
        raise typer.BadParameter("--free draws nothing, --wait and --max-think do: give one of them")
    wanted = () if budgets is None else parse_budgets(budgets)
    control = ThinkingControl(max_think, wait or 0, min_think, wait_text, closing_text, answer_tokens)
    name, folder = direct.check_model(model), direct.pool_folder(pool)
    chosen = direct.problem_set(problems, split, count, task)
    answering = Answering(answer_tokens, temperature, closing_text, seed)
    told = {"model": model, "problems": problems, "pool": str(folder)}
    with open_report() as report:

        def progress(done: int, total: int) -> None:
            report.stage_progress("drawing", done, total, "completions")

        if held:
            value = controlled(name, chosen, folder, control, drawer, progress)
            text = controlled_text(value)
        else:
            found = (
                free_curve(chosen, folder, wanted)
                if free
                else curve(name, chosen, folder, wanted, answering, drawer, progress)
            )
            value, text = {"free": free, "curve": found.to_json()}, curve_text(found)
    show(told | value, text, as_json)


def parse_budgets(text: str) -> tuple[int, ...]:
    """`parse_budgets("16,32,64") == (16, 32, 64)`; ValueError for anything that is not numbers from 1 on."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise ValueError(f"--budgets must be numbers of tokens such as 16,32,64, not {text[:60]!r}")
    return tuple(map(int, parts))


def free_curve(chosen: ProblemSet, folder: Path, budgets: Sequence[int]) -> BudgetCurve:
    """The curve of a pool without a model."""
    from recipes.direct import read_pool
    from rl.budget_curve import truncated_accuracy

    return truncated_accuracy(read_pool(folder, chosen), budgets)


def curve(
    model: str,
    chosen: ProblemSet,
    folder: Path,
    budgets: Sequence[int],
    answering: Answering,
    engine: EngineChoice,
    progress: Progress,
) -> BudgetCurve:
    """The curve of a pool, answers drawn by its model."""
    from recipes.engines import open_engine
    from rl.budget_curve import budget_curve
    from rl.policy import load_tokenizer
    from rl.samplers.base import SamplingSettings

    address, groups = _open(model, chosen, folder)
    temperature = address.temperature if answering.temperature is None else answering.temperature
    settings = SamplingSettings(temperature, address.top_p, answering.tokens)
    tokenizer = load_tokenizer(model)
    with open_engine(engine, model, tokenizer) as sampler:
        return budget_curve(
            groups, sampler, tokenizer, chosen.task, budgets, settings, answering.seed, answering.closing, progress
        )


def controlled(
    model: str, chosen: ProblemSet, folder: Path, control: ThinkingControl, engine: EngineChoice, progress: Progress
) -> dict[str, Any]:
    """The pool drawn again under control, its summary, and the paired difference to the pool, as JSON values."""
    from recipes.engines import open_engine
    from rl.budget import force_groups, is_forced
    from rl.evaluate import compare, summarize
    from rl.policy import load_tokenizer
    from rl.samplers.base import SamplingSettings

    address, groups = _open(model, chosen, folder)
    settings = SamplingSettings(address.temperature, address.top_p, address.max_tokens)
    tokenizer = load_tokenizer(model)
    total = sum(len(group.rollouts) for group in groups)
    with open_engine(engine, model, tokenizer) as sampler:
        held = force_groups(
            groups, sampler, tokenizer, chosen.task, settings, control, address.seed, lambda done: progress(done, total)
        )
    forced = [is_forced(rollout.completion) for group in held for rollout in group.rollouts]
    return {
        "control": asdict(control),
        "forced": sum(forced) / len(forced),
        "pool_summary": summarize(groups, chosen.task).to_json(),
        "summary": summarize(held, chosen.task).to_json(),
        "difference": compare(held, groups).to_json(),
    }


def _open(model: str, chosen: ProblemSet, folder: Path) -> tuple[PoolAddress, tuple[RolloutGroup, ...]]:
    """How a pool was drawn, and its groups; ValueError if another model drew it."""
    from recipes.direct import read_pool
    from recipes.stage_inputs import model_fingerprint
    from rl.pool import Pool

    address, found = Pool.open(folder).address, model_fingerprint(model)
    if found != address.model:
        raise ValueError(
            f"{folder} holds samples of another model ({address.model[:12]}) than {model} ({found[:12]}): a thought "
            "must be answered by the model that wrote it; give that model, or fill a pool with this one"
        )
    return address, read_pool(folder, chosen)


def curve_text(curve: BudgetCurve) -> str:
    """The table of a curve, for people."""
    from recipes.console import columns

    rows = [
        [
            str(point.budget),
            _interval(point.accuracy, 3),
            _interval(point.tokens, 1),
            f"{point.cut:.1%}",
            *([str(point.undecided)] if any(point.undecided for point in curve.points) else []),
        ]
        for point in curve.points
    ]
    head = ["budget", "accuracy", "tokens, mean", "cut", *(["undecided"] if len(rows[0]) > 4 else [])]
    return "\n".join(
        [
            columns(head, rows),
            "",
            f"area over log2(budget)  {_interval(curve.area, 3)}",
            f"{curve.num_completions} completions of {curve.num_problems} problems, {curve.drawn} tokens drawn",
        ]
    )


def controlled_text(value: Mapping[str, Any]) -> str:
    """The pool and the completions drawn under control, for people."""
    from recipes.console import columns

    names = (("the pool", "pool_summary"), ("controlled", "summary"))
    rows = [
        [
            name,
            _interval(summary["accuracy"], 3),
            _interval(summary["tokens"]["mean"], 1),
            f"{summary['truncated']:.1%}",
        ]
        for name, summary in ((name, value[key]) for name, key in names)
    ]
    difference = value["difference"]
    rows.append(["difference", _interval(difference["accuracy"], 3), _interval(difference["tokens"], 1), ""])
    table = columns(["", "accuracy", "tokens, mean", "truncated"], rows)
    return f"{table}\n\n{value['forced']:.1%} of the completions hold forced tokens"


def _interval(estimate: Estimate | Mapping[str, float], digits: int) -> str:
    value, low, high = estimate.values() if isinstance(estimate, Mapping) else astuple(estimate)
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
