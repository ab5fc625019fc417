"""Named fault points: places where a test can kill, fail or hang a run. Standard library only.

`fault("stage.site")` does nothing unless the environment says `REASON_FAULT=site:n:kind`: then the n-th time (counted
from 1) that this process passes the site, it is killed, raises, or hangs there. A crash test sets the variable in a
child process and runs the same command again without it.

    REASON_FAULT=checkpoint.commit:2:kill reason run tiny
"""

from __future__ import annotations

import errno
import os
import signal
import time

FAULT_POINTS: tuple[str, ...] = (
    # rl/runs.py: one file, written atomically
    "write.temp",  # half of the temporary file is written
    "write.rename",  # the file has its name, its folder is not yet synced
    "write.rewind",  # lines after a checkpoint are about to be dropped from a log
    # rl/runs.py: a stage folder
    "run.manifest",  # everything is written, the manifest is about to get its name
    "run.rename",  # the folder is complete and still has its partial name
    "run.latest",  # the folder is finished, the pointer still names the one before
    # rl/runs.py: checkpoints
    "checkpoint.write",  # the files are there, without their hashes
    "checkpoint.manifest",  # the hashes are about to get their name
    "checkpoint.commit",  # complete, under its temporary name
    "checkpoint.prune",  # the older ones are about to go
    # recipes/runner.py: stage boundaries
    "stage.start",
    "stage.end",
    # rl/pool.py
    "pool.address",
    "pool.shard",
    "pool.verdicts",
    # rl/rescore.py, rl/curation.py
    "rescore.changes",
    "rescore.audit",
    "curate.write",
    # recipes/runner.py: the card of a model that a stage made
    "stage.card",
    # recipes/stages.py: summaries of what a stage made
    "evaluate.summary",
    "traces.summary",
    "pairs.summary",
    "merge.summary",
    "search.summary",
    "gguf.summary",
    "problems.summary",
    # rl/tasks/tiny_models.py
    "pretrain.model",
    # recipes/r1_eval_commands.py
    "r1eval.drawn",
    "r1eval.results",
    # distill/preflight_fix.py, distill/students.py
    "preflight.model",
    "preflight.weights",
    "student.weights",
    "student.summary",
    # rl/preference_training.py, recipes/r1_stages.py
    "preference.model",
    "preference.summary",
    # rl/gguf.py, rl/tasks/word_problems.py
    "gguf.model",
    "problems.write",
    # rl/policy.py: a model folder
    "model.tokenizer",
    # rl/samplers/vllm_server.py
    "handover.weights",  # a file of new weights is about to get its name; no server knows of it yet
    # rl/grpo.py
    "grpo.step",  # before the rollouts of a step
    "grpo.update",  # gradients are there, the optimizer has not stepped
    "grpo.state",  # weights and moments of a checkpoint are there, its step is not
    "grpo.model",  # training is over, the model has not its final name
    "grpo.summary",
    "grpo.refused",  # the groups of a refused step are about to be written
    # distill/
    "traces.write",
    "sft.checkpoint",
    "sft.model",
    "logits.shard",  # a shard of teacher logits is about to get its name
    "logits.manifest",
    "logit_distill.checkpoint",
    "logit_distill.model",
    # long2short/
    "pairs.write",
    "preview.plot",
    "dpo.checkpoint",
    "dpo.model",
    "simpo.checkpoint",
    "simpo.model",
    "merge.shard",
    "merge.tensor",
    "merge.model",
    "search.score",
    "select.summary",
    "frontier.table",
    "frontier.text",
    "frontier.png",
    "frontier.svg",
    "frontier.page",
)
KINDS = ("kill", "raise", "enospc", "eio", "hang")

_POINTS = frozenset(FAULT_POINTS)
_passed: dict[str, int] = {}  # REASON_FAULT's value -> how often its site was passed


class FaultRaised(RuntimeError):
    """What kind `raise` raises."""


def fault(site: str) -> None:
    """Pass the fault point `site`; act if `REASON_FAULT` says so.

    `kill` is SIGKILL to this process (no handler, no `finally`), `raise` a `FaultRaised`, `enospc` and `eio` the
    `OSError` of a full or broken disk, `hang` a sleep that never ends.

    Example: under `REASON_FAULT=pool.shard:3:kill` the process dies when it passes `pool.shard` for the third time.

    Errors: AssertionError for a site that is not in `FAULT_POINTS`, always, so that no point stays untested;
    ValueError for a `REASON_FAULT` that cannot be read.
    """
    if site not in _POINTS:
        raise AssertionError(f"fault point {site!r} is not listed in FAULT_POINTS of rl/faults.py: add it there")
    wanted = os.environ.get("REASON_FAULT")
    if not wanted:
        return
    name, count, kind = _parse(wanted)
    if name != site:
        return
    _passed[wanted] = _passed.get(wanted, 0) + 1
    if _passed[wanted] == count:
        _act(site, kind)


def reset_faults() -> None:
    """Count passes from 0 again (between two tests in one process)."""
    _passed.clear()


def _parse(text: str) -> tuple[str, int, str]:
    name, _, rest = text.partition(":")
    count, _, kind = rest.partition(":")
    if name not in _POINTS or not count.isdecimal() or int(count) < 1 or kind not in KINDS:
        raise ValueError(
            f"REASON_FAULT={text!r} cannot be read: it is site:n:kind with a site of rl/faults.py, n from 1, "
            f"and a kind of {', '.join(KINDS)}"
        )
    return name, int(count), kind


def _act(site: str, kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "raise":
        raise FaultRaised(f"asked to fail at {site}")
    elif kind == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif kind == "eio":
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    while True:  # `hang`; and after SIGKILL to ourselves, the instant until it arrives
        time.sleep(60)
