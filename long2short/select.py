"""Choosing among models on dev problems: a merge's λ, a length reward's weight, the start of length RL.

Two rules, each a function of the candidates' dev scores and the parent's:

* `Briefest`: the fewest mean tokens among the candidates whose dev accuracy is at least the parent's less a tolerance;
  if none is, the most accurate. It is `PreferBrief`, by which length RL keeps its checkpoint.
* `balanced`: the best balance of accuracy and tokens. Kimi k1.5 (2501.12599, section 2.4) starts its second phase from
  the checkpoint with "the best balance" and gives no formula; ours is the highest AES against the parent
  (`long2short.frontier.accuracy_efficiency`). AES rises with accuracy and falls with tokens, so the choice is on the
  frontier of the candidates. `prefer_balanced` is the same rule within an RL run.

Test problems are never seen here: a λ chosen on the problems it is then reported on would flatter itself.

Run it: a recipe with a `method: select` stage, such as the merge of `reason long2short tiny`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from long2short.frontier import accuracy_efficiency, non_dominated
from rl.policy import load_model, load_tokenizer, save_model
from rl.rollout import sample_groups
from rl.run_state import PreferBrief
from rl.runs import write_json
from rl.samplers.base import OpenSampler, SamplingSettings
from rl.tasks.base import Task
from rl.train_metrics import DevScore, dev_score
from rl.types import Problem


@dataclass(frozen=True, slots=True)
class Choice:
    """Which candidate, and why in words. Example: `Choice("merge-50", "fewest tokens (38.1) of the 2 within ...")`."""

    name: str
    reason: str


Rule = Callable[[Mapping[str, DevScore], DevScore], Choice]  # candidates by name, at least one, and the parent


@dataclass(frozen=True, slots=True)
class Briefest:
    """The fewest tokens within `tolerance` of the parent's accuracy; the first of equals.

    Example: parent .90 at 60 tokens, tolerance .02; candidates .89 at 50, .88 at 40, .80 at 20 -> the second.
    """

    tolerance: float

    def __call__(self, scores: Mapping[str, DevScore], parent: DevScore) -> Choice:
        prefer = PreferBrief(self.tolerance)
        name, best = next(iter(scores.items()))
        for other, score in scores.items():
            if prefer(score, best, parent):
                name, best = other, score
        near = sum(score.accuracy >= parent.accuracy - self.tolerance for score in scores.values())
        within = f"within {self.tolerance:g} of the parent's accuracy {parent.accuracy:.3f}"
        if near:
            return Choice(name, f"fewest tokens ({best.mean_tokens:.1f}) of the {near} of {len(scores)} {within}")
        return Choice(name, f"most accurate ({best.accuracy:.3f}); none of {len(scores)} is {within}")


def balanced(scores: Mapping[str, DevScore], parent: DevScore) -> Choice:
    """The highest AES against the parent; the first of equals.

    Example: parent .90 at 60 tokens; candidates .89 at 50 (AES .111), .88 at 40 (.222), .80 at 20 (.111) -> the second.
    """
    name = max(scores, key=lambda name: efficiency(scores[name], parent))
    best = scores[name]
    return Choice(
        name,
        f"best balance: AES {efficiency(best, parent):+.3f}, accuracy {best.accuracy:.3f} at {best.mean_tokens:.1f} "
        f"tokens against {parent.accuracy:.3f} at {parent.mean_tokens:.1f}",
    )


def prefer_balanced(candidate: DevScore, incumbent: DevScore | None, start: DevScore) -> bool:
    """Keep the evaluated model with the highest AES against the starting model (`rl.run_state.Prefer`)."""
    return incumbent is None or efficiency(candidate, start) > efficiency(incumbent, start)


def efficiency(score: DevScore, parent: DevScore) -> float:
    """AES on dev problems; against a parent that gets nothing right, accuracy itself."""
    if parent.accuracy == 0:
        return score.accuracy
    return accuracy_efficiency(
        tokens=score.mean_tokens,
        accuracy=score.accuracy,
        parent_tokens=parent.mean_tokens,
        parent_accuracy=parent.accuracy,
    )


def select_model(
    candidates: Mapping[str, str],
    parent: str,
    problems: Sequence[Problem],
    task: Task,
    folder: Path,
    *,
    samples: int,
    settings: SamplingSettings,
    rule: Rule,
    seed: int,
    suffix: str = "",
    open_sampler: OpenSampler,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> Choice:
    """Score `candidates` (name -> model) and the parent on `problems`; write the winner to `folder`/model.

    `folder`/summary.json holds every score with its AES, which candidates no other one beats, and the reason, so that
    the choice can be checked.
    """
    scores: dict[str, DevScore] = {}
    total = len(candidates) + 1
    for index, (name, model) in enumerate([("", parent), *candidates.items()]):
        progress(index, total, name or "parent")
        tokenizer = load_tokenizer(model)
        with open_sampler(model, tokenizer) as sampler:
            groups = sample_groups(sampler, tokenizer, problems, task, samples, settings, seed, suffix)
        scores[name] = dev_score(0, groups)
    parent_score = scores.pop("")
    choice = rule(scores, parent_score)
    chosen = choice.name
    marks = non_dominated([(score.accuracy, score.mean_tokens) for score in scores.values()])
    shutil.rmtree(folder / "model", ignore_errors=True)
    if Path(candidates[chosen]).is_dir():
        shutil.copytree(candidates[chosen], folder / "model")
    else:
        save_model(load_model(candidates[chosen]), load_tokenizer(candidates[chosen]), folder / "model")
    summary = {
        "chosen": chosen,
        "reason": choice.reason,
        "problems": len(problems),
        "samples": samples,
        "parent": parent_score.metrics(),
        "candidates": {
            name: {**score.metrics(), "aes": efficiency(score, parent_score), "frontier": mark}
            for (name, score), mark in zip(scores.items(), marks, strict=True)
        },
    }
    write_json(folder / "summary.json", summary, "select.summary")
    progress(total, total, f"{chosen}: {choice.reason}")
    return choice
