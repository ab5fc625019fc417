"""From a recipe to what `reason preflight` looks at: its models, rows, limits, pools and splits.

A model reference is followed through unfinished stages to the folder or hub id that it starts from, since tokenizer and
config are handed on; a finished stage stands for itself. What cannot be looked at (a model of the hub without a
network, data that is not there, a stage that makes its model from nothing) is listed as not checked, never as fine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from recipes.problem_keys import source_kind
from recipes.runner import plan_stages
from recipes.schema import Recipe, Stage, read_reference
from recipes.stage_inputs import PROBLEMS, not_set
from recipes.student_keys import Prepare
from recipes.student_stage import preparation_of
from recipes.tasks import load_problems

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

    from distill.preflight_subjects import Context, Example, RowsSubject, Stored, Subject, Vocabulary
    from distill.students import Preparation
    from rl.runs import StageFolder
    from rl.types import Problem

PROBLEM_ROWS = 64  # train problems that are rendered; every one counts for the splits
NO_LIMIT = 10**9  # for rows that are only made up
COMES_FROM = ("model", "long", "parent")  # the key of a stage whose model its own has tokenizer and config from
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Opened:
    """A model without its weights. `source` is a folder or a hub id."""

    source: str
    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    generation: GenerationConfig | None
    stored: Stored | None


@dataclass(slots=True)
class Gathered:
    """What there is to look at; what there is not, with the reason; and each model by the key that names it."""

    subjects: list[Subject] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    models: dict[str, Opened] = field(default_factory=dict)  # "teacher.model = ./models/base" -> the model
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)  # the same -> every "key = reference" of the model


def gather(recipe: Recipe, runs: Path, weights: bool) -> Gathered:
    """All subjects of a recipe. `weights`: also those that need models to be loaded."""
    return _Gatherer(recipe, runs, weights).gather()


class _Gatherer:
    def __init__(self, recipe: Recipe, runs: Path, weights: bool) -> None:
        self.recipe, self.weights = recipe, weights
        self.found = Gathered()
        self.opened: dict[tuple[str, tuple[Preparation, ...], str | None], Opened | None] = {}
        self.rows: dict[int, tuple[Example, ...]] = {}  # id of a tokenizer -> made rows
        self.folders = self._folders(runs)
        self.problems = {split: self._problems(split) for split in ("train", "test")}

    def gather(self) -> Gathered:
        """In the order in which a user would look: models, then stages, then data."""
        by_model: dict[int, list[tuple[str, Opened, list[Context]]]] = {}
        for stage in self.recipe.stages.values():
            for key, ref in _models(stage):
                opened = self.open(stage, key, ref)
                if opened is not None:
                    entry = (f"{_settable(stage, key)} = {ref}", opened, self._contexts(stage, opened))
                    by_model.setdefault(id(opened.tokenizer), []).append(entry)
        for entries in by_model.values():
            self._model(entries)
        for stage in self.recipe.stages.values():
            self._training(stage)
            self._pair(stage)
            self._pool(stage)
        self._splits()
        return self.found

    # --- models -------------------------------------------------------------------------------------------------------

    def open(self, stage: Stage, key: str, ref: str) -> Opened | None:
        """The model that a key leads to, with the template that the stage would give it; None with a note."""
        found = self._source(ref)
        name = f"{_settable(stage, key)} = {ref}"
        if found is None:
            self._not_checked(name, "a stage that has not run yet makes this model from nothing")
            return None
        wanted = getattr(stage.config, "template", None)
        place = (*found, wanted)
        if place not in self.opened:
            self.opened[place] = self._try(name, lambda: _open(*place))
        return self.opened[place]

    def _source(self, ref: str) -> tuple[str, tuple[Preparation, ...]] | None:
        """The folder or hub id that a reference goes back to, and what `prepare` stages will change of it, in order."""
        reference = read_reference(ref, self.recipe.path.parent, "model", "model")
        if reference.kind != "stage":
            return ref if reference.path is None else str(reference.path), ()
        folder = self.folders.get(reference.ref)
        if folder is not None and folder.finished:
            return str(folder.final / ("model" if reference.part is None else f"models/{reference.part}")), ()
        keys = self.recipe.stages[reference.ref].config
        key = next((key for key in COMES_FROM if isinstance(getattr(keys, key, None), str)), None)
        found = None if key is None else self._source(getattr(keys, key))
        if found is None or not isinstance(keys, Prepare):
            return found
        return found[0], (*found[1], preparation_of(keys))

    def _model(self, entries: Sequence[tuple[str, Opened, list[Context]]]) -> None:
        from distill.preflight_subjects import ModelSubject, TokenizerSubject

        where, opened, _ = entries[0]
        rows = self._rows(opened)
        contexts = dict.fromkeys(context for _, _, contexts in entries for context in contexts)
        suffix = self.recipe.problems.prompt_suffix
        self.found.models[where] = opened
        self.found.names[where] = tuple(dict.fromkeys(name for name, _, _ in entries))
        self.found.subjects += [
            TokenizerSubject(where, opened.tokenizer, opened.generation, rows, suffix),
            ModelSubject(where, opened.tokenizer, opened.config, opened.stored, tuple(contexts), rows, self.weights),
        ]
        if self.weights and opened.stored is None:
            self._not_checked(where, "its weights are not in a folder here")

    def _rows(self, opened: Opened) -> tuple[Example, ...]:
        """Made rows of real problems: the question again as the thought, then the answer, all of it known text."""
        from distill.preflight_subjects import Example
        from rl.prompts import THINK_CLOSE, THINK_OPEN, prefills_think

        known = self.rows.get(id(opened.tokenizer))
        if known is None:
            begin = "" if prefills_think(opened.tokenizer) else THINK_OPEN
            known = tuple(
                Example(
                    f"problem {problem.id}",
                    problem.text,
                    f"{begin}{problem.text.strip()}{THINK_CLOSE}{problem.answer.strip() or problem.text.strip()}",
                )
                for problem in self.problems["train"][:PROBLEM_ROWS]
            )
            self.rows[id(opened.tokenizer)] = known
        return known

    def _contexts(self, stage: Stage, opened: Opened) -> list[Context]:
        from distill.preflight_subjects import Context

        keys = stage.config
        found = [] if getattr(keys, "max_length", None) is None else [(f"{stage.name}.max_length", keys.max_length)]
        if getattr(keys, "max_tokens", None) is not None:
            # A limit that is read off a pool is not known yet: at most that of evaluations, or of the recipe.
            limits = [keys.max_tokens, getattr(keys, "eval_max_tokens", None)]
            limits += [tokens for _, tokens in getattr(keys, "max_tokens_steps", None) or ()]
            most = max((limit for limit in limits if isinstance(limit, int)), default=self.recipe.sampling.max_tokens)
            found.append((f"{stage.name}.max_tokens with the prompt", most + self._longest_prompt(opened)))
        return [Context(*item) for item in found]

    def _longest_prompt(self, opened: Opened) -> int:
        from distill.preflight_subjects import problem
        from rl.prompts import render_prompt

        questions = [row.question for row in self._rows(opened)]
        suffix = self.recipe.problems.prompt_suffix
        return max(
            (len(render_prompt(opened.tokenizer, problem("row", text), suffix)) for text in questions), default=0
        )

    # --- stages -------------------------------------------------------------------------------------------------------

    def _training(self, stage: Stage) -> None:
        """The rows of a stage that trains on traces or pairs, and whether what is sampled for it fits into them."""
        from distill.preflight_subjects import LimitSubject

        keys = stage.config
        source = getattr(keys, "traces", None) or getattr(keys, "pairs", None)
        opened = self._source(keys.model) if isinstance(source, str) and hasattr(keys, "max_length") else None
        model = None if opened is None else self.opened.get((*opened, getattr(keys, "template", None)))
        if model is None or not isinstance(source, str):
            return
        rows = self._rows_subject(stage, source, model)
        if rows is not None:
            self.found.subjects.append(rows)
            if self.weights and stage.method == "sft":
                self._steps(stage, model, rows)
        drawn = self._drawn_for(source)
        if drawn is not None and keys.overflow == "refuse":
            self.found.subjects.append(
                LimitSubject(
                    f"{stage.name}.max_length",
                    keys.max_length,
                    f"{drawn.name}.max_tokens",
                    drawn.config.max_tokens,
                    self._longest_prompt(model),
                )
            )

    def _rows_subject(self, stage: Stage, source: str, model: Opened) -> RowsSubject | None:
        """The traces or pairs that are there already, else made rows (of which only the length says nothing)."""
        from distill.preflight_subjects import rows_subject

        suffix = self.recipe.problems.prompt_suffix
        where = f"{stage.name}.model = {stage.config.model}, rows of {source}"
        folder = self.folders.get(source)
        if folder is not None and folder.finished:
            real = self._try(f"{stage.name} reads {source}", lambda: tuple(_read_rows(folder.final)))
            if real:
                return rows_subject(where, model.tokenizer, real, stage.config.max_length, suffix)
        self._not_checked(f"{stage.name} reads {source}", "not made yet; rows made from the problems stand in")
        made = self._rows(model)
        return rows_subject(where, model.tokenizer, made, NO_LIMIT, suffix) if made else None

    def _drawn_for(self, source: str) -> Stage | None:
        """The stage that samples what a traces or pairs stage reads."""
        stage = self.recipe.stages.get(source)
        if stage is None or getattr(stage.config, "max_tokens", None) is not None:
            return stage
        pool = getattr(stage.config, "pool", None)
        return self._drawn_for(pool) if isinstance(pool, str) else None

    def _pair(self, stage: Stage) -> None:
        """A teacher that scores the student's ids, or models whose weights are averaged."""
        from distill.preflight_subjects import PairSubject
        from long2short.merge_checks import unlike_configs

        refs = dict(_models(stage))
        for student, teacher in (("model", "teacher"), ("long", "short")):
            left, right = refs.get(student), refs.get(teacher)
            if left is None or right is None:
                continue
            one, other = self.open(stage, student, left), self.open(stage, teacher, right)
            if one is not None and other is not None and one is not other:
                merged = student == "long"
                unlike = unlike_configs(one.config, other.config, (left, right)) if merged else None
                self.found.subjects.append(
                    PairSubject(f"{stage.name}.{teacher}", _side(one), _side(other), merged, unlike)
                )

    def _pool(self, stage: Stage) -> None:
        """A pool on the disk, finished or not."""
        folder = self.folders.get(stage.name)
        if folder is None or stage.makes != "pool":
            return
        for path in (folder.final / "pool", folder.partial / "pool"):
            if path.is_dir():
                subject = self._try(f"{stage.name}, {path}", lambda path=path: _pool_subject(stage, path))
                self.found.subjects += [] if subject is None else [subject]

    def _steps(self, stage: Stage, model: Opened, rows: RowsSubject) -> None:
        from distill.preflight_training import training_subject

        if not Path(model.source).is_dir():
            self._not_checked(f"{stage.name}, two steps", f"{model.source} is not a folder here")
            return
        subject = self._try(
            f"{stage.name}, two steps",
            lambda: training_subject(
                stage.name, model.source, model.tokenizer, [rows.tokenize(row) for row in rows.rows[:8]]
            ),
        )
        self.found.subjects += [] if subject is None else [subject]

    # --- data ---------------------------------------------------------------------------------------------------------

    def _splits(self) -> None:
        """Train against test problems, and traces of elsewhere against test problems."""
        from distill.preflight_subjects import SplitSubject

        test = tuple((f"test problem {problem.id}", problem.text) for problem in self.problems["test"])
        if not test:
            return
        train = tuple((f"problem {problem.id}", problem.text) for problem in self.problems["train"])
        self.found.subjects.append(SplitSubject("problems.train", train, test))
        for stage in self.recipe.stages.values():
            folder = self.folders.get(stage.name)
            if stage.makes == "traces" and folder is not None and folder.finished:
                rows = self._try(stage.name, lambda folder=folder: tuple(_read_rows(folder.final))) or ()
                named = tuple((row.name, row.question) for row in rows)
                self.found.subjects.append(SplitSubject(f"{stage.name}, traces.jsonl", named, test))

    def _problems(self, split: str) -> list[Problem]:
        section = self.recipe.problems
        if not any(split in stage.config.splits() for stage in self.recipe.stages.values()) and split == "test":
            return []
        path, where = self.recipe.problems_file, f"problems.source = {section.source}, {split}"
        if source_kind(section.source) == "stage":
            folder = self.folders.get(section.source)
            if folder is None or not folder.finished:
                self._not_checked(where, "not made yet")
                return []
            path = folder.final / PROBLEMS
        elif source_kind(section.source) == "file" and path is None:
            self._not_checked(where, not_set(section.source))
            return []
        return self._try(where, lambda: load_problems(section, split, getattr(section, split), path)) or []

    def _folders(self, runs: Path) -> Mapping[str, StageFolder]:
        planned = self._try(f"what is finished in {runs}", lambda: plan_stages(self.recipe, root=runs)) or []
        return {one.stage.name: one.folder for one in planned}

    def _try(self, what: str, make: Callable[[], Made]) -> Made | None:
        """What `make` gives; None, and a note, where it cannot be had."""
        try:
            return make()
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            self._not_checked(what, lines[0][:300] if lines else type(error).__name__)
            return None

    def _not_checked(self, what: str, reason: str) -> None:
        note = f"{what}: {reason}"
        if note not in self.found.unchecked:
            self.found.unchecked.append(note)


