"""Runs the stages of a recipe in order, and runs nothing twice.

Every stage has an address, `<stage>-<hash8>`: a hash of its method, its resolved config, the seed and what it reads.
A finished folder at that address is reused. A partial one, left by a run that was stopped, is gone on with. Else the
stage runs. Addresses depend on no output, so all of them are known before the first stage starts.

    results = run_recipe(load_recipe("tiny"), root=Path("runs"), methods=METHODS, report=report)

Of several processes (rl/ranks.py) the first plans, locks, reports and runs. The others wait until they are told of a
stage whose method is one of `collective`; that they run together with the first.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from recipes.model_card import model_card
from recipes.schema import Recipe, Reference, Stage, read_reference
from rl.faults import fault
from rl.ranks import ALONE, AnotherRankFailed, Ranks
from rl.runs import CARD, RunLock, StageFolder, file_hash, model_hash, stage_hash, write_file

# Part of every address. Raise it when a change of code makes finished stages wrong, not when it only makes new ones
# faster: a teacher may have taken days.
FORMAT = "1"

# Keys that, but for rounding, never change what a stage makes. They are left out of the address, so that a run that was
# killed for want of memory goes on from its checkpoint with smaller micro-batches.
EXECUTION_KEYS = ("micro_batch_tokens", "gradient_checkpointing", "shard", "packing", "chunked_loss")


class StageFailed(RuntimeError):
    """A stage raised. The message names the stage and its cause, which is `__cause__` as well, and the process if it is
    not the first."""

    def __init__(self, stage: str, cause: Exception, rank: int = 0) -> None:
        where = f" on rank {rank}" if rank else ""
        super().__init__(f"stage {stage} failed{where}: {type(cause).__name__}: {cause}")
        self.stage = stage


class Status(StrEnum):
    """What becomes of a stage in this run."""

    RAN = "ran"
    RESUMED = "resumed"  # it goes on in the partial folder of a run that was stopped
    REUSED = "reused"  # it was finished before


@dataclass(frozen=True, slots=True)
class StageResult:
    """One finished stage.

    Example: `StageResult("teacher", "grpo", Path("runs/tiny/teacher-0a1b2c3d"), Status.RAN, 171.2)`
    """

    name: str
    method: str
    folder: Path
    status: Status
    seconds: float  # wall time of the attempt that finished it; for a reused stage, that of then


class Report(Protocol):
    """Who is told how a run goes on: progress bars of the command line, or a test. `position` counts from 1."""

    def stage_started(self, name: str, method: str, position: int, total: int, status: Status) -> None:
        """A stage starts from nothing (RAN) or goes on (RESUMED)."""
        ...

    def stage_progress(self, name: str, done: int, total: int, note: str) -> None:
        """`done` of `total` steps, samples or arms of the running stage are done."""
        ...

    def stage_finished(self, result: StageResult, position: int, total: int) -> None:
        """A stage is finished; for a reused one there was no `stage_started`."""
        ...


@dataclass(frozen=True, slots=True)
class StageContext:
    """What a stage function gets. It writes into `folder` and returns nothing."""

    name: str  # of the stage
    stage: Any  # its keys, every default filled in: a class of recipes/methods.py
    recipe: Recipe
    folder: Path  # partial; holds what an earlier attempt left, if there was one
    inputs: Mapping[
        str, Path
    ]  # stage name -> finished folder, for all that this stage reads, directly or through others
    report: Report
    ranks: Ranks = ALONE  # the processes that run the stage together

    @property
    def seed(self) -> int:
        """The stage's own seed, drawn from the recipe's seed and the stage's name: 0 <= seed < 2^31."""
        digest = hashlib.sha256(f"{self.recipe.seed}/{self.name}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1

    @property
    def problems_file(self) -> Path | None:
        """The recipe's JSONL file of problems, absolute; None for the tiny world and for a stage that makes them."""
        return self.recipe.problems_file

    def model(self, ref: str) -> str:
        """What `from_pretrained` takes for a model reference of this stage's keys.

        A stage gives `<its folder>/model`, `stage@20` `<its folder>/models/20`, a folder its absolute path, a hub id
        (org/name) itself. ValueError for a further model that the stage did not come to make.
        """
        reference = read_reference(ref, self.recipe.path.parent, "model", "model")
        if reference.kind == "stage" and reference.part is not None:
            return str(_one_of(self.inputs[reference.ref] / "models", reference))
        if reference.kind == "stage":
            return str(self.inputs[ref] / "model")
        return ref if reference.path is None else str(reference.path)

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Report `done` of `total`; `note` is a few words to show beside it. Only the first process is heard."""
        if self.ranks.first:
            self.report.stage_progress(self.name, done, total, note)


def _one_of(folder: Path, reference: Reference) -> Path:
    """A further model of a stage. One that the recipe promises may be missing: the run may have ended early."""
    assert reference.part is not None
    found = folder / reference.part
    if not found.is_dir():
        there = sorted((path.name for path in folder.glob("*")), key=lambda name: (len(name), name))
        has = f"it has {', '.join(there)}" if there else "it has none"
        raise ValueError(
            f"stage {reference.ref} ended without the model {reference.written}; {has}: it was stopped early, so name "
            f"one of these, or {reference.ref}"
        )
    return found


StageFunction = Callable[[StageContext], None]


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A stage with its address, before it runs."""

    stage: Stage
    folder: StageFolder
    config: Mapping[str, Any]  # for the manifest: all that the recipe says of this stage
    inputs: Mapping[str, str]  # for the manifest: key of the stage -> "<reference> <hash>"
    reads: frozenset[str]  # stage names, direct and indirect


def plan_stages(recipe: Recipe, *, root: Path, targets: Sequence[str] | None = None) -> list[PlannedStage]:
    """The address of every stage of a recipe, or of `targets` and all they read, in running order.

    `root` is the folder of all runs; this recipe's stages live in `root / recipe.name`. A stage that is read counts
    with its hash, a model folder or a problem file with its content, so neither its name nor its place matters.
    """
    content: dict[Path, str] = {}  # the same base model is read by many stages and hashed once
    planned: dict[str, PlannedStage] = {}
    for stage in recipe.with_needs(targets if targets is not None else recipe.stages):
        hashes: dict[str, str] = {}
        described: dict[str, str] = {}
        reads: set[str] = set()
        for reference in stage.references():
            if reference.kind == "stage":
                reads |= {reference.ref} | planned[reference.ref].reads
                hashes[reference.key] = planned[reference.ref].folder.hash
            else:
                hashes[reference.key] = _content_hash(reference, content)
            described[reference.key] = f"{reference.written} {hashes[reference.key]}"
            if reference.part is not None:
                hashes[reference.key] += f"@{reference.part}"
        # The name is in because the stage's seed is drawn from it.
        identity: dict[str, Any] = recipe.identity(stage) | {"name": stage.name}
        keys = stage.config.model_dump(mode="json")
        counted = {key: value for key, value in identity["config"].items() if key not in EXECUTION_KEYS}
        address = stage_hash(stage.method, identity | {"config": counted}, hashes, FORMAT)
        folder = StageFolder(root / recipe.name, stage.name, address)
        planned[stage.name] = PlannedStage(stage, folder, identity | {"config": keys}, described, frozenset(reads))
    return list(planned.values())


def run_recipe(
    recipe: Recipe,
    *,
    root: Path,
    methods: Mapping[str, StageFunction],
    report: Report,
    targets: Sequence[str] | None = None,
    verify: bool = False,
    ranks: Ranks = ALONE,
    collective: Collection[str] = (),
) -> list[StageResult]:
    """Run the stages of a checked recipe that are not finished yet; returns a result per stage, in running order.

    `targets` names the stages that are wanted, None all of them. With `verify` the files of a reused folder are
    compared with its manifest. One run at a time works in `root / recipe.name`.

    Every one of `ranks` calls this with the same arguments and the same folders. Stages of `collective` methods run on
    all of them, the others on the first; only the first has results and tells `report` anything.

    Errors: RunLocked names who runs there already; StageFailed names the stage that raised, whose partial folder stays,
    so that the same call goes on in it; DamagedFolder names files that are not those of the manifest; AnotherRankFailed
    on every rank but the one whose error is the cause of the others'.
    """
    unknown = sorted({stage.method for stage in recipe.stages.values()} - methods.keys())
    if unknown:
        raise ValueError(f"recipe {recipe.name}: no stage function for method {unknown[0]}")
    try:
        if not ranks.first:
            _follow(recipe, methods, report, ranks)
            return []
        with RunLock(root / recipe.name):
            plan = plan_stages(recipe, root=root, targets=targets)
            results = _lead(plan, recipe, methods, report, verify, ranks, collective)
        ranks.from_first(None)
        return results
    except Exception as error:
        if not ranks.first_to_fail():
            raise AnotherRankFailed(f"rank {ranks.rank} ends because another one failed") from error
        raise


def _lead(
    plan: Sequence[PlannedStage],
    recipe: Recipe,
    methods: Mapping[str, StageFunction],
    report: Report,
    verify: bool,
    ranks: Ranks,
    collective: Collection[str],
) -> list[StageResult]:
    """Run what is not finished, tell the other ranks of the stages that they take part in."""
    results: list[StageResult] = []
    folders = {planned.stage.name: planned.folder.final for planned in plan}
    for position, planned in enumerate(plan, 1):
        stage = planned.stage
        result = _reuse(planned, verify)
        if result is None:
            resumed = planned.folder.partial.exists()
            status = Status.RESUMED if resumed else Status.RAN
            report.stage_started(stage.name, stage.method, position, len(plan), status)
            inputs = {name: folders[name] for name in folders if name in planned.reads}
            own = ranks if stage.method in collective else ALONE
            result = _run(planned, recipe, inputs, methods[stage.method], report, status, own)
        results.append(result)
        report.stage_finished(result, position, len(plan))
    return results


def _follow(recipe: Recipe, methods: Mapping[str, StageFunction], report: Report, ranks: Ranks) -> None:
    """Take part in the stages that the first rank tells of, until it has no more."""
    while (told := ranks.from_first()) is not None:
        stage = recipe.stages[told["stage"]]
        inputs = {name: Path(folder) for name, folder in told["inputs"].items()}
        folder = Path(told["folder"])
        try:
            methods[stage.method](StageContext(stage.name, stage.config, recipe, folder, inputs, report, ranks))
        except Exception as error:
            raise StageFailed(stage.name, error, ranks.rank) from error


def _reuse(planned: PlannedStage, verify: bool) -> StageResult | None:
    """The result of a stage that was finished before, or was killed when only its rename was missing; else None."""
    if not planned.folder.recover():
        return None
    if verify:
        planned.folder.verify()
    seconds = planned.folder.manifest()["seconds"]
    return StageResult(planned.stage.name, planned.stage.method, planned.folder.final, Status.REUSED, seconds)


def _run(
    planned: PlannedStage,
    recipe: Recipe,
    inputs: Mapping[str, Path],
    function: StageFunction,
    report: Report,
    status: Status,
    ranks: Ranks,
) -> StageResult:
    stage = planned.stage
    started = time.perf_counter()
    try:
        folder = planned.folder.open()
        fault("stage.start")
        if ranks.world > 1:
            paths = {name: str(path) for name, path in inputs.items()}
            ranks.from_first({"stage": stage.name, "folder": str(folder), "inputs": paths})
        function(StageContext(stage.name, stage.config, recipe, folder, inputs, report, ranks))
        if (folder / "model").is_dir():
            write_file(folder / "model" / CARD, model_card(recipe, stage, planned.inputs), "stage.card")
        fault("stage.end")
        seconds = time.perf_counter() - started
        final = planned.folder.commit(
            method=stage.method, config=planned.config, inputs=planned.inputs, seconds=seconds
        )
    except Exception as error:
        raise StageFailed(stage.name, error) from error
    return StageResult(stage.name, stage.method, final, status, round(seconds, 3))


def _content_hash(reference: Reference, known: dict[Path, str]) -> str:
    """What a reference to something outside the recipe counts as: its content, or for a hub id its name."""
    if reference.path is None:
        return reference.ref
    if reference.path not in known:
        if reference.path.is_dir():
            known[reference.path] = model_hash(reference.path)
        else:
            known[reference.path] = file_hash(reference.path)
    return known[reference.path]
