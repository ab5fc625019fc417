"""The sampler protocol: what every engine takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

from rl.types import Completion


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One completion to draw. k samples of a problem are k requests with k seeds, so none depends on the others."""

    prompt_ids: tuple[int, ...]
    seed: int  # 64 bits; see `sample_seed`


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """The distribution to draw from. With `top_p` < 1 the log-probs are those of the truncated, renormalised one."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}; use a small one to be nearly greedy"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")


class Sampler(Protocol):
    """Draws completions. `policy_version` is stamped on every completion; the trainer raises it at each update."""

    policy_version: int

    def sample(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        report: Callable[[int], None] = lambda finished: None,
    ) -> list[Completion]:
        """One completion a request, in order. `report` is told how many have finished."""
        ...


def sample_seed(*parts: object) -> int:
    """A 64-bit seed from anything printable: `sample_seed(root, "train", problem.id, sample_index)`."""
    return int.from_bytes(sha256(" ".join(map(str, parts)).encode()).digest()[:8], "big")
