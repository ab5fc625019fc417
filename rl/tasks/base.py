"""What a task is: a judge and a few facts about its answers. Variants are functions, not names that branch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from rl.types import Completion, Problem, Verdict

# DeepSeek-R1 (Nature version): the reflective words whose counts rise 5-7 times during training of R1-Zero.
REFLECTION_WORDS = (
    "wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Task:
    """How the answers to a set of problems are judged.

    `judge` must be exact about what it does not know: a failure of the judge is `Outcome.UNDECIDED`, never wrong.
    """

    name: str
    judge: Callable[[Problem, Completion], Verdict]
    answer_of: Callable[[str], str | None]  # the final answer in a completion's text, for majority votes
    verifier_version: str  # changes whenever `judge` may decide differently; verdict files carry it
    reflection_words: tuple[str, ...]  # counted in completions as a training metric


def split_of(problem: Problem, dev_share: float = 0.1, test_share: float = 0.2) -> str:
    """Train, dev or test by the hash of the question's text, so that equal questions always fall on one side."""
    bucket = int.from_bytes(sha256(b"split " + problem.text.encode()).digest()[:8], "big") / 2**64
    if bucket < test_share:
        return "test"
    return "dev" if bucket < test_share + dev_share else "train"
