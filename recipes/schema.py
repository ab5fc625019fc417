"""From a recipe file to a checked `Recipe`: keys, overrides, references between stages, and what is on the disk.

    recipe = load_recipe("tiny", overrides=["teacher.steps=5"], seed=1)
    recipe.stages["teacher"].config.steps   # 5
    recipe.stages["teacher"].references()   # [Reference(kind="folder", ref="./models/tiny-base", ...)]

Everything that can be known before anything runs is checked here, without torch, in milliseconds. What is wrong is
listed together, each with its file, line, key and likely spelling (`recipes.loader.RecipeError`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from recipes.explain import explain, listed, override, split_key
from recipes.keys import Keys, SamplingKeys, StageKeys
from recipes.loader import Document, Fault, RecipeError, describe, likely, read_recipe_file
from recipes.long2short_keys import Pairs, Shortest
from recipes.methods import METHOD_KEYS, AnyStage, Evaluate, Frontier, Pretrain, Sample, Sft
from recipes.policy_keys import PolicyKeys
from recipes.presets import fill_in_presets
from recipes.problem_keys import Problems, is_path, source_kind
from recipes.r1_keys import MadeTraces
from recipes.rl_keys import FromPool
from recipes.sampling_keys import Sampling
from recipes.trace_keys import ImportTraces, Traces
from rl.sources import is_saved_dataset

RECIPES_FOLDER = Path(__file__).resolve().parent
RESERVED = ("name", "description", "seed", "problems", "sampling", "stages")
TINY_LEVELS = (2, 3, 4)
MORE_MODELS = "further ones have RL stages with keep_models: true, and merge_search"
FROM_ENVIRONMENT = r"\$[A-Za-z_][A-Za-z0-9_]*/."

StageName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,63}$")]


class RecipeFile(Keys):
    """A `reason` recipe: named stages, each with a method, run in the order in which they are written."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    """Name of the recipe, also of its folder of runs."""
    description: Annotated[str, Field(max_length=1000)] = ""
    """One sentence for `reason recipes list`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Root seed; every other seed is derived from it."""
    problems: Problems
    """Where the problems come from."""
    sampling: Sampling = Sampling()
    """Defaults for every stage that samples."""
    stages: Annotated[dict[StageName, Annotated[AnyStage, Field(discriminator="method")]], Field(min_length=1)]
    """The stages by name. A stage may only name stages that are written before it."""


# --- the checked recipe ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reference:
    """Something that a stage reads.

    Example: `Reference("stage", "teacher", key="model", wants="model")`,
    `Reference("folder", "./models/base", "model", "model", Path("/home/me/models/base"))`.
    """

    kind: Literal["stage", "folder", "hub", "file"]
    ref: str  # as written in the recipe; for a stage its name
    key: str  # the key of the stage that names it: "model", "arms.base", "candidates[0]", "problems.source"
    wants: str  # what it must be: model, pool, traces, pairs, evaluation, problems, file
    path: Path | None = None  # absolute, for a folder or a file; None for `$NAME/...` where NAME is not set
    part: str | None = None  # which of a stage's further models: "20" of `teacher@20`

    @property
    def written(self) -> str:
        """As in the recipe: `teacher@20`."""
        return self.ref if self.part is None else f"{self.ref}@{self.part}"


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of a checked recipe. `config` has every default filled in, those from `sampling` and `problems` too."""

    name: str
    config: Any  # one of the classes of recipes/methods.py, told apart by `method`
    inputs: tuple[Reference, ...]
    hidden: bool = False  # an evaluation that a frontier stage expanded into, named `<frontier>.<arm>`

    @property
    def method(self) -> str:
        return self.config.method

    @property
    def makes(self) -> str | None:
        """What other stages can read from this one: model, problems, pool, traces, pairs, evaluation, frontier."""
        return self.config.MAKES

    def references(self) -> list[Reference]:
        return list(self.inputs)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe that can be run: every reference leads somewhere, every key is filled in."""

    name: str
    seed: int
    path: Path  # the recipe file, absolute; relative references start from its folder
    description: str
    problems: Problems
    sampling: Sampling
    stages: dict[str, Stage]  # in running order, the hidden ones before the frontier they belong to

    @property
    def problems_file(self) -> Path | None:
        """The file of problems that the recipe names; None for another source, and for `$NAME/...` without NAME."""
        if source_kind(self.problems.source) != "file":
            return None
        return file_reference(self.problems.source, self.path.parent, "problems.source").path

    def stage_names(self) -> list[str]:
        """The names of the stages as written in the file, without the hidden ones."""
        return [stage.name for stage in self.stages.values() if not stage.hidden]

    def stage(self, name: str) -> Stage:
        if name not in self.stages:
            known = self.stage_names()
            hint = likely(name, self.stages) or f"; its stages are {listed(known)}"
            raise RecipeError(f"there is no stage {name[:64]!r} in recipe {self.name}{hint}", self.path.name)
        return self.stages[name]

    def with_needs(self, names: Iterable[str]) -> list[Stage]:
        """The named stages and everything they read, directly or not, in running order."""
        wanted: set[str] = set()
        waiting = [self.stage(name) for name in names]
        while waiting:
            stage = waiting.pop()
            if stage.name not in wanted:
                wanted.add(stage.name)
                waiting += [self.stages[read.ref] for read in stage.inputs if read.kind == "stage"]
        return [stage for stage in self.stages.values() if stage.name in wanted]

    def part(self, word: Literal["rl", "distill", "long2short"]) -> list[str]:
        """The names of the stages that a command names, without what they need; RecipeError if there is none.

        rl: grpo. distill: traces, mix, import_traces, worked_solutions, the sft on them, on_policy, teacher_logits,
        logit_distill. long2short: merge, merge_search, shortest, race and the sft on them, pairs, dpo, simpo,
        length_rl, on_policy, select, frontier.
        """
        methods = {
            "rl": {"grpo"},
            "distill": {
                "traces", "mix", "import_traces", "worked_solutions", "on_policy", "teacher_logits", "logit_distill",
            },
            "long2short": {
                "merge", "merge_search", "shortest", "race", "pairs", "dpo", "simpo", "length_rl", "on_policy",
                "select", "frontier",
            },
        }  # fmt: skip
        reads = {
            "rl": (),
            "distill": ("traces", "mix", "worked_solutions", "made_traces"),
            "long2short": ("shortest", "race"),
        }[word]
        names = []
        for stage in self.stages.values():
            of_sft = isinstance(stage.config, Sft) and self.stages[stage.config.traces].method in reads
            if stage.method in methods[word] or of_sft:
                names.append(stage.name)
        if not names:
            raise RecipeError(f"recipe {self.name} has no {word} stage", self.path.name)
        return names

    def identity(self, stage: Stage) -> dict[str, Any]:
        """Everything in the recipe that changes what a stage makes, except what it reads, as plain JSON values.

        What it reads is identified by content (`stage.references()`), so neither names nor folders count here, and
        `--set problems.test=50` leaves a stage that never sees test problems as it was.
        """
        exclude: dict[str, Any] = dict.fromkeys(stage.config.REFERENCES, True)
        for key, _, _ in stage.config.nested_references():
            *outer, inner = key.split(".")
            place = exclude
            for name in outer:
                place = place.setdefault(name, {})
            place[inner.partition("[")[0]] = True
        config = stage.config.model_dump(mode="json", exclude=exclude)
        identity: dict[str, Any] = {"seed": self.seed, "config": config}
        if splits := stage.config.splits():
            identity["problems"] = {
                "source": self.problems.source if source_kind(self.problems.source) == "made" else "file",
                "task": self.problems.task,
                **self.problems.judged_by,
                "levels": list(self.problems.levels or ()),
                "prompt_suffix": self.problems.prompt_suffix,
                "at_most": {split: getattr(self.problems, split) for split in splits},
            }
        if isinstance(stage.config, SamplingKeys) and stage.method != "frontier":
            identity |= self.sampling.choice.identity()
        return identity

    def to_json(self) -> dict[str, Any]:
        """The resolved recipe: every default filled in."""
        return {
            "name": self.name,
            "description": self.description,
            "seed": self.seed,
            "problems": self.problems.model_dump(mode="json"),
            "sampling": self.sampling.model_dump(mode="json"),
            "stages": {
                stage.name: stage.config.model_dump(mode="json") for stage in self.stages.values() if not stage.hidden
            },
        }


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, every key with its description."""
    return RecipeFile.model_json_schema()


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with `reason`, by name."""
    return {path.stem: path for path in sorted(RECIPES_FOLDER.glob("*.yaml"))}


def find_recipe(path_or_name: str | Path) -> Path:
    """A path (it has a / or ends in .yaml or .yml), or the bare name of a shipped recipe."""
    text = str(path_or_name)
    if isinstance(path_or_name, Path) or "/" in text or os.sep in text or text.endswith((".yaml", ".yml")):
        return Path(path_or_name)
    shipped = shipped_recipes()
    if text not in shipped:
        hint = likely(text, shipped) or f"; shipped are {listed(shipped)}"
        raise RecipeError(f"no recipe named {text[:64]!r} (a file is named with ./ or .yaml){hint}")
    return shipped[text]


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = (), seed: int | None = None) -> Recipe:
    """Read, override and check a recipe. Raises RecipeError with everything that is wrong with it.

    `overrides` are `key=value` texts: `teacher.steps=5`, `teacher.length.weight=0.3`, `seed=1`, `problems.test=50`;
    the value is read by the rules of a recipe file.
    """
    path = find_recipe(path_or_name)
    document = read_recipe_file(path)
    document.values = json.loads(json.dumps(document.values))  # aliases share values; an override must not
    faults = [fault for text in overrides for fault in override(document, text, RESERVED)]
    if faults:
        raise RecipeError.of(faults)
    if seed is not None:
        document.values["seed"] = seed
        document.options[("seed",)] = "--seed"
    fill_in_presets(document.values)
    return _check(document, path)


def _check(document: Document, path: Path) -> Recipe:
    try:
        file = RecipeFile.model_validate_json(json.dumps(document.values))
    except ValidationError as error:
        raise RecipeError.of(
            [explain(document, item, RecipeFile) for item in error.errors(include_url=False)]
        ) from None
    faults: list[Fault] = []
    folder = Path(os.path.abspath(path)).parent
    problems = file.problems
    if problems.source == "tiny":
        problems = problems.model_copy(update={"levels": problems.levels or TINY_LEVELS})
    else:
        found = _problems_with_source(problems, folder, file.stages)
        faults += [document.fault(("problems", key), message) for key, message in found]
    resolver = _Resolver(document, folder, problems, file.sampling, faults)
    for name, keys in file.stages.items():
        resolver.add(name, keys)
    if faults:
        raise RecipeError.of(faults)
    return Recipe(
        name=file.name,
        seed=file.seed,
        path=Path(os.path.abspath(path)),
        description=file.description,
        problems=problems,
        sampling=file.sampling,
        stages=resolver.stages,
    )


# --- references ------------------------------------------------------------------------------------------------------


def read_reference(ref: str, folder: Path, key: str, wants: str) -> Reference:
    """What a reference in a recipe means: a path starts with ./ ../ or /, another / makes a hub id, else a stage.

    `teacher@20` is the model of step 20 that the stage teacher has kept, `search@2` the second best of a search.
    """
    if is_path(ref):
        return Reference("folder", ref, key, wants, Path(os.path.normpath(folder / ref)))
    if "/" in ref:
        return Reference("hub", ref, key, wants)
    stage, _, part = ref.partition("@")
    return Reference("stage", stage, key, wants, part=part if "@" in ref else None)


def stage_named(ref: str) -> str:
    """The stage that a reference to one names: "teacher" for `teacher@20`."""
    return ref.partition("@")[0]


def file_reference(ref: str, folder: Path, key: str) -> Reference:
    """A file that a stage reads: ./ ../ or / as everywhere, `$NAME/...` in the folder that the environment names.

    Where NAME is not set the path is None: such a recipe can be checked, and the stage that reads the file says what is
    missing. So a shipped recipe may be about data that nobody may ship.
    """
    variable, _, rest = ref.removeprefix("$").partition("/")
    if not ref.startswith("$"):
        path = Path(os.path.normpath(folder / ref)) if is_path(ref) else None
    else:
        path = Path(os.path.abspath(os.environ[variable])) / rest if os.environ.get(variable) else None
    return Reference("file", ref, key, "file", path)


def _problems_with_source(problems: Problems, folder: Path, stages: Collection[str]) -> Iterator[tuple[str, str]]:
    """(key, message) of what is wrong with problems that are not the tiny world's."""
    source = problems.source
    match source_kind(source):
        case "file":
            path = file_reference(source, folder, "source").path
            if path is None and not re.match(FROM_ENVIRONMENT, source):
                yield "source", f"must be a path that starts with ./ ../ / or $NAME/, not {source[:60]!r}"
            elif path is not None and not (path.is_file() or is_saved_dataset(path)):
                yield "source", f"there is no file {source}" + (f" ({path})" if source.startswith("$") else "")
        case "stage" if source not in stages:
            hint = f"; did you mean ./{source}?" if "." in source else likely(source, ["tiny", "puzzles"])
            yield (
                "source",
                "must be tiny, puzzles, a stage, a hub id (org/name), or a path that starts with ./ ../ or /, "
                f"not {source[:40]!r}{hint}",
            )
    if problems.levels is not None:
        yield "levels", "only the tiny world has levels; remove this key"


