"""How hard a problem is for a model, and whether it can be guessed: both from judged samples.

Kimi k1.5 (2501.12599, section 2.1) draws 10 answers to each prompt at a fairly high temperature and takes the pass rate
for its difficulty, which so fits the model that is to be trained. And it asks a model for the answer without chain of
thought: a prompt that is right in any of 8 attempts is too easy to hack and is dropped. A problem that is guessed with
chance q an attempt survives with (1 - q)^8: for q = .25 (four options) that is .10, for q = .1 still .43. So the filter
leaks, and it costs more than half of the problems that are guessed one time in ten.

The paper does not say how a model is kept from thinking. Here the user's turn asks for the answer alone, and the
completion is begun for the model with a thought that is already closed (`closed_thought`), for templates that open
`<think>` and for those that let the model open it.

An undecided verdict says nothing: it leaves the rate. A problem with an undecided guess and no right one is not cleared
by the others; `PassRate.undecided` shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rl.prompts import THINK_CLOSE, THINK_OPEN, render_text
from rl.samplers.base import Sampler, SampleRequest, SamplingSettings
from rl.tasks.base import Task
from rl.types import Completion, Problem, RolloutGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GUESSES = 8
ANSWER_ALONE = "\n\nDo not reason and do not explain. Write nothing but the final answer, in \\boxed{}."
GUESS_SETTINGS = SamplingSettings(temperature=1.0, max_tokens=48)  # room for an answer, not for a thought


@dataclass(frozen=True, slots=True)
class PassRate:
    """How many samples of a problem were right. Example: 3 right of 9 decided, 1 undecided: rate 1/3."""

    right: int
    decided: int
    undecided: int

    @property
    def rate(self) -> float | None:
        """In [0, 1]; None where nothing was decided."""
        return self.right / self.decided if self.decided else None


def pass_rates(groups: Iterable[RolloutGroup]) -> dict[str, PassRate]:
    """The pass rate of each problem, by its id.

    ValueError for a group with aborted samples, and for a problem that has two groups.
    """
    rates: dict[str, PassRate] = {}
    for group in groups:
        group.require_complete("the pass rate")
        if group.problem.id in rates:
            raise ValueError(f"problem {group.problem.id} has two groups of samples: which is its pass rate?")
        decided = [rollout.right for rollout in group.rollouts if rollout.verdict.decided]
        rates[group.problem.id] = PassRate(sum(decided), len(decided), len(group.rollouts) - len(decided))
    return rates


# --- guesses ----------------------------------------------------------------------------------------------------------


def share_kept(chance: float, guesses: int = GUESSES) -> float:
    """The share of problems that stay if each is guessed with this chance an attempt: `share_kept(.25) == .75**8`."""
    return (1 - chance) ** guesses


def draw_guesses(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    task: Task,
    seed: int,
    guesses: int = GUESSES,
    settings: SamplingSettings = GUESS_SETTINGS,
    suffix: str = ANSWER_ALONE,
    report: Callable[[int], None] = lambda finished: None,
) -> list[RolloutGroup]:
    """Judged guesses at each problem, one group a problem, in order: `rl.rollout.sample_groups` without a thought.

    `suffix` is added to the question. The groups are for counting: their completions lack the tokens of the thought
    that was closed for the model.
    """
    from rl.rollout import sample_groups

    guesser = WithoutThought(sampler, tokenizer)
    return sample_groups(guesser, tokenizer, problems, task, guesses, settings, seed, suffix, report=report)


class WithoutThought:
    """A `Sampler` whose completions begin behind a thought that is closed already.

    `settings.max_tokens` counts what comes after it. The text that is judged begins with `</think>`, so that a boxed
    answer of a completion that then ran out of tokens is read as one.
    """

    def __init__(self, sampler: Sampler, tokenizer: PreTrainedTokenizerBase) -> None:
        self.sampler = sampler
        self.policy_version = sampler.policy_version
        opening = closed_thought(tokenizer)
        self._prefix = tuple(tokenizer(opening, add_special_tokens=False)["input_ids"]) if opening else ()

    def sample(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        report: Callable[[int], None] = lambda finished: None,
    ) -> list[Completion]:
        """As `Sampler.sample`; what comes back holds the tokens of the guess only."""
        begun = [replace(request, prefix=self._prefix + request.prefix) for request in requests]
        longer = replace(settings, max_tokens=settings.max_tokens + len(self._prefix))
        drawn = self.sampler.sample(begun, longer, report)
        return [replace(completion, text=THINK_CLOSE + completion.text) for completion in drawn]


def closed_thought(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a completion must begin with so that no thought follows.

    A prompt that ends in "<think>" -> "</think>"; in "<think>" and a newline (R1's students) -> "\\n</think>\\n\\n"; a
    template that knows the tag and leaves it to the model (Qwen3) -> "<think>\\n\\n</think>\\n\\n"; no such tag -> "".
    """
    prompt = render_text(tokenizer, Problem(id="probe", question=(), answer=""))
    if prompt.endswith(THINK_OPEN):
        return THINK_CLOSE
    if prompt.rstrip().endswith(THINK_OPEN):
        return f"\n{THINK_CLOSE}\n\n"
    if THINK_CLOSE in str(tokenizer.chat_template):
        return f"{THINK_OPEN}\n\n{THINK_CLOSE}\n\n"
    return ""
