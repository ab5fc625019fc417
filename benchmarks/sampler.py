"""Tokens a second of our transformers sampler and of `model.generate`, alternating in one process.

    OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/sampler.py
    ... --rounds 9 --problems 16 --samples 16 --max-tokens 160 --batch-size 256 --model recipes/models/tiny-base

Both draw the same prompts' completions from the same distribution (temperature 1, no top-k, no top-p) and both get the
whole lot at once. Only tokens up to and with the EOS count. `generate` runs with its dynamic cache (the static one was
5 % slower on the CPU), prompts expanded by `num_return_sequences`, no scores. Both use the model's SDPA; eager
attention made each about 5 % faster on a model this small.
The lengths it draws differ from round to round, so each round's speed is its own tokens over its own seconds.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from statistics import median

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl.policy import load_model, load_tokenizer, stop_token_ids
from rl.prompts import render_prompt
from rl.samplers.base import SampleRequest, SamplingSettings, sample_seed
from rl.samplers.transformers import TransformersSampler
from rl.tasks import tiny


def draw_ours(sampler: TransformersSampler, prompts: list[tuple[int, ...]], samples: int, limit: int, seed: int) -> int:
    """The number of tokens drawn."""
    requests = [
        SampleRequest(prompt, sample_seed(seed, index, sample))
        for index, prompt in enumerate(prompts)
        for sample in range(samples)
    ]
    return sum(c.num_tokens for c in sampler.sample(requests, SamplingSettings(max_tokens=limit)))


def draw_theirs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[tuple[int, ...]], samples: int,
    limit: int, seed: int,
) -> int:  # fmt: skip
    """The number of tokens drawn up to and with each sequence's EOS."""
    torch.manual_seed(seed)
    rows = {"input_ids": [list(prompt) for prompt in prompts]}
    batch = tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(model.device)
    stop_ids = list(stop_token_ids(model, tokenizer))
    output = model.generate(  # pyright: ignore[reportCallIssue]
        **batch, num_return_sequences=samples, max_new_tokens=limit,
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    completions = output[:, batch["input_ids"].shape[1] :]
    ends = torch.isin(completions, torch.tensor(stop_ids, device=completions.device)).int()
    # A token counts if no EOS came before it.
    return int(((ends.cumsum(-1) - ends) == 0).sum())


def timed(draw: Callable[[int], int], seed: int) -> tuple[int, float]:
    """(tokens, seconds) of one call."""
    start = time.perf_counter()
    tokens = draw(seed)
    return tokens, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="recipes/models/tiny-base")
    for name, default in (("rounds", 7), ("problems", 16), ("samples", 16), ("max-tokens", 160), ("batch-size", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    model, tokenizer = load_model(asked.model), load_tokenizer(asked.model)
    sampler = TransformersSampler(model, tokenizer, asked.batch_size)
    prompts = [render_prompt(tokenizer, problem) for problem in tiny.problems("train", asked.problems)]
    shape = (prompts, asked.samples, asked.max_tokens)
    contestants = {
        "ours": lambda seed: draw_ours(sampler, *shape, seed),
        "model.generate": lambda seed: draw_theirs(model, tokenizer, *shape, seed),
    }
    print(f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{model.device.type}, {model.dtype}, {torch.get_num_threads()} threads, {asked.model}")
    print(f"{asked.problems} x {asked.samples} sequences, at most {asked.max_tokens} tokens, {asked.rounds} rounds")
    rounds: dict[str, list[tuple[int, float]]] = {name: [] for name in contestants}
    for index in range(asked.rounds + 1):
        for name, draw in contestants.items():
            measured = timed(draw, seed=index)
            if index > 0:  # the first is the warm-up
                rounds[name].append(measured)
    speeds = {name: [tokens / seconds for tokens, seconds in each] for name, each in rounds.items()}
    for name, each in rounds.items():
        mean_tokens = sum(tokens for tokens, _ in each) / len(each) / (asked.problems * asked.samples)
        slowest, fastest = min(speeds[name]), max(speeds[name])
        print(
            f"{name:15} {median(speeds[name]):8.0f} tokens/s ({slowest:.0f} to {fastest:.0f})  "
            f"{median(seconds for _, seconds in each):6.3f} s a round  {mean_tokens:5.1f} tokens a sequence"
        )
    print(f"ratio: {median(speeds['ours']) / median(speeds['model.generate']):.2f}")


if __name__ == "__main__":
    main()
