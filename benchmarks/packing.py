"""Three ways to train on rows of many lengths, timed against each other: padded rows, packed rows, shared prompts.

    python -m benchmarks.packing [--threads 2] [--rounds 7] [--budgets 2048 4096] [--stretches 1 4]

Forward and backward of one policy update (16 problems × 16 completions) of the tiny base model, the three ways taking
turns, medians over the rounds. Lengths are drawn to the distribution that the tiny recipe's rollouts have (5 to 115
tokens, about 37 on average), then four times as long. The padded way is the best one could do with padding: rows sorted
by length, cut where 10 % of a micro-batch would be padding, padded on the right so that no mask is needed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from rl.attention import cut_buckets
from rl.packing import pack, plan_micro_batches
from rl.policy import PolicyModel, load_model
from rl.rows import TrainingRow

MODEL = Path(__file__).parent.parent / "recipes" / "models" / "tiny-base"


@dataclass(frozen=True, slots=True)
class Work:
    """What one update ran: tokens in its forward passes (padding counted) and micro-batches."""

    tokens: int
    micro_batches: int


def made_rows(stretch: int, seed: int, problems: int = 16, samples: int = 16) -> list[TrainingRow]:
    """Rows of random ids, lengths log-normal around a median of the problem's own, times `stretch`."""
    rng = random.Random(seed)
    rows = []
    for problem in range(problems):
        prompt = tuple(rng.choices(range(3, 25), k=rng.randint(8, 12)))
        median = rng.lognormvariate(3.4, 0.35)
        for sample in range(samples):
            length = stretch * min(115, max(5, round(rng.lognormvariate(0, 0.4) * median)))
            ids = tuple(rng.choices(range(3, 25), k=length))
            rows.append(TrainingRow(prompt, ids, (-1.0,) * length, rng.gauss(0, 1), str(problem), sample))
    return rows


def padded_update(policy: PolicyModel, rows: Sequence[TrainingRow], max_tokens: int) -> Work:
    """Sorted rows, padded on the right, at most 10 % padding and `max_tokens` tokens a micro-batch."""
    lengths = [len(row.prompt_ids) + row.num_tokens for row in rows]
    tokens = count = 0
    for bucket in cut_buckets(lengths):
        width = lengths[bucket[0]]
        step = max(1, max_tokens // width)
        for start in range(0, len(bucket), step):
            chosen = [rows[i] for i in bucket[start : start + step]]
            ids = torch.tensor([[*r.prompt_ids, *r.token_ids] + [0] * (width - row_tokens(r)) for r in chosen])
            longest = max(r.num_tokens for r in chosen)
            first = torch.tensor([len(r.prompt_ids) for r in chosen]).unsqueeze(1)
            at = (first + torch.arange(longest)).clamp(max=width - 1)
            mask = torch.arange(longest) < torch.tensor([[r.num_tokens] for r in chosen])
            hidden = policy.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            scored = hidden.gather(1, (at - 1).unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
            head = policy.model.get_output_embeddings()
            assert isinstance(head, torch.nn.Linear)
            logits = head(scored).log_softmax(-1)
            logprobs = logits.gather(-1, ids.gather(1, at).unsqueeze(-1)).squeeze(-1)
            advantages = torch.tensor([[r.advantage] for r in chosen])
            (-(logprobs * advantages * mask).sum() / 1000).backward()
            tokens, count = tokens + ids.numel(), count + 1
    return Work(tokens, count)


def row_tokens(row: TrainingRow) -> int:
    return len(row.prompt_ids) + row.num_tokens


def packed_update(
    policy: PolicyModel, rows: Sequence[TrainingRow], max_tokens: int, share_prompts: bool = False
) -> Work:
    """Packed rows as in training, every row with a prompt of its own unless `share_prompts`."""
    tokens = count = 0
    for micro_batch in plan_micro_batches(rows, max_tokens)[0]:
        batch = pack(micro_batch, share_prompts=share_prompts)
        logprobs, _ = policy(batch, 1.0)
        (-(logprobs * batch.advantages.unsqueeze(-1) * batch.completion_mask).sum() / 1000).backward()
        tokens, count = tokens + batch.num_tokens, count + 1
    return Work(tokens, count)


shared_update = partial(packed_update, share_prompts=True)


def measure(
    policy: PolicyModel, ways: dict[str, Callable[[], Work]], rounds: int
) -> dict[str, tuple[float, float, Work]]:
    """Median seconds on the wall and of the CPU (less shaken by other processes), and the work, of each way."""
    walls: dict[str, list[float]] = {name: [] for name in ways}
    cpus: dict[str, list[float]] = {name: [] for name in ways}
    work = {}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            policy.zero_grad(set_to_none=True)
            wall, cpu = time.perf_counter(), time.process_time()
            work[name] = way()
            if turn:  # the first round warms up
                walls[name].append(time.perf_counter() - wall)
                cpus[name].append(time.process_time() - cpu)
    return {name: (statistics.median(walls[name]), statistics.median(cpus[name]), work[name]) for name in ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budgets", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--stretches", type=int, nargs="+", default=[1, 4], help="completions so many times as long")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    policy = PolicyModel(load_model(MODEL, to_train=True))
    print(f"threads {arguments.threads}, medians of {arguments.rounds} rounds, forward + backward")
    for stretch in arguments.stretches:
        rows = made_rows(stretch, seed=0)
        needed = sum(map(row_tokens, rows))
        completion = sum(row.num_tokens for row in rows)
        lengths = sorted(row.num_tokens for row in rows)
        print(
            f"\n{len(rows)} rows, {completion} completion tokens ({lengths[0]}..{lengths[-1]}), {needed} with prompts"
        )
        ways: dict[str, Callable[[], Work]] = {}
        for budget in arguments.budgets:
            for name, way in (("padded", padded_update), ("packed", packed_update), ("shared", shared_update)):
                ways[f"{name:8s}{budget:6d}"] = partial(way, policy, rows, budget)
        for name, (wall, cpu, work) in measure(policy, ways, arguments.rounds).items():
            print(
                f"{name}: {wall * 1000:7.1f} ms, {cpu * 1000:7.1f} ms of CPU  {completion / wall:6.0f} tokens/s  "
                f"{work.micro_batches:3d} micro-batches  {work.tokens / needed - 1:+7.1%} tokens"
            )


if __name__ == "__main__":
    main()