def _models(stage: Stage) -> Iterator[tuple[str, str]]:
    """(key, reference) of every model that a stage reads by a key of its own."""
    if isinstance(stage.config, Prepare):
        return  # what it reads is what it is there to change
    for key, wants in stage.config.REFERENCES.items():
        value = getattr(stage.config, key, None)
        if wants == "model" and isinstance(value, str):
            yield key, value


def _settable(stage: Stage, key: str) -> str:
    """The key as --set takes it: "teacher.model", and "frontier.arms.base" for an evaluation of a frontier."""
    frontier, _, arm = stage.name.partition(".")
    return f"{frontier}.arms.{arm}" if stage.hidden else f"{stage.name}.{key}"


def _open(source: str, preparations: tuple[Preparation, ...], template: str | None) -> Opened:
    """Tokenizer and configs as they are, with what the recipe changes of them before a stage sees them: by `prepare`,
    and by the template that an RL stage gives to a model without one."""
    from transformers import AutoConfig, AutoTokenizer

    from distill.preflight_fix import read_generation
    from distill.preflight_subjects import read_stored
    from distill.students import prepare_config, prepare_generation, prepare_tokenizer
    from rl.prompts import give_template

    folder = Path(source)
    config = AutoConfig.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    generation = read_generation(source)
    for wanted in preparations:
        prepare_tokenizer(tokenizer, wanted)
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        prepare_config(config, wanted, eos, pad)
        if generation is not None:
            prepare_generation(generation, eos, pad)
    give_template(tokenizer, template)
    stored = read_stored(folder) if folder.is_dir() else None
    return Opened(source, tokenizer, config, generation, stored)


