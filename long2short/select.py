"""Choosing among models on dev problems: a merge's λ, a length reward's weight, a checkpoint.

The rule is `PreferBrief`: the fewest mean tokens among the candidates whose dev accuracy is at least the parent's less
a tolerance; if none is, the most accurate. Test problems are never seen here: a λ chosen on the problems it is then
reported on would flatter itself.

Run it: a recipe with a `method: select` stage, such as the merge of `reason long2short tiny`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rl.policy import load_model, load_tokenizer, save_model
from rl.rollout import sample_groups
from rl.run_state import PreferBrief
from rl.runs import write_json
from rl.samplers.base import OpenSampler, SamplingSettings
from rl.tasks.base import Task
from rl.train_metrics import DevScore, dev_score
from rl.types import Problem


def choose(scores: Mapping[str, DevScore], parent: DevScore, tolerance: float) -> str:
    """The name of the chosen candidate; the first of equals.

    Example: parent .90 at 60 tokens, tolerance .02; candidates .89 at 50, .88 at 40, .80 at 20 -> the second.
    """
    prefer = PreferBrief(tolerance)
    chosen: str | None = None
    for name, score in scores.items():
        if prefer(score, None if chosen is None else scores[chosen], parent):
            chosen = name
    if chosen is None:
        raise ValueError("no candidates to choose among")
    return chosen


def select_model(
    candidates: Mapping[str, str],
    parent: str,
    problems: Sequence[Problem],
    task: Task,
    folder: Path,
    *,
    samples: int,
    settings: SamplingSettings,
    tolerance: float,
    seed: int,
    suffix: str = "",
    open_sampler: OpenSampler,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> str:
    """Score `candidates` (name -> model) and the parent on `problems`; write the winner to `folder`/model.

    `folder`/summary.json holds every score, so that the choice can be checked. Returns the winner's name.
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
    chosen = choose(scores, parent_score, tolerance)
    shutil.rmtree(folder / "model", ignore_errors=True)
    if Path(candidates[chosen]).is_dir():
        shutil.copytree(candidates[chosen], folder / "model")
    else:
        save_model(load_model(candidates[chosen]), load_tokenizer(candidates[chosen]), folder / "model")
    summary = {
        "chosen": chosen,
        "tolerance": tolerance,
        "problems": len(problems),
        "samples": samples,
        "parent": parent_score.metrics(),
        "candidates": {name: score.metrics() for name, score in scores.items()},
    }
    write_json(folder / "summary.json", summary, "select.summary")
    progress(total, total, chosen)
    return chosen
