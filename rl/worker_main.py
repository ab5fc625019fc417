"""The process side of `rl.workers.WorkerPool`: one JSON line in, one JSON line out. Standard library only.

if __name__ == "__main__":
    serve(lambda request: ..., seconds=5.0, memory=2 * 2**30)
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any


def serve(answer: Callable[[Any], Any], *, seconds: float, memory: int | None = None) -> None:
    """Answer requests until stdin ends.

    Whatever `answer` raises becomes the error of that request. Two things hold even where the code that hangs holds
    the interpreter lock and its parent is gone: the kernel ends this process `seconds` after a request began (SIGALRM
    with its default action), and an allocation beyond `memory` bytes of address space fails.
    """
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no reply
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _say(replies, "ready")
    for line in sys.stdin.buffer:
        number, request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            reply = [number, "", answer(request)]
        except MemoryError:
            reply = [number, "out of memory", None]
        except RecursionError:
            reply = [number, "nested too deeply", None]
        except Exception as error:  # whatever a verifier may raise
            reply = [number, f"{type(error).__name__}: {error}"[:200], None]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        _say(replies, reply)


def _say(replies: Any, value: Any) -> None:
    replies.write(json.dumps(value).encode() + b"\n")
    replies.flush()
