"""`reason sample` and `evaluate`: one model, without a recipe; and the pools that other commands read.

Arguments are checked before torch is imported, so a misspelt path is refused at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.engines import EngineChoice, open_engine
from recipes.tasks import open_task, read_problem_file, require_answers, section_for
from rl.tasks import tiny
from rl.tasks.base import Task, split_of
from rl.types import Completion, Problem, RolloutGroup

if TYPE_CHECKING:
    from rl.samplers.base import SampleRequest, SamplingSettings

SPLITS = ("train", "dev", "test", "all")
TINY_LEVELS = (2, 3, 4)
TINY_COUNT = 400


@dataclass(frozen=True, slots=True)
class ProblemSet:
    """Problems and how their answers are judged."""

    problems: tuple[Problem, ...]
    task: Task


@dataclass(frozen=True, slots=True)
class Draw:
    """How completions are drawn: `Draw(samples=4, temperature=1.0, top_p=1.0, max_tokens=256)`."""

    samples: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    engine: EngineChoice = field(default_factory=EngineChoice)
    seed: int = 0
    suffix: str = ""
    force_think: bool = False  # open the thought in the prompt where the model's template does not


class NoEngine:
    """In the place of a sampler where every sample is there: to judge them takes no engine and no GPU."""

    policy_version = 0

    def sample(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        report: Callable[[int], None] = lambda finished: None,
    ) -> list[Completion]:
        raise RuntimeError(f"{len(requests)} samples are missing from a pool that was full: has it been changed?")


def problem_set(source: str, split: str | None = None, count: int | None = None, task: str | None = None) -> ProblemSet:
    """The problems that the command line names: `tiny` (400 of its test split), a file or a hub id (all of it).

    Raises BadProblems for a bad file, ValueError for a wrong task, a wrong split or an empty one.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"--split must be one of {', '.join(SPLITS)}, not {split[:40]!r}")
    if source == "puzzles":
        raise ValueError("puzzles are named in a recipe: problems: {source: puzzles, puzzles: {sets: [...]}}")
    if source == "tiny":
        if task is not None:
            raise ValueError("--task: the tiny world has its own judge")
        if split == "all":
            raise ValueError("--split all: the tiny world has no end; choose train, dev or test")
        return ProblemSet(tuple(tiny.problems(split or "test", count or TINY_COUNT, TINY_LEVELS)), tiny.TASK)
    section = section_for(source, task)
    problems = read_problem_file(section, source)
    if split not in (None, "all"):
        problems = [problem for problem in problems if split_of(problem) == split]
    if not problems:
        raise ValueError(f"{source} has no problem in the {split} split: give it more problems, or --split all")
    chosen = problems[:count]
    require_answers(section, source, chosen)
    return ProblemSet(tuple(chosen), open_task(section))


def check_model(model: str) -> str:
    """A model folder, or a hub id (org/name); ValueError for anything else."""
    if Path(model).is_dir():
        for folder in (Path(model), Path(model) / "model"):  # a stage's folder holds its model in model/
            if (folder / "config.json").is_file():
                return str(folder)
        raise ValueError(f"{model} is not a model folder: it has no config.json")
    if model.startswith((".", "/", "~")) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model, re.ASCII):
        raise ValueError(f"there is no folder {model}, and it is not a hub id (org/name)")
    return model


def pool_folder(path: str | Path) -> Path:
    """A pool's folder, or the folder of the stage that holds it; ValueError for anything else."""
    for folder in (Path(path), Path(path) / "pool"):
        if (folder / "pool.json").is_file():
            return folder
    raise ValueError(f"{path} holds no pool: it has neither pool.json nor pool/pool.json")


def sample(
    model: str,
    chosen: ProblemSet,
    out: Path,
    draw: Draw,
    progress: Callable[[int, int], None],
    part: tuple[int, int] | None = None,
) -> tuple[RolloutGroup, ...]:
    """Fill the pool in `out` up to `draw.samples` of each problem; what is there is not drawn again.

    `part`: (index, number) of one of several processes that divide the problems; its pool lies below `out`.
    """
    from recipes.stage_inputs import model_fingerprint
    from rl.policy import load_tokenizer
    from rl.pool import Pool, fill_pool, pool_address
    from rl.pool_parts import part_folder, part_of
    from rl.prompts import force_think
    from rl.samplers.base import SamplingSettings

    settings = SamplingSettings(draw.temperature, draw.top_p, draw.max_tokens)
    tokenizer = load_tokenizer(model)
    if draw.force_think:
        force_think(tokenizer)
    address = pool_address(
        model_fingerprint(model), chosen.problems, tokenizer, settings, draw.seed, draw.suffix,
        native=draw.engine.request,
    )  # fmt: skip
    out = out if part is None else part_folder(out, part)
    out.mkdir(parents=True, exist_ok=True)
    pool = Pool.open(out, address)
    full = not pool.missing(part_of(chosen.problems, part), draw.samples)
    with nullcontext(NoEngine()) if full else open_engine(draw.engine, model, tokenizer) as sampler:
        fill_pool(
            pool,
            sampler,
            tokenizer,
            chosen.problems,
            chosen.task,
            draw.samples,
            settings,
            draw.seed,
            suffix=draw.suffix,
            shard_size=draw.engine.shard_size(draw.samples * len(chosen.problems)),
            progress=progress,
            part=part,
        )
    return tuple(pool.groups(part_of(chosen.problems, part), chosen.task.verifier_version, draw.samples))


def read_pool(folder: Path, chosen: ProblemSet) -> tuple[RolloutGroup, ...]:
    """The judged groups of a pool, on the given problems."""
    from rl.pool import Pool

    return tuple(Pool.open(folder).groups(chosen.problems, chosen.task.verifier_version))


def evaluate(
    groups: Sequence[RolloutGroup], chosen: ProblemSet, parent: Path | None = None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The summary of judged groups and, with a parent's pool, the paired difference, as JSON values."""
    from rl.evaluate import compare, summarize

    difference = None if parent is None else compare(groups, read_pool(parent, chosen)).to_json()
    return summarize(groups, chosen.task).to_json(), difference
