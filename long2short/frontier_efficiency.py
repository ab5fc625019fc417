"""How much of a thought was needed, read from its text: outcome efficiency ξ_O and underthinking ξ_UT.

* ξ_O (2412.21187, equation 1) = mean over completions of right · T̂ / T: T̂ tokens until the first right solution, T all
  tokens; a wrong completion counts 0. 1: nothing was written after the answer was found.
* ξ_UT (2501.18585, equation 2) = mean over *wrong* completions of 1 − T̂ / T: T̂ tokens until the end of the first right
  thought; a completion that never had the answer counts 0. High: it had found the answer and left it.

Deviations. Both papers have a language model divide thoughts and judge the parts. Here the text decides, by the rules
of `long2short.first_solution`: a solution ends where the next one opens ("Wait", "Alternatively", ..) and states its
last box or number. It is right if the task's own answer extraction reads the same answer from it as from the reference
or from a right completion of the same problem; the judge is not asked, so that nothing is paid for or run. What that
makes of the numbers: a right answer in another form (1/2 for 50%) is overlooked, and an intermediate result that equals
the answer, just where the model turns back, is taken for it. They compare arms on one task; they are no absolute.
A right completion whose first right solution is its last, or only behind `</think>`, needed all of it: T̂ = T.

    efficiency_of(groups, task, tokenizer)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from long2short.first_solution import solutions
from rl import stats
from rl.evaluate import decided_rollouts
from rl.prompts import THINK_CLOSE
from rl.stats import SHARE, Estimate
from rl.tasks.base import Task
from rl.think_stats import tokens_until
from rl.types import RolloutGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Attempt = tuple[bool, int | None, int]  # right, tokens until the first right solution (None: there is none), all tokens


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Both numbers of one arm, with 95 % intervals over problems.

    Example: `Efficiency(Estimate(0.71, 0.68, 0.74), Estimate(0.05, 0.02, 0.08))`
    """

    outcome: Estimate  # ξ_O
    underthinking: Estimate | None  # ξ_UT; None if no completion is wrong

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Efficiency:
        under = data["underthinking"]
        return cls(Estimate.from_json(data["outcome"]), None if under is None else Estimate.from_json(under))


def efficiency_of(groups: Sequence[RolloutGroup], task: Task, tokenizer: PreTrainedTokenizerBase) -> Efficiency:
    """Both numbers of judged groups; undecided completions are left out. ValueError if the judge decided none."""

    def tokens(token_ids: Sequence[int], characters: int) -> int:
        return tokens_until(tokenizer, token_ids, characters)

    return efficiency([attempts for group in groups if (attempts := attempts_of(group, task, tokens))])


def efficiency(problems: Sequence[Sequence[Attempt]]) -> Efficiency:
    """Both numbers of the attempts at each problem, one or more.

    Example: (right, 300 of 1,000), (wrong, none of 400), (right, 500 of 500) make ξ_O = (.3 + 0 + 1) / 3 = .43333;
    wrong ones with 200 of 800 and none make ξ_UT = (.75 + 0) / 2 = .375.
    """
    if not problems:
        raise ValueError("the judge decided none of the completions, so there is no efficiency")
    outcome = [
        sum((whole if first is None else first) / whole for right, first, whole in row if right) / len(row)
        for row in problems
    ]
    wrong = [[(first, whole) for right, first, whole in row if not right] for row in problems]
    under = None
    if any(wrong):
        lost = [sum(1 - first / whole for first, whole in row if first is not None) for row in wrong]
        under = stats.bootstrap_ratio(lost, [len(row) for row in wrong], bounds=SHARE)
    return Efficiency(stats.bootstrap_mean(outcome, bounds=SHARE), under)


def attempts_of(group: RolloutGroup, task: Task, tokens: Callable[[Sequence[int], int], int]) -> list[Attempt]:
    """The decided completions of a group; `tokens(ids, n)` is how many of the ids it takes for n characters."""
    kept = decided_rollouts(group)
    answers = {answer for r in kept if r.right and (answer := task.answer_of(r.completion.text))}
    answers |= readings(group.problem.answer, task)
    found: list[Attempt] = []
    for rollout in kept:
        text, ids = rollout.completion.text, rollout.completion.token_ids
        if not ids:
            found.append((rollout.right, None, 1))
            continue
        end = first_right(text, answers, task)
        if end is None or (rollout.right and end >= len(text.partition(THINK_CLOSE)[0])):
            found.append((rollout.right, None, len(ids)))
        else:
            found.append((rollout.right, tokens(ids, end), len(ids)))
    return found


def first_right(text: str, answers: set[str], task: Task) -> int | None:
    """The characters of a completion up to the end of its thought's first solution that states one of `answers`.

    Example, task `integers`, {"42"}: in "6*7=41. Wait, 6*7=42. Hmm, 42 it is. </think>42" it is 22, where "Hmm" opens.
    """
    for end, stated in solutions(text.partition(THINK_CLOSE)[0]):
        if answers & readings(stated, task):
            return end
    return None


def readings(answer: str, task: Task) -> set[str]:
    """What the task reads where this is the final answer, bare or in a box: `{"42"}`."""
    if not answer:
        return set()
    given = (task.answer_of(f"{THINK_CLOSE}{answer}"), task.answer_of(f"{THINK_CLOSE}\\boxed{{{answer}}}"))
    return {reading for reading in given if reading}
