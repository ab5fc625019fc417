"""The state of one RL run and where it lies on disk: what is kept, what is resumed, what is written at the end.

    metrics.jsonl             a line a step
    judging.jsonl             the verdicts of a step that took long or were given up, if there are any
    checkpoints/step-000020   all that the run needs to go on from step 20 (rl/checkpoint.py)
    best/                     the evaluated model that is kept so far
    models/20                 the model evaluated after step 20, and so on, where all of them are kept
    refused-step-000021.jsonl the groups of a step that was refused because something was not finite
    model/, summary.json      at the end

Every rank holds the state; rank 0 writes.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rl.checkpoint import collect, load_training_state, write_training_state
from rl.collapse import CollapseMonitor
from rl.collect import Collector, Remembering
from rl.export import export_model
from rl.faults import fault
from rl.jsonl import dump_lines
from rl.judging import JUDGING, judged_samples, notable_verdicts
from rl.learner import Learner
from rl.policy import PolicyModel
from rl.ranks import Ranks
from rl.refusal import StepRefused, refused_rows
from rl.runs import append_line, latest_checkpoint, rewind_lines, save_checkpoint, write_file, write_json
from rl.train_metrics import DevScore
from rl.types import NonFiniteReward, RolloutGroup

Prefer = Callable[[DevScore, DevScore | None, DevScore], bool]


def prefer_last(candidate: DevScore, incumbent: DevScore | None, start: DevScore) -> bool:
    """Keep the last model, whatever its score."""
    return True


def prefer_accurate(candidate: DevScore, incumbent: DevScore | None, start: DevScore) -> bool:
    """Keep the most accurate model on dev problems; the earlier one of equals."""
    return incumbent is None or candidate.accuracy > incumbent.accuracy


@dataclass(frozen=True, slots=True)
class PreferBrief:
    """Keep the model with the fewest tokens among those whose dev accuracy is at least the start's less `tolerance`;
    while none qualifies, the most accurate one. The rule by which long2short RL chooses its checkpoint."""

    tolerance: float

    def __call__(self, candidate: DevScore, incumbent: DevScore | None, start: DevScore) -> bool:
        if incumbent is None:
            return True
        floor = start.accuracy - self.tolerance
        if (candidate.accuracy >= floor) != (incumbent.accuracy >= floor):
            return candidate.accuracy >= floor
        if candidate.accuracy >= floor:
            return candidate.mean_tokens < incumbent.mean_tokens
        return candidate.accuracy > incumbent.accuracy


class RunState:
    """One run's step, scores and files. `collector`, `learner` and `monitor` hold the rest of what a checkpoint stores.

    A run that the monitor may stop hands on the last model that was seen to be well. Where nothing is evaluated that is
    a copy, made every `snapshot_every` steps (0: never) of a policy whose rollouts were within all limits.
    """

    def __init__(
        self,
        folder: Path,
        learner: Learner,
        collector: Collector,
        tokenizer: PreTrainedTokenizerBase,
        prefer: Prefer,
        ranks: Ranks,
        monitor: CollapseMonitor | None = None,
        snapshot_every: int = 0,
        keep_models: bool = False,
    ) -> None:
        self.folder, self.learner, self.collector = folder, learner, collector
        self.tokenizer, self.prefer, self.ranks = tokenizer, prefer, ranks
        self.monitor, self.snapshot_every, self.keep_models = monitor, snapshot_every, keep_models
        self.step = 0
        self.snapshot: int | None = None  # the step after which the copy was made
        self.scores: list[DevScore] = []
        self.kept: DevScore | None = None
        self.metrics_path = folder / "metrics.jsonl"
        self.judging_path = folder / JUDGING

    def resume(self) -> None:
        """Go back to the newest complete checkpoint, if there is one; later lines of metrics.jsonl are dropped."""
        found = latest_checkpoint(self.folder)
        if found is not None:
            learner = self.learner
            state = load_training_state(found[1], learner.policy, learner.optimizer, self._reference)
            self.step = state["step"]
            self.scores = [DevScore(**score) for score in state["scores"]]
            self.kept = DevScore(**state["kept"]) if state["kept"] else None
            self.collector.restore(state["collector"])
            self.snapshot = state.get("snapshot")
            if self.monitor is not None and state.get("monitor"):
                self.monitor.restore(state["monitor"])
            learner.reference_moved = state["reference_moved"]
        if self.ranks.first:
            self._clear_up(None if found is None else found[1])
        self.ranks.wait()

    @property
    def _reference(self) -> PolicyModel | None:
        """The reference, if it has weights of its own."""
        return self.learner.reference if isinstance(self.learner.reference, PolicyModel) else None

    def _clear_up(self, checkpoint: Path | None) -> None:
        """Drop what is later than the checkpoint."""
        for path in self.folder.glob("refused-step-*.jsonl"):
            path.unlink()
        shutil.rmtree(self.folder / "best", ignore_errors=True)  # of a later step than the checkpoint, or torn
        for path in (self.folder / "models").glob("*"):
            if path.name.isdigit() and int(path.name) > self.step:
                shutil.rmtree(path)
        if checkpoint is None:
            self.metrics_path.unlink(missing_ok=True)
            self.judging_path.unlink(missing_ok=True)
            return
        if (checkpoint / "best").exists():
            shutil.copytree(checkpoint / "best", self.folder / "best")
        rewind_lines(self.metrics_path, self.step)
        rewind_lines(self.judging_path, self.step)

    def consider(self, score: DevScore) -> DevScore:
        """Record a dev score; keep the model if it is well and the rule prefers it to the one kept so far."""
        self.scores.append(score)
        if isinstance(self.collector.shape, Remembering):
            self.collector.shape.evaluated(score.step, score.accuracy)
        start = self.scores[0]
        well = self.monitor is None or self.monitor.observe_dev(score.step, score.accuracy, start.accuracy)
        if self.kept is None or (well and self.prefer(score, self.kept, start)):
            self.kept = score
            self._export(self.folder / "best")
        if self.keep_models and score.step:
            self._export(self.folder / "models" / str(score.step))
        return score

    @property
    def stopped(self) -> bool:
        """Whether the monitor ends the run."""
        return self.monitor is not None and self.monitor.stopped is not None

    def watch(self, step: int, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Show a step's rollouts to the monitor, before the update; returns its figures."""
        if self.monitor is None:
            return {}
        figures = self.monitor.read(step, groups)
        due = self.snapshot_every and (step - 1) % self.snapshot_every == 0
        if due and (self.monitor.healthy or self.snapshot is None):
            self._export(self.folder / "best")
            self.snapshot = step - 1
        return figures

    def good_enough(self, accuracy: float | None) -> bool:
        return accuracy is not None and bool(self.scores) and self.scores[-1].accuracy >= accuracy

    def log(self, metrics: dict[str, float], groups: Sequence[RolloutGroup]) -> None:
        """A line of figures; and one of the verdicts that took long or were given up, if there are any."""
        if self.ranks.first:
            append_line(self.metrics_path, {"step": self.step, **metrics})
            if notable := notable_verdicts(judged_samples(groups)):
                append_line(self.judging_path, {"step": self.step, "notable": notable})

    @contextlib.contextmanager
    def refusals(self, step: int) -> Iterator[list[RolloutGroup]]:
        """Where a step is refused inside, the groups concerned are written down; the message says where.

        The list that it yields is filled with the step's groups as soon as there are any.
        """
        groups: list[RolloutGroup] = []
        try:
            yield groups
        except NonFiniteReward as bad:
            raise self._refuse(step, StepRefused("a reward", [bad.group.problem.id]), [bad.group]) from bad
        except StepRefused as refused:
            named = [group for group in groups if group.problem.id in refused.groups]
            raise self._refuse(step, refused, named) from refused

    def _refuse(self, step: int, refused: StepRefused, groups: Sequence[RolloutGroup]) -> StepRefused:
        path = self.folder / f"refused-step-{step:06d}.jsonl"
        if not groups:  # completions that are not done yet: there is nothing to judge or to show
            return StepRefused(f"step {step}: {refused.what}", refused.groups)
        if self.ranks.first:
            write_file(path, dump_lines(row for group in groups for row in refused_rows(group)), "grpo.refused")
        self.ranks.wait()  # whoever ends first ends them all
        return StepRefused(f"step {step}: {refused.what}", refused.groups, f"their samples are in {path}")

    def save(self) -> None:
        learner = self.learner
        moved = self._reference if learner.reference_moved else None
        tensors = collect(learner.policy, learner.optimizer, moved, keep=self.ranks.first)  # on every rank
        state = {
            "step": self.step,
            "scores": [score.as_dict() for score in self.scores],
            "kept": self.kept.as_dict() if self.kept else None,
            "collector": self.collector.as_json(),
            "reference_moved": learner.reference_moved,
            "snapshot": self.snapshot,
            "monitor": None if self.monitor is None else self.monitor.as_json(),
        }

        def write(path: Path) -> None:
            write_training_state(path, tensors, state)
            if (self.folder / "best").exists():
                shutil.copytree(self.folder / "best", path / "best")

        if self.ranks.first:
            save_checkpoint(self.folder, self.step, write)
        self.ranks.wait()

    def finish(self, facts: Mapping[str, object]) -> None:
        """Write the kept model and the summary, with `facts` in it. Where nothing was evaluated that is the last model,
        or of a run that was stopped the last copy of one that was well."""
        fault("grpo.model")
        kept = self.step if self.kept is None else self.kept.step
        if self.kept is None and self.stopped and self.snapshot is not None:
            kept = self.snapshot
        elif self.kept is None:
            self._export(self.folder / "best")
        if self.ranks.first:
            shutil.rmtree(self.folder / "model", ignore_errors=True)
            (self.folder / "best").rename(self.folder / "model")
            summary = {
                "steps": self.step,
                "kept_step": kept,
                "dev": [score.as_dict() for score in self.scores],
                **facts,
            }
            if self.monitor is not None:
                stopped = self.monitor.stopped
                summary["stopped"] = None if stopped is None else str(stopped)
                summary["alarms"] = [asdict(alarm) for alarm in self.monitor.alarms]
            write_json(self.folder / "summary.json", summary, "grpo.summary")
        self.ranks.wait()

    def _export(self, folder: Path) -> None:
        if self.ranks.first:
            shutil.rmtree(folder, ignore_errors=True)
        export_model(self.learner.policy, self.tokenizer, folder, self.ranks)
