"""The process side of `rl.samplers.replicas`: an engine that reads shards and writes completions, a JSON value a line.

Lines to the replica: first `[factory, arguments]`, then one `Work` after the other. Lines from it: `"ready"` once, then
for each shard its progress as plain numbers and its completions as lists, in the order of the requests. JSON gives
every float its shortest exact form, and strings travel as UTF-8 with lone surrogates let through, so what arrives is
equal to what was sent.

An engine that raises ends the process: its state is unknown, and a new process has none of it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from types import TracebackType
from typing import Any, BinaryIO

from rl.samplers.base import Sampler, SampleRequest, SamplingSettings
from rl.samplers.shard_queue import Work
from rl.types import Completion, FinishReason, Segment

REPORT_SECONDS = 0.1  # between two progress lines
PR_SET_PDEATHSIG = 1  # of Linux's prctl


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """How to make a sampler in another process: a function of our own code and its arguments.

    Example: `EngineSpec("rl.samplers.engines:transformers_engine", {"model": "runs/tiny/rl/model", "batch_size": 64})`

    Errors: ValueError for a factory that is not `module:function`, or an argument that JSON would change (a path, a
    tuple): the replica would be called with something else.
    """

    factory: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        module, _, function = self.factory.partition(":")
        if not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
            raise ValueError(f"factory {self.factory!r} is not module:function, like rl.samplers.engines:vllm_engine")
        for name, value in self.arguments.items():
            try:
                same = json.loads(json.dumps(value, allow_nan=False)) == value
            except (TypeError, ValueError):
                same = False
            if not same:
                raise ValueError(
                    f"argument {name} = {value!r} of {self.factory} is not plain JSON: use str, int, float, bool, "
                    "None, lists and dicts with str keys"
                )

    def build(self) -> Sampler:
        """The sampler, made here."""
        module, _, function = self.factory.partition(":")
        return getattr(import_module(module), function)(**self.arguments)


def dump(value: object) -> bytes:
    """A value as one line. Example: `dump([0.1, "é"])` is `[0.1,"é"]` and a newline, in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass") + b"\n"


def load(line: bytes) -> Any:
    """The value of a line. Errors: ValueError."""
    return json.loads(line.decode("utf-8", "surrogatepass"))


def dump_work(work: Work) -> bytes:
    requests = [[r.prompt_ids, r.seed, r.prefix, r.max_tokens] for r in work.requests]
    return dump([requests, asdict(work.settings), work.policy_version])


def load_work(line: bytes) -> Work:
    """Equal to what was dumped."""
    requests, settings, policy_version = load(line)
    if settings["stop_repetition"] is not None:
        from rl.repetition import RepetitionRule  # brings torch with it

        settings["stop_repetition"] = RepetitionRule(**settings["stop_repetition"])
    return Work(
        tuple(SampleRequest(tuple(ids), seed, tuple(prefix), most) for ids, seed, prefix, most in requests),
        SamplingSettings(**settings),
        policy_version,
    )


def dump_completion(completion: Completion) -> bytes:
    segments = [[s.num_tokens, s.policy_version, s.trained] for s in completion.segments]
    return dump(
        [
            completion.text,
            completion.token_ids,
            completion.sampler_logprobs,
            completion.finish_reason,
            completion.policy_version,
            segments,
        ]
    )


def load_completion(row: Any) -> Completion:
    """A completion from the value of its line. Errors: ValueError or TypeError for anything else."""
    text, ids, logprobs, reason, version, segments = row
    drawn = tuple(Segment(*segment) for segment in segments)
    return Completion(text, tuple(ids), tuple(logprobs), FinishReason(reason), version, drawn)


def draw(sampler: Sampler, work: Work, report: Callable[[int], None]) -> list[Completion]:
    """The completions of one shard. Errors: RuntimeError for a sampler that gives too few or too many."""
    sampler.policy_version = work.policy_version
    completions = sampler.sample(work.requests, work.settings, report)
    if len(completions) != len(work.requests):
        raise RuntimeError(f"the engine gave {len(completions)} completions for {len(work.requests)} requests")
    return completions


def main() -> None:
    """Serve until stdin ends."""
    sys.excepthook = _end
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # asked for before a hung replica is ended
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # The pipes move to numbers that the engine's own processes do not get, and what a library prints is no reply.
    lines_in, lines_out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines_in, lines), daemon=True).start()

    factory, arguments = load(lines.get())
    sampler = EngineSpec(factory, arguments).build()
    _say(lines_out, dump("ready"))
    while True:
        work = load_work(lines.get())
        completions = draw(sampler, work, _Progress(lines_out))
        lines_out.writelines(dump_completion(completion) for completion in completions)
        lines_out.flush()


class _Progress:
    """Says how many have finished, at most every `REPORT_SECONDS`. A call that adds none is a sign of life too."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._said = 0.0

    def __call__(self, finished: int) -> None:
        now = time.monotonic()
        if now - self._said >= REPORT_SECONDS:
            self._said = now
            _say(self._out, dump(finished))


def _say(out: BinaryIO, line: bytes) -> None:
    out.write(line)
    out.flush()


def _listen(lines_in: BinaryIO, lines: queue.SimpleQueue[bytes]) -> None:
    """Hand over what comes in; at its end the parent is gone or has had enough, whatever the engine is doing now."""
    for line in lines_in:
        lines.put(line)
    if os.getpgrp() == os.getpid():  # with the processes that the engine started
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An uncaught error ends the process at once: an engine's threads could keep it for ever."""
    traceback.print_exception(kind, error, trace)
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
