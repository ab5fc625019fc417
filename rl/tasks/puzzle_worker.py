"""Scores answers to puzzles with reasoning-gym, inside a sandbox (`python -m rl.tasks.puzzle_worker SECONDS`).

A request names a set, the reference, the metadata that the set's scorer reads, and some answers. They are scored in a
child process of their own: reasoning-gym takes seconds to import and some milliseconds to fork, and what a child leaves
behind in a module reaches no other problem. A child that hangs, dies or eats memory costs the one answer that it was
at, and another child goes on with the next. A blocked set is refused here too, whatever a request says. This process
reports what was scored; `rl.tasks.puzzles` makes verdicts of it.

Requests: `{"set": "gcd", "gold": "6", "metadata": {}, "answers": ["5", "6"]}` -> for each answer one of

    {"gold": 1.0, "score": 0.0}                       the scores of the reference and of the answer
    {"gold": 1.0, "unreadable": "ValueError: ..."}    the scorer raised on the answer
    {"gold": 0.0, "unreadable": "KeyError: ..."}      it raised on the reference already
    {"failure": "timeout", "reason": "..."}           the child did not come to an end, or "crash": it died

and in each the seconds that it took.
"""

from __future__ import annotations

import copy
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any, NoReturn

from rl.tasks.puzzle_sets import look_up, require_gym
from rl.types import JudgeFailure
from rl.worker_main import serve

MOST_ANSWERS = 8  # in a request
_BUILD_SECONDS = 20.0  # the first request of a set waits for the set's scorer to be made
MEMORY = 2 * 2**30  # bytes of address space
_MOST_REPLY = 1 << 12  # bytes that a child may say
_MOST_REASON = 200  # characters
# What scorers raise on what they cannot read. Anything else ends the child: no memory, too deep, an end of its own.
_UNREADABLE = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, StopIteration)

Score = Callable[[str, dict[str, Any]], float]  # of an answer and the entry that it belongs to
Work = Callable[[], dict[str, Any]]  # gives a result without its seconds


def request_seconds(seconds: float) -> float:
    """How long a request may take whose answers take at most `seconds` each: `request_seconds(5.0) == 68.0`."""
    return MOST_ANSWERS * (seconds + 1) + _BUILD_SECONDS


@cache
def scorer(name: str) -> Score:
    """`score_answer` of a set. Making one takes up to two seconds. Errors: PuzzlesRefused for a set that is not used.

    What a scorer pays less than 1 for may depend on the set's configuration, but what it pays 1 for does not in any of
    the sets that are used, so that one with the default configuration serves all levels.
    """
    look_up(name)
    from reasoning_gym.factory import DATASETS

    dataset, configuration = DATASETS[name]
    return dataset(configuration(seed=0, size=10)).score_answer


def answer(request: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    """What became of the answers of one request, see above. Errors: PuzzlesRefused."""
    score = scorer(request["set"])
    metadata = request["metadata"]
    if look_up(request["set"]).tuples:
        metadata = with_tuples(metadata)
    return in_children(
        [partial(scored, score, request["gold"], metadata, given) for given in request["answers"]], seconds
    )


def scored(score: Score, gold: str, metadata: dict[str, Any], given: str) -> dict[str, Any]:
    """The reference goes first, so that what the scorer raises on the answer is known to be the answer's doing.

    `float("x")` as the scorer, gold "1", given "x" -> `{"gold": 1.0, "unreadable": "ValueError: could not ..."}`
    """

    def entry() -> dict[str, Any]:
        return {"answer": gold, "metadata": copy.deepcopy(metadata)}  # some scorers write into it

    reference = 0.0
    try:
        reference = float(score(gold, entry()))
        return {"gold": reference, "score": float(score(given, entry()))}
    except _UNREADABLE as error:
        return {"gold": reference, "unreadable": f"{type(error).__name__}: {error}"[:_MOST_REASON]}


def in_children(works: Sequence[Work], seconds: float) -> list[dict[str, Any]]:
    """The results of `works`, each in at most `seconds`: done one after the other in one child, and where that hangs or
    dies, in another one from the next work on. What a work raises ends its child."""
    results: list[dict[str, Any]] = []
    while len(results) < len(works):
        results += _in_child(works[len(results) :], seconds)
    return results


def _in_child(works: Sequence[Work], seconds: float) -> list[dict[str, Any]]:
    """The results of all works, or of some first ones, the last of which is a failure."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        _be_child(works, theirs, seconds)
    os.close(theirs)
    results: list[dict[str, Any]] = []
    started = time.monotonic()
    try:
        for line in _lines(ours, seconds):
            now = time.monotonic()
            results.append(json.loads(line) | {"seconds": now - started})
            started = now
        failure = (JudgeFailure.CRASH, "the scorer died")
    except TimeoutError:
        failure = (JudgeFailure.TIMEOUT, f"killed after {seconds:g} s")
    except (ValueError, TypeError):
        failure = (JudgeFailure.CRASH, "the scorer said nonsense")
    finally:
        os.close(ours)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if len(results) < len(works):
        kind, reason = failure
        results.append({"failure": kind, "reason": reason, "seconds": time.monotonic() - started})
    return results[: len(works)]


def _lines(pipe: int, seconds: float) -> Iterator[bytes]:
    """The lines from a pipe until it is closed. Errors: TimeoutError for a line that takes longer than `seconds`,
    ValueError for one that is too long."""
    said = b""
    deadline = time.monotonic() + seconds
    while True:
        *lines, said = said.split(b"\n")
        for line in lines:
            if len(line) > _MOST_REPLY:
                break
            yield line
            deadline = time.monotonic() + seconds
        if max(map(len, [*lines, said])) > _MOST_REPLY:
            raise ValueError("too long a line")
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            raise TimeoutError
        data = os.read(pipe, _MOST_REPLY)
        if not data:
            return
        said += data


def _be_child(works: Sequence[Work], pipe: int, seconds: float) -> NoReturn:
    """Do the works, say the results, leave. The descriptors of the parent's conversation are closed before."""
    code = 1
    try:
        os.close(0)
        os.closerange(3, pipe)  # 1 and 2 stay: libraries print, and `serve` has led both to where nobody reads
        os.closerange(pipe + 1, 1 << 10)
        for work in works:
            signal.setitimer(signal.ITIMER_REAL, seconds + 1)  # of this child alone, should its parent be gone
            os.write(pipe, json.dumps(work()).encode() + b"\n")
        code = 0
    finally:
        os._exit(code)


def with_tuples(value: Any) -> Any:
    """The value with a tuple for each list: `with_tuples({"output": [[1, 2]]}) == {"output": ((1, 2),)}`."""
    if isinstance(value, dict):
        return {key: with_tuples(inner) for key, inner in value.items()}
    return tuple(with_tuples(inner) for inner in value) if isinstance(value, list) else value


def main() -> None:
    require_gym()
    import reasoning_gym  # noqa: F401  the import counts as starting up, not as the first answer

    seconds = float(sys.argv[1])
    serve(lambda request: answer(request, seconds), seconds=request_seconds(seconds) + 1, memory=MEMORY)


if __name__ == "__main__":
    main()
