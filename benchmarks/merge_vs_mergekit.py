"""Seconds of our merge and of mergekit's on one pair of models, in turns, and how far their results differ.

    REASON_MERGEKIT=VENV/bin/python PYTHONPATH=. OMP_NUM_THREADS=2 \
        python benchmarks/merge_vs_mergekit.py --folder FOLDER
    ... --layers 2 --rounds 1            a small one first
    ... --rules linear,slerp --keep      leave the models there for another run

REASON_MERGEKIT names the Python of an environment with `mergekit==0.1.5`, or its `mergekit-yaml`. Without it only ours
runs. The models are Llama-shaped with random bf16 weights in shards: a base, and two parents near it. Both tools run as
processes of their own, from start to exit, with the parents in the page cache; both leave it to the system when the
result reaches the disk, and it is synced and removed before the next one starts. mergekit computes in fp32 and writes
bf16 as ours does.

Differences are counted in bf16 ulps of the result. Two kinds beyond 1 have a reason and are told apart. Results that
nearly cancel have an ulp below the fp32 rounding of their operands, or of slerp's two coefficients: in ulps of the
larger parent they differ by at most 1. And of deltas that equal the trim threshold of TIES, mergekit drops as many as
its sort happens to put last. Memory is RssAnon of our process, sampled; VmHWM counts the mapped files as well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from long2short.merge import LINEAR, Parents, merge
from long2short.merge_files import INDEX, ModelFolder, TensorInfo, by_file, open_shard
from long2short.merge_rules import PIECE, Rule, slerp, ties, trim_thresholds
from long2short.merge_weights import Weights
from rl.tasks.tiny_models import make_tokenizer

WEIGHT, DENSITY = 0.6, 0.8
ULPS = 1.0  # bf16 ulps of the larger parent that a result may differ by; TIES' equals at the threshold are told apart
RULES = {"linear": LINEAR, "ties": ties(DENSITY), "slerp": Rule(slerp)}
SHARD_BYTES = 1_500_000_000
THREADS = torch.get_num_threads()  # for both tools


# --- the models -------------------------------------------------------------------------------------------------------


def layout(layers: int, hidden: int, intermediate: int, vocabulary: int) -> dict[str, TensorInfo]:
    """The tensors of a Llama of 16 heads and 8 key heads with tied embeddings, spread over shards."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name, rows in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2), ("o", hidden)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, hidden)
        for name in ("gate", "up"):
            shapes[f"{at}.mlp.{name}_proj.weight"] = (intermediate, hidden)
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, intermediate)
        shapes[f"{at}.input_layernorm.weight"] = shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    tensors: dict[str, TensorInfo] = {}
    shard, filled = 1, 0
    for name, shape in shapes.items():
        info = TensorInfo(f"model-{shard:05d}.safetensors", shape, "BF16")
        if filled and filled + info.num_bytes > SHARD_BYTES:
            shard, filled = shard + 1, 0
            info = TensorInfo(f"model-{shard:05d}.safetensors", shape, "BF16")
        tensors[name] = info
        filled += info.num_bytes
    return tensors


def make_models(folder: Path, tensors: Mapping[str, TensorInfo], config: dict[str, object]) -> Parents:
    """A base with weights of size .02, and two parents whose deltas have size .002, in `folder`."""
    generator = torch.Generator().manual_seed(0)
    paths = [folder / name for name in ("long", "short", "base")]
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
        make_tokenizer().save_pretrained(path)
        (path / "config.json").write_text(json.dumps(config))
        weight_map = {name: info.file for name, info in tensors.items()}
        total = sum(info.num_bytes for info in tensors.values())
        (path / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    for file, held in by_file(tensors).items():
        with (
            open_shard(paths[0] / file, held) as long,
            open_shard(paths[1] / file, held) as short,
            open_shard(paths[2] / file, held) as base,
        ):
            for name, info in held.items():
                for first in range(0, info.numel, PIECE):
                    size = min(PIECE, info.numel - first)
                    values = torch.randn(size, generator=generator).mul_(0.02)
                    base.write(name, first, values.bfloat16())
                    for writer in (long, short):
                        delta = torch.randn(size, generator=generator).mul_(0.002)
                        writer.write(name, first, (values + delta).bfloat16())
    return Parents(paths[0], paths[1], paths[2])


# --- one run of each --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """One merge. Example: `Run(seconds=21.3, anonymous=420_000_000, peak=9_100_000_000)`."""

    seconds: float
    anonymous: int  # most RssAnon seen, bytes
    peak: int  # VmHWM, bytes


def run(command: list[str]) -> Run:
    """Run a command to its end; its output is shown if it fails."""
    with tempfile.TemporaryFile("w+") as said:  # a pipe that nobody reads would stop a process that says much
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, text=True)
        anonymous = peak = 0
        while process.poll() is None:
            held = memory(process.pid)
            anonymous, peak = max(anonymous, held.get("RssAnon", 0)), max(peak, held.get("VmHWM", 0))
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{said.read()}")
    return Run(seconds, anonymous, peak)