def _side(opened: Opened) -> Vocabulary:
    from distill.preflight_subjects import Vocabulary
    from distill.preflight_tokens import as_ids

    eos = as_ids(opened.tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]
    configured = as_ids(opened.generation.eos_token_id) if opened.generation is not None else []
    rows = opened.config.get_text_config().vocab_size
    return Vocabulary(opened.source, opened.tokenizer, rows, tuple(dict.fromkeys([*configured, *eos])))


def _read_rows(folder: Path) -> Iterator[Example]:
    """The rows of a finished stage that makes traces or pairs; of a pair what is chosen."""
    from distill.preflight_subjects import Example
    from distill.traces import read_traces
    from long2short.preference import read_pairs

    if (folder / "traces.jsonl").is_file():
        for index, trace in enumerate(read_traces(folder / "traces.jsonl")):
            yield Example(f"trace {index} (problem {trace.problem_id})", trace.question, trace.text)
        return
    for index, pair in enumerate(read_pairs(folder / "pairs.jsonl")):
        yield Example(f"pair {index} (problem {pair.problem_id})", pair.question, pair.chosen)


def _pool_subject(stage: Stage, path: Path) -> Any:
    from distill.preflight_subjects import PoolSubject
    from rl.pool import Pool
    from rl.pool_check import check_pool
    from rl.types import FinishReason

    damage = tuple(map(str, check_pool(path)))
    ends = [] if damage else [one.finish_reason for _, _, one in Pool.open(path, racing=None).samples()]
    cut = sum(end is FinishReason.LENGTH for end in ends)
    return PoolSubject(f"{stage.name}, {path}", damage, cut, len(ends), stage.config.max_tokens)
