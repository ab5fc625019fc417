"""What a planner must know of a device: memory, bandwidth, speed. Numbers are those of the vendors' data sheets.

Dense bf16 figures, without sparsity. `this_device` gives the GPU that is present, or the CPU as it measures itself in
a moment: other work on it makes that figure lower, as it makes the run slower.

Line: `reason plan RECIPE --gpu H100-80GB`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Device:
    """Memory in bytes, bandwidth in bytes a second, speed in multiply-adds × 2 a second in the dtype of training.

    `usable`: the share of the memory that tensors can have; the rest is the CUDA context, NCCL's buffers and what the
    allocator cannot give again. `on_gpu`: bf16 autocast and fused kernels there, fp32 elsewhere.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    usable: float = 0.92
    on_gpu: bool = True

    @property
    def limit(self) -> int:
        """Bytes that a plan may use."""
        return int(self.memory * self.usable)


DEVICES = MappingProxyType(
    {
        device.name: device
        for device in (
            Device("A100-40GB", 40 * GIB, 1.555e12, 312e12),
            Device("A100-80GB", 80 * GIB, 2.039e12, 312e12),
            Device("H100-80GB", 80 * GIB, 3.35e12, 989e12),
            Device("H200", 141 * 10**9, 4.8e12, 989e12),
            Device("L40S", 48 * 10**9, 0.864e12, 362e12),
            Device("RTX-4090", 24 * GIB, 1.008e12, 165e12),
        )
    }
)


def find_device(name: str | None) -> Device:
    """The device of that name, `cpu` for this machine's; None for the one that is present.

    Errors: ValueError for a name that is not known, with those that are.
    """
    if name is None:
        return this_device()
    if name.lower() == "cpu":
        return this_cpu()
    folded = {known.lower(): device for known, device in DEVICES.items()}
    if name.lower() not in folded:
        near = [known for known in folded if known.startswith(name.lower())]
        near = near or get_close_matches(name.lower(), folded, 1, 0.4)
        hint = f"; did you mean {folded[near[0]].name}?" if near else ""
        raise ValueError(f"--gpu {name[:40]!r} is not known{hint} Known are {', '.join(DEVICES)} and cpu")
    return folded[name.lower()]


def this_device() -> Device:
    """The GPU of this machine, else its CPU. A GPU that is not in the table has its own memory and an A100's speed."""
    import torch

    if not torch.cuda.is_available():
        return this_cpu()
    found = torch.cuda.get_device_properties(0)
    near = [device for device in DEVICES.values() if device.name.split("-")[0] in found.name.replace("RTX ", "RTX-")]
    like = min(near or [DEVICES["A100-80GB"]], key=lambda device: abs(device.memory - found.total_memory))
    return Device(found.name, found.total_memory, like.bandwidth, like.flops)


def this_cpu() -> Device:
    """This machine: all of its memory, and what a product of matrices and a copy reach on torch's threads."""
    import torch

    matrix, other = torch.ones(1024, 1024), torch.ones(1024, 1024)
    flops = 2 * 1024**3 / _best(lambda: matrix @ other)
    block = torch.ones(16 * 2**20)
    bandwidth = 2 * block.nbytes / _best(lambda: block.clone())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device("cpu", memory, bandwidth, flops, usable=0.8, on_gpu=False)


def _best(work: Callable[[], object], tries: int = 4) -> float:
    """Seconds of the quickest of some tries."""
    assert callable(work)
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return max(min(seconds), 1e-9)
