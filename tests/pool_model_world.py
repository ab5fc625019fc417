"""A pool filled by the transformers sampler, by processes that are killed: the child of test_pool_transformers.py.

python tests/pool_model_world.py < jobs

A job is a line of JSON, {"folder": ..., "kill": ...}; the answer is one too: the seeds of each call of the sampler that
was begun, and how the process ended (0, or minus the signal). Each job is a process of its own, forked from this one,
which has loaded the model and done nothing else. `kill`: "" or a fault point and its number, or "forward:17", the 17th
time that the model is called.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl.policy import load_model, load_tokenizer
from rl.pool import Pool, fill_pool, pool_address
from rl.samplers.base import SampleRequest, SamplingSettings
from rl.samplers.transformers import TransformersSampler
from rl.tasks import tiny
from rl.types import Completion

MODEL = str(Path(__file__).resolve().parents[1] / "recipes" / "models" / "tiny-base")
SETTINGS = SamplingSettings(max_tokens=16)
SEED = 7
SAMPLES = 3
SHARD = 5  # which ends within a problem
BATCH = 3  # a shard is two batches
PROBLEMS = tiny.problems("train", 4, (2, 3))


class Noted(TransformersSampler):
    """Writes down what it is asked for, before it draws."""

    log: Path

    def sample(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        report: Callable[[int], None] = lambda finished: None,
    ) -> list[Completion]:
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps([request.seed for request in requests]) + "\n")
        return super().sample(requests, settings, report)


def fill(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, log: Path, kill: str) -> None:
    """Fill the pool in `folder`, or die at `kill`."""
    site, _, number = kill.partition(":")
    if site == "forward":
        left = int(number)

        def count(*_: object) -> None:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

        model.register_forward_pre_hook(count)
    elif site:
        os.environ["REASON_FAULT"] = f"{kill}:kill"
    sampler = Noted(model, tokenizer, BATCH)
    sampler.log = log
    address = pool_address("tiny-base", PROBLEMS, tokenizer, SETTINGS, SEED)
    fill_pool(
        Pool.open(folder, address), sampler, tokenizer, PROBLEMS, tiny.TASK, SAMPLES, SETTINGS, SEED, shard_size=SHARD
    )


def main() -> None:
    """Do the jobs of stdin, one after the other."""
    model, tokenizer = load_model(MODEL), load_tokenizer(MODEL)
    for line in sys.stdin:
        job = json.loads(line)
        folder = Path(job["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        log = folder.with_name(f"{folder.name}.log")
        log.unlink(missing_ok=True)
        child = os.fork()
        if not child:
            fill(model, tokenizer, folder, log, job["kill"])
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        calls = [json.loads(call) for call in log.read_text().splitlines()] if log.exists() else []
        sys.stdout.write(json.dumps({"ended": ended, "calls": calls}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
