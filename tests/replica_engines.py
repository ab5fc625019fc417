"""Engines for the tests of replicas: made in the replica's process by name, scripted, and able to die or hang."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from rl.samplers.base import Sampler, SampleRequest, SamplingSettings
from rl.types import Completion, FinishReason, Segment


def scripted_completion(request: SampleRequest, settings: SamplingSettings, policy_version: int) -> Completion:
    """A pure function of the request: awkward floats, lone surrogates, line separators."""
    digest = sha256(repr((request, settings.temperature)).encode()).digest()
    count = 1 + digest[0] % 5
    logprobs = tuple(-int.from_bytes(digest[i : i + 6], "big") / 3e13 for i in range(count))
    return Completion(
        f'{request.seed}\u2028\ud83d\ude00 \udcff "\n{digest.hex()}',
        tuple(digest[1 : 1 + count]),
        logprobs,
        list(FinishReason)[digest[-1] % 4],
        policy_version,
        (Segment(count, policy_version, trained=bool(digest[2] % 2)),),
    )


class ScriptedSampler:
    """What happens on the way to a completion is told by its seed: `events[str(seed)]` is called first."""

    def __init__(self, events: dict[int, Callable[[], Any]], seconds: float) -> None:
        self.policy_version = 0
        self._events, self._seconds = events, seconds

    def sample(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        report: Callable[[int], None] = lambda finished: None,
    ) -> list[Completion]:
        completions = []
        for request in requests:
            time.sleep(self._seconds)
            if request.seed in self._events:
                self._events[request.seed]()
            completions.append(scripted_completion(request, settings, self.policy_version))
            report(len(completions))
        return completions


def scripted(seconds: float = 0.0) -> Sampler:
    return ScriptedSampler({}, seconds)


def failing(
    marks: str, die: Sequence[int] = (), hang: Sequence[int] = (), refuse: Sequence[int] = (), wait: Sequence[int] = (),
    times: int = 1, seconds: float = 0.0,
) -> Sampler:  # fmt: skip
    """Dies, hangs (holding no lock) or raises at a request of that seed, the first `times` times over all replicas:
    `marks` is a folder that they share. At a seed to `wait` at, it waits until somebody has failed."""
    folder = Path(marks)

    def few(seed: int, act: Callable[[], Any]) -> Callable[[], Any]:
        def event() -> None:
            for number in range(times):
                try:
                    (folder / f"{seed}-{number}").touch(exist_ok=False)
                except FileExistsError:
                    continue
                sys.stderr.write(f"now at seed {seed}\n")
                sys.stderr.flush()
                act()
                return

        return event

    def refusal() -> None:
        raise ValueError("this engine takes no such request")

    def patience() -> None:
        while not any(folder.iterdir()):
            time.sleep(0.01)
        time.sleep(0.2)

    events = {seed: few(seed, lambda: os._exit(7)) for seed in die}
    events |= {seed: few(seed, lambda: time.sleep(600)) for seed in hang}
    events |= {seed: few(seed, refusal) for seed in refuse}
    return ScriptedSampler(events | dict.fromkeys(wait, patience), seconds)


def unbuildable(model: str) -> Sampler:
    raise FileNotFoundError(f"there is no model in {model}")


def family(pids: str) -> Sampler:
    """An engine with a process of its own that holds the replica's pipes; it writes down both."""
    held = tuple(fd for fd in range(3, 20) if os.path.exists(f"/proc/self/fd/{fd}"))
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=held)
    with Path(pids).open("a") as file:
        file.write(f"{os.getpid()} {child.pid}\n")
    return ScriptedSampler({}, 0.0)


def chatty() -> Sampler:
    """An engine that prints to stdout and reads stdin, as libraries do."""
    os.write(1, b"[0]\n")
    sys.__stdout__.write('"ready"\n')  # pyright: ignore[reportOptionalMemberAccess]
    sys.__stdout__.flush()  # pyright: ignore[reportOptionalMemberAccess]
    assert sys.stdin.read() == ""
    return ScriptedSampler({}, 0.0)


def transformers_engine(model: str, batch_size: int) -> Sampler:
    import torch

    from rl.policy import load_model, load_tokenizer
    from rl.samplers.transformers import TransformersSampler

    torch.set_num_threads(1)
    return TransformersSampler(load_model(model), load_tokenizer(model), batch_size)