def memory(pid: int) -> dict[str, int]:
    """RssAnon and VmHWM of a process in bytes; {} where it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = [line.split() for line in lines if line.startswith(("RssAnon:", "VmHWM:"))]
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in fields}


def ours(folder: Path, rule: str, out: Path) -> list[str]:
    return [sys.executable, __file__, "--folder", str(folder), "--one", rule, "--out", str(out)]


def mergekits(tool: str, folder: Path, rule: str, out: Path) -> list[str]:
    """The command line of mergekit, whose config is written to `folder`."""
    parameters = {"linear": {}, "ties": {"density": DENSITY}, "slerp": {}}[rule]
    models = [
        {"model": str(folder / name), "parameters": {"weight": weight, **parameters}}
        for name, weight in (("long", WEIGHT), ("short", 1 - WEIGHT))
    ]
    config: dict[str, object] = {"merge_method": rule, "models": models, "dtype": "float32", "out_dtype": "bfloat16"}
    if rule == "ties":
        config["base_model"] = str(folder / "base")
    if rule == "slerp":
        config |= {"models": [{"model": str(folder / name)} for name in ("long", "short")]}
        config |= {"base_model": str(folder / "long"), "parameters": {"t": 1 - WEIGHT}}
    path = folder / f"{rule}.yml"
    path.write_text(json.dumps(config))  # JSON is YAML
    start = [tool] if Path(tool).name == "mergekit-yaml" else [tool, "-m", "mergekit.scripts.run_yaml"]
    return [*start, str(path), str(out), "--quiet", "-j", str(THREADS)]


def warm(parents: list[Path]) -> None:
    """Read the parents once, so that the page cache holds them."""
    for path in sorted(path for parent in parents for path in parent.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def settle(out: Path) -> None:
    """Let what was written reach the disk, so that the next run does not wait for it."""
    for path in out.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())


# --- how far they differ ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Difference:
    """Of two results over all elements."""

    elements: int = 0
    largest: int = 0  # in ulps of the result, deltas at the threshold left out
    beyond: int = 0  # elements beyond 1, the same left out
    of_parents: float = 0.0  # the largest, in ulps of the larger parent
    at_threshold: int = 0  # elements beyond 1 ulp whose delta equals the trim threshold


def differ(mine: Path, others: Path, folder: Path, trimmed: bool) -> Difference:
    found = Difference()
    left, right = ModelFolder.open(mine), ModelFolder.open(others)
    sources = [ModelFolder.open(folder / name) for name in ("long", "short", "base")]
    assert left.tensors.keys() == right.tensors.keys()
    with (
        left.reader() as a,
        right.reader() as b,
        sources[0].reader() as c,
        sources[1].reader() as d,
        sources[2].reader() as e,
    ):
        for name in left.tensors:
            parents = (c(name), d(name), e(name))
            thresholds = (-1.0, -1.0)
            if trimmed:
                pieces = [tuple(p[s : s + PIECE] for p in parents) for s in range(0, parents[0].numel(), PIECE)]
                thresholds = trim_thresholds(
                    lambda look, pieces=pieces: (look(tuple(p.float() for p in piece)) for piece in pieces), DENSITY
                )
            for ours, theirs, *parts in zip(
                *(values.split(PIECE) for values in (a(name), b(name), *parents)), strict=True
            ):
                _count(found, ours, theirs, [part.float() for part in parts], thresholds)
    return found


def _count(
    found: Difference,
    ours: torch.Tensor,
    theirs: torch.Tensor,
    parts: list[torch.Tensor],
    thresholds: tuple[float, float],
) -> None:
    ulps = (_ordered(ours) - _ordered(theirs)).abs()
    long, short, base = parts
    at_threshold = ((long - base).abs() == thresholds[0]) | ((short - base).abs() == thresholds[1])
    found.elements += ulps.numel()
    found.at_threshold += int(((ulps > 1) & at_threshold).sum())
    ulps = ulps.masked_fill(at_threshold, 0)
    found.largest = max(found.largest, int(ulps.max()))
    found.beyond += int((ulps > 1).sum())
    spacing = torch.exp2(torch.floor(torch.log2(torch.maximum(long.abs(), short.abs()).clamp(min=1e-30))) - 7)
    relative = ((ours.float() - theirs.float()).abs() / spacing).masked_fill(at_threshold, 0)
    found.of_parents = max(found.of_parents, float(relative.max()))


def _ordered(values: torch.Tensor) -> torch.Tensor:
    """bf16 as integers whose difference is the number of steps between two values; both zeros are 0."""
    bits = values.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


# --- the whole --------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the models; 5 x 4 GB are needed")
    parser.add_argument("--layers", type=int, default=29, help="29 layers are 4.2 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rules", default="linear,ties,slerp")
    parser.add_argument("--keep", action="store_true", help="leave the models there")
    parser.add_argument("--one", choices=RULES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    folder: Path = asked.folder if asked.one else asked.folder / "merge_vs_mergekit"  # its own, to be removed
    if asked.one:
        base = folder / "base" if RULES[asked.one].takes_base else None
        merge(asked.out, Parents(folder / "long", folder / "short", base), Weights(WEIGHT), RULES[asked.one])
        return
    torch.set_num_threads(1)  # for what this process does itself, piece by piece
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 128_256}
    tensors = layout(asked.layers, *sizes.values())
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", **sizes}
    config |= {"num_hidden_layers": asked.layers, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    config |= {"tie_word_embeddings": True}
    if not (folder / "base" / INDEX).is_file():
        make_models(folder, tensors, config)
    total, largest = sum(i.num_bytes for i in tensors.values()), max(i.num_bytes for i in tensors.values())
    print(f"python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} CPUs")
    print(f"{len(tensors)} tensors, {total / 1e9:.2f} GB, the largest {largest / 1e9:.3f} GB, {asked.rounds} rounds")
    try:
        found = {rule: compare(folder, rule, asked.rounds, largest) for rule in asked.rules.split(",")}
    finally:
        if not asked.keep:
            shutil.rmtree(folder, ignore_errors=True)
    bad = [rule for rule, one in found.items() if not one.within]
    if bad:
        raise SystemExit(f"beyond its bounds (memory, or more than {ULPS} ulp of the larger parent): {', '.join(bad)}")
    known = [one.ratio for one in found.values() if one.ratio is not None]
    if known:
        print(f"the least of {', '.join(found)}")
        print(f"ratio: {min(known):.2f}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a rule came to. Example: `Outcome(ratio=2.58, within=True)`."""

    ratio: float | None  # mergekit's median seconds over ours; None without mergekit
    within: bool  # memory and differences within their bounds


