"""`reason plan` against what SFT takes on a CPU: peak memory and time of a step, each setting in a fresh process.

Made models of random weights go through `distill.sft.train`, three optimizer steps. Memory: the highest resident size
minus that before the model loads; glibc gives freed blocks back at once (MALLOC_MMAP_THRESHOLD_), so that tensors count
and not what the allocator keeps. Time: process CPU time of a step, the smaller of the last two, since other work on the
machine can only add to it; one setting, not among those reported, gives the speed that the others are predicted with.

    python benchmarks/plan_accuracy.py            the table, and exit code 1 where one is off by more than 10 % or 30 %
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

MEMORY_BOUND, TIME_BOUND = 0.10, 0.30
PROMPT = "1+1"


@dataclass(frozen=True, slots=True)
class Setting:
    """One run: a made model (`family` is llama or qwen2) and how it is trained. `rows` of `length` tokens a step."""

    name: str
    family: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    tied: bool
    rows: int
    length: int
    checkpointing: bool = False
    lora: int | None = None
    chunked: bool = False
    micro_batch_tokens: int | None = None


CALIBRATION = Setting("calibration", "llama", 4000, 1024, 8, 16, 16, 2816, True, 2, 384)
SETTINGS = (
    Setting("qwen2 121M, long", "qwen2", 8000, 768, 16, 12, 4, 2304, False, 1, 768),
    Setting("llama 117M", "llama", 8000, 1024, 9, 16, 16, 2730, False, 2, 256),
    Setting("llama 109M, checkpointing", "llama", 4000, 1024, 8, 16, 8, 3072, True, 4, 256, checkpointing=True),
    Setting("qwen2 150M, LoRA", "qwen2", 8000, 1024, 12, 16, 4, 2816, True, 3, 512, lora=16),
    Setting("llama 140M, LoRA, checkpointing", "llama", 16_000, 1024, 10, 16, 4, 3072, True, 6, 384, True, 8),
    Setting("qwen2 105M, chunked loss", "qwen2", 16_000, 768, 12, 12, 4, 2304, False, 2, 384, chunked=True),
    Setting("llama 100M, micro-batches", "llama", 4000, 768, 12, 12, 12, 2304, True, 4, 256, micro_batch_tokens=512),
    Setting("qwen2 227M", "qwen2", 8000, 1280, 12, 20, 4, 3456, True, 1, 256),
)


def training_of(setting: Setting):
    """The setting as the planner counts it."""
    from distill.plan_memory import Training, chunked_head, trl_head_cpu
    from distill.plan_models import ModelShape

    shape = ModelShape(
        setting.vocab, setting.hidden, setting.layers, setting.heads, setting.kv_heads, setting.hidden // setting.heads,
        setting.mlp, setting.tied, qkv_bias=setting.family == "qwen2",
    )  # fmt: skip
    whole = setting.rows * setting.length
    return Training(
        shape, setting.micro_batch_tokens or whole, chunked_head if setting.chunked else trl_head_cpu,
        checkpointing=setting.checkpointing, lora_rank=setting.lora,
        accumulates=setting.micro_batch_tokens is not None,
    )  # fmt: skip


def make(setting: Setting, folder: Path) -> None:
    """Write the made model with the tiny world's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    from rl.policy import save_model
    from rl.tasks.tiny_models import make_tokenizer

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[setting.family](
        vocab_size=setting.vocab, hidden_size=setting.hidden, intermediate_size=setting.mlp,
        num_hidden_layers=setting.layers, num_attention_heads=setting.heads, num_key_value_heads=setting.kv_heads,
        max_position_embeddings=4096, tie_word_embeddings=setting.tied, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    save_model(AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer, folder)


def measure(setting: Setting, folder: Path) -> None:
    """Train three steps here; prints bytes above the size before the model loads, and CPU seconds of a step."""
    import peft  # noqa: F401  # imported by LoRA; before the model loads it is not the model's memory
    import torch

    from distill.sft import Forward, LoraSettings, SftSettings, train
    from distill.traces import Trace
    from rl.policy import load_tokenizer
    from rl.prompts import render_prompt
    from rl.types import Problem, TextPart

    torch.set_num_threads(1)
    tokenizer = load_tokenizer(folder)
    prompt = len(render_prompt(tokenizer, Problem(id="p", question=(TextPart(PROMPT),), answer="")))
    text = ("0123456789" * setting.length)[: setting.length - prompt - 1]
    traces = [Trace(f"p{i}", PROMPT, text, len(text), "t") for i in range(3 * setting.rows)]
    seen: list[tuple[int, float]] = []
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    with tempfile.TemporaryDirectory() as out:
        train(
            Path(out), model=folder, traces=traces,
            settings=SftSettings(
                epochs=1, learning_rate=1e-4, batch_size=setting.rows, max_length=setting.length, seed=0, save_every=0,
                forward=Forward(
                    micro_batch_tokens=setting.micro_batch_tokens, chunked_loss=setting.chunked,
                    gradient_checkpointing=setting.checkpointing,
                ),
                lora=None if setting.lora is None else LoraSettings(rank=setting.lora),
            ),
            report=lambda step, total, metrics: seen.append((status("VmHWM"), time.process_time())),
        )  # fmt: skip
    print(json.dumps({"bytes": seen[-1][0] - before, "seconds": min(b[1] - a[1] for a, b in pairwise(seen))}))


def status(key: str) -> int:
    """A size of this process in bytes, from the kernel."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def run(setting: Setting) -> dict[str, float]:
    """Measure a setting in a process of its own."""
    env = os.environ | {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        make(setting, Path(folder) / "model")
        command = [sys.executable, __file__, json.dumps(asdict(setting)), str(Path(folder) / "model")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{setting.name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    from distill.plan_memory import training_memory
    from distill.plan_time import training_flops

    def work(setting: Setting) -> float:
        return setting.rows * setting.length * training_flops(training_of(setting), setting.length)

    speed = work(CALIBRATION) / run(CALIBRATION)["seconds"]
    print(f"calibration: {speed / 1e9:.1f} GFLOP/s of CPU time\n")
    print("| setting | GB predicted | GB measured | off | s a step predicted | s measured | off |")
    print("|---|---|---|---|---|---|---|", flush=True)
    good = True
    for setting in SETTINGS:
        found = run(setting)
        size, seconds = training_memory(training_of(setting)).total, work(setting) / speed
        off, late = size / found["bytes"] - 1, seconds / found["seconds"] - 1
        good = good and abs(off) <= MEMORY_BOUND and abs(late) <= TIME_BOUND
        print(
            f"| {setting.name} | {size / 1e9:.2f} | {found['bytes'] / 1e9:.2f} | {off:+.1%} | {seconds:.1f} "
            f"| {found['seconds']:.1f} | {late:+.0%} |",
            flush=True,
        )
    return 0 if good else 1


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(Setting(**json.loads(sys.argv[1])), Path(sys.argv[2]))
    else:
        sys.exit(main())