class _Resolver:
    """Adds stages one by one; a stage can only see those added before it, so there are no cycles."""

    def __init__(
        self, document: Document, folder: Path, problems: Problems, sampling: Sampling, faults: list[Fault]
    ) -> None:
        self.document, self.folder, self.problems, self.sampling = document, folder, problems, sampling
        self.faults = faults
        self.stages: dict[str, Stage] = {}

    def add(self, name: str, keys: StageKeys) -> None:
        def fault(key: str, message: str) -> None:
            self.faults.append(self.document.fault(("stages", name, *split_key(key)), message))

        if name in RESERVED:
            fault("", f"{name!r} cannot be the name of a stage: --set {name}=... already means something else")
        keys = self._filled_in(keys, fault)
        inputs = [self._input(name, key, ref, wants, fault) for key, ref, wants in _references(keys)]
        problems = self._problems_of(name, fault) if keys.splits() else []
        inputs += problems
        self._check_pool(keys, fault)
        if isinstance(keys, Frontier):
            inputs = [self._arm(name, keys, arm, ref, problems) for arm, ref in keys.arms.items()]
        self.stages[name] = Stage(name, keys, tuple(inputs))

    def _filled_in(self, keys: StageKeys, fault: Callable[[str, str], None]) -> StageKeys:
        if isinstance(keys, PolicyKeys) and keys.top_p is None and self.sampling.top_p != 1:
            fault("top_p", f"sampling.top_p is {self.sampling.top_p}, but RL needs 1: write top_p: 1.0 in this stage")
        if isinstance(keys, SamplingKeys):
            values = {key: getattr(keys, key) for key in ("temperature", "top_p", "max_tokens")}
            keys = keys.model_copy(
                update={k: getattr(self.sampling, k) if value is None else value for k, value in values.items()}
            )
            if isinstance(keys, PolicyKeys):
                for key, message in keys.problems_with_limits():
                    fault(key, message)
                if keys.eval_every and keys.eval_max_tokens is None:
                    limits = (self.sampling.max_tokens, self._most_tokens(keys))
                    keys = keys.model_copy(update={"eval_max_tokens": max(limits)})
            return keys
        if isinstance(keys, MadeTraces) and self.problems.source != "tiny":
            fault("method", f"made_traces are of the tiny world, and problems.source is {self.problems.source[:40]}")
        if isinstance(keys, Pretrain) and keys.levels is None:
            if self.problems.levels is None:
                fault("levels", "required, because the problems are not the tiny world's")
            return keys.model_copy(update={"levels": self.problems.levels})
        return keys

    def _most_tokens(self, keys: PolicyKeys) -> int:
        """The longest completion that a stage may train on; a limit read off a pool is at most the pool's own."""
        given = keys.max_tokens
        if isinstance(given, FromPool):
            pool = self.stages.get(given.pool)
            drawn = pool.config.max_tokens if pool is not None and isinstance(pool.config, Sample) else None
            return drawn or 0
        return given or 0

    def _problems_of(self, name: str, fault: Callable[[str, str], None]) -> list[Reference]:
        """Where a stage gets its problems from, as something that it reads: nothing in the tiny world."""
        source, key = self.problems.source, "problems.source"
        match source_kind(source):
            case "file":
                reference = file_reference(source, self.folder, key)
                return [Reference("file", source, key, "problems", reference.path)]
            case "hub":
                return [Reference("hub", source, key, "problems")]
            case "stage" if ("stages", source) in self.document.lines:  # others were refused before
                reference = Reference("stage", source, key, "problems")
                self._check_stage(name, reference, fault)
                return [reference]
        return []

    def _file(self, key: str, ref: str, fault: Callable[[str, str], None]) -> Reference:
        reference = file_reference(ref, self.folder, key)
        if reference.path is None and not re.match(FROM_ENVIRONMENT, ref):
            fault(key, f"must be a path that starts with ./ ../ / or $NAME/, not {ref[:60]!r}")
        elif reference.path is not None and not (reference.path.is_file() or is_saved_dataset(reference.path)):
            fault(key, f"there is no file {ref}" + (f" ({reference.path})" if ref.startswith("$") else ""))
        return reference

    def _input(self, name: str, key: str, ref: str, wants: str, fault: Callable[[str, str], None]) -> Reference:
        if wants == "file":
            return self._file(key, ref, fault)
        reference = read_reference(ref, self.folder, key, wants)
        if reference.kind == "stage":
            self._check_stage(name, reference, fault)
        elif wants not in ("model", "preference model"):
            fault(key, f"must name a stage of this recipe, not {describe(ref)}")
        elif reference.kind == "folder":
            assert reference.path is not None
            if not reference.path.is_dir():
                fault(key, f"there is no folder {ref} (seen from the folder of the recipe)")
            elif not (reference.path / "config.json").is_file():
                fault(key, f"{ref} is not a model folder: it has no config.json")
        elif not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", ref, re.ASCII):
            fault(key, f"{ref[:60]!r} is neither a hub id (org/name) nor a path (starts with ./ ../ or /)")
        return reference

    def _check_stage(self, name: str, reference: Reference, fault: Callable[[str, str], None]) -> None:
        ref, key, wants = reference.ref, reference.key, reference.wants
        if ref in self.stages:
            if self.stages[ref].makes != wants:
                fitting = [stage.name for stage in self.stages.values() if stage.makes == wants and not stage.hidden]
                makers = listed((method for method, keys in METHOD_KEYS.items() if wants == keys.MAKES), 12)
                method = self.stages[ref].method
                fault(
                    key,
                    f"stage {ref} is of method {method}, which makes no {wants}; name a stage of method {makers}"
                    + (f" (here: {listed(fitting, 5)})" if fitting else ""),
                )
            elif reference.part is not None and reference.part not in (parts := self.stages[ref].config.more_models()):
                has = (
                    f"it has {listed(f'{ref}@{part}' for part in parts)}" if parts else f"name it {ref}; {MORE_MODELS}"
                )
                fault(key, f"stage {ref} has no model {reference.written[:64]}; {has}")
            return
        line = self.document.lines.get(("stages", ref))
        if ref == name:
            fault(key, "the stage names itself")
        elif line is not None:
            fault(key, f"stage {ref} is written later (line {line}); a stage can only name stages before it")
        else:
            fitting = [stage.name for stage in self.stages.values() if stage.makes == wants and not stage.hidden]
            hint = likely(ref, fitting) or f"; before it are {listed(fitting)}"
            if (self.folder / ref).is_dir():
                hint = f"; write ./{ref} for a folder"
            fault(key, f"there is no stage {ref[:64]!r}{hint}")

    def _check_pool(self, keys: StageKeys, fault: Callable[[str, str], None]) -> None:
        for key, ref, _ in (reference for reference in _references(keys) if reference[2] == "pool"):
            pool = self.stages.get(ref)
            if pool is not None and isinstance(pool.config, Sample):
                self._check_filled(keys, key, pool, fault)
            elif pool is not None and isinstance(pool.config, ImportTraces) and not isinstance(keys, Traces):
                fault(key, f"stage {ref} imports traces, unequally many of a problem: only method: traces reads it")

    def _check_filled(self, keys: StageKeys, key: str, pool: Stage, fault: Callable[[str, str], None]) -> None:
        """What is wrong with a stage that reads this pool by that key."""
        if pool.config.problems != "train":
            fault(key, f"stage {pool.name} samples {pool.config.problems} problems; train only on train problems")
        if isinstance(keys, Shortest) and keys.samples > pool.config.samples:
            fault("samples", f"{keys.samples} is more than the {pool.config.samples} samples of stage {pool.name}")
        if isinstance(keys, Shortest):
            source, task = self.problems.source, self.problems.task
            if keys.cut is not None and (source == "puzzles" or task in ("code", "constraints")):
                judged = "puzzles" if source == "puzzles" else f"task: {task}"
                fault("cut", f"needs problems whose answer is a value that a thought can state; {judged} has none")
            if keys.verify_with == task and source not in ("tiny", "puzzles"):
                fault("verify_with", f"{task} is the recipe's own task; name another one")
        if isinstance(keys, Pairs) and pool.config.samples < 2:
            fault("pool", f"stage {pool.name} has 1 sample per problem; a pair takes 2")

    def _arm(self, name: str, keys: Frontier, arm: str, ref: str, problems: Sequence[Reference]) -> Reference:
        evaluation = Evaluate(
            method="evaluate",
            model=ref,
            problems=keys.problems,
            count=keys.count,
            samples=keys.samples,
            temperature=keys.temperature,
            top_p=keys.top_p,
            max_tokens=keys.max_tokens,
        )
        inputs = [read_reference(ref, self.folder, "model", "model"), *problems]
        self.stages[f"{name}.{arm}"] = Stage(f"{name}.{arm}", evaluation, tuple(inputs), hidden=True)
        return Reference("stage", f"{name}.{arm}", f"arms.{arm}", "evaluation")


def _references(keys: StageKeys) -> Iterator[tuple[str, str, str]]:
    """(key, reference, what it must be) for each reference of a stage: `("arms.base", "./models/base", "model")`."""
    for key, wants in keys.REFERENCES.items():
        value = getattr(keys, key)
        if isinstance(value, str):
            yield key, value, wants
        elif isinstance(value, dict):
            yield from ((f"{key}.{name}", ref, wants) for name, ref in value.items())
        elif value is not None:
            yield from ((f"{key}[{index}]", ref, wants) for index, ref in enumerate(value))
    yield from keys.nested_references()