def compare(folder: Path, rule: str, rounds: int, largest: int) -> Outcome:
    """Run a rule in turns; prints its figures."""
    tool = os.environ.get("REASON_MERGEKIT")
    outputs = {"ours": folder / "ours", "mergekit": folder / "mergekit"}
    commands = {"ours": ours(folder, rule, outputs["ours"])}
    if tool:
        commands["mergekit"] = mergekits(tool, folder, rule, outputs["mergekit"])
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for turn in range(rounds):
        for name in list(commands)[:: -1 if turn % 2 else 1]:
            shutil.rmtree(outputs[name], ignore_errors=True)
            warm([folder / parent for parent in ("long", "short", *(["base"] if RULES[rule].takes_base else []))])
            runs[name].append(run(commands[name]))
            settle(outputs[name])
            print(f"{rule:7} {name:9} {runs[name][-1].seconds:7.1f} s, load {os.getloadavg()[0]:.1f}", flush=True)
    for name, each in runs.items():
        seconds = [one.seconds for one in each]
        print(
            f"{rule:7} {name:9} {median(seconds):7.1f} s ({min(seconds):.1f} to {max(seconds):.1f}), RssAnon "
            f"{max(one.anonymous for one in each) / 1e9:.2f} GB, VmHWM {max(one.peak for one in each) / 1e9:.2f} GB"
        )
    allowed = 4 * largest + 500_000_000
    most = max(one.anonymous for one in runs["ours"])
    print(f"{rule:7} memory within 4 x the largest tensor + 0.5 GB = {allowed / 1e9:.2f} GB: {most <= allowed}")
    if not tool:
        return Outcome(None, most <= allowed)
    found = differ(outputs["ours"], outputs["mergekit"], folder, rule == "ties")
    print(
        f"{rule:7} largest difference {found.largest} ulp of the result, {found.beyond} of {found.elements} elements "
        f"beyond 1; {found.of_parents:.3f} ulp of the larger parent; at the trim threshold {found.at_threshold}"
    )
    ratio = median(one.seconds for one in runs["mergekit"]) / median(one.seconds for one in runs["ours"])
    print(f"{rule:7} mergekit / ours: {ratio:.2f}", flush=True)
    for path in outputs.values():
        shutil.rmtree(path, ignore_errors=True)
    return Outcome(ratio, most <= allowed and found.of_parents <= ULPS)


if __name__ == "__main__":
    main()
