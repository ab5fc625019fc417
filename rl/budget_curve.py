"""Accuracy as a function of the thinking budget, from one pool of samples.

`budget_curve` cuts every thought of the pool at each budget, closes it by force (`rl.budget`) and has the model answer:
what it would get right if it had to stop there. Completions whose thought is within the budget are used as they are, so
only the answers of the cut ones are drawn. `truncated_accuracy` needs no model: a completion counts where it is right
and no longer than the budget. That is the accuracy under a plain token limit. Its budget counts the whole completion,
that of `budget_curve` the thought, and nobody is asked for an answer at the cut; so it is never above the first.

Cut at b tokens, the k-th sample of a problem is the thought that the sampler would have written by then: budgets share
their samples, so the points of a curve are paired, and its intervals are not independent of each other.

The area under a curve is that of accuracy over log2(budget), by trapezoids from the smallest to the largest budget,
divided by the width log2(largest / smallest): a mean accuracy, in [0, 1], in which each doubling weighs the same. With
one budget it is the accuracy there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import log2
from typing import TYPE_CHECKING, Any

from rl import stats
from rl.budget import Draft, closing_text, forced_ids, thought_end
from rl.judging import judge_attempts
from rl.samplers.base import Sampler, SampleRequest, SamplingSettings, sample_seed
from rl.stats import SHARE, Estimate
from rl.tasks.base import Task
from rl.types import Completion, FinishReason, Rollout, RolloutGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class BudgetPoint:
    """One budget. Example: `BudgetPoint(16, Estimate(.31, .24, .38), Estimate(18.2, 17.5, 18.9), .74, 0, 267)`."""

    budget: int  # tokens
    accuracy: Estimate  # avg@k over problems
    tokens: Estimate  # mean tokens of a completion, with its forced closing, its answer and EOS
    cut: float  # share of completions that the budget cut
    undecided: int  # completions that the judge could not decide; they are not in the accuracy
    drawn: int  # tokens that were drawn anew for this point


@dataclass(frozen=True, slots=True)
class BudgetCurve:
    """Accuracy at growing budgets, on the same samples."""

    num_problems: int
    num_completions: int
    points: tuple[BudgetPoint, ...]  # by budget
    area: Estimate  # in [0, 1]; over the problems that have a decided sample at every budget

    @property
    def drawn(self) -> int:
        """Tokens that were drawn for the whole curve."""
        return sum(point.drawn for point in self.points)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json(to_json())` is the same curve."""
        return {**asdict(self), "points": [asdict(point) for point in self.points], "drawn": self.drawn}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BudgetCurve:
        points = tuple(
            BudgetPoint(**{**row, **{name: Estimate.from_json(row[name]) for name in ("accuracy", "tokens")}})
            for row in data["points"]
        )
        return cls(data["num_problems"], data["num_completions"], points, Estimate.from_json(data["area"]))


@dataclass(frozen=True, slots=True)
class AtBudget:
    """The groups of a pool as they are at one budget."""

    budget: int
    groups: tuple[RolloutGroup, ...]
    cut: int  # completions
    drawn: int  # tokens


def budget_curve(
    groups: Sequence[RolloutGroup],
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    budgets: Sequence[int],
    answer: SamplingSettings,
    seed: int,
    closing: str | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> BudgetCurve:
    """The curve of judged groups at `budgets` (tokens of the thought); arguments and errors as in `at_budgets`.

    Example: one problem with the thoughts "ab" (right) and "abcd" (right), budgets 2 and 4: at 4 nothing is cut and
    accuracy is 1; at 2 the second one answers behind "ab</think>", and accuracy is .5 if that answer is wrong.
    """
    levels = at_budgets(groups, sampler, tokenizer, task, budgets, answer, seed, closing, report)
    return _curve([(at.budget, _rows(at.groups), at.cut, at.drawn) for at in levels])


def at_budgets(
    groups: Sequence[RolloutGroup],
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    budgets: Sequence[int],
    answer: SamplingSettings,
    seed: int,
    closing: str | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[AtBudget]:
    """The groups with every thought cut to each budget, answered and judged; by budget.

    A thought of b tokens or fewer is left as it is, its verdict too, whether it was closed or ended in an
    end-of-sequence token or a loop. Of a longer one the first b tokens stay, the closing string (None:
    `rl.budget.closing_text`) is forced, and the answer is drawn: `answer.max_tokens` counts the answer alone. A model
    that goes on thinking behind the closing is held by that limit only, so keep it close to what an answer needs.

    The answer of sample i at budget b is drawn with the seed (`seed`, problem id, i, b), each once, all in one call;
    `report` is told how many of how many are drawn. Give the pool's temperature to compare with its own answers: a
    smaller one favours the cut completions.

    Errors: ValueError for budgets below 1, for no groups, a problem that is there twice, aborted samples, and for a
    budget beyond a thought that the pool's own limit cut off: nobody knows how that went on.
    """
    budgets = _checked(groups, budgets)
    forced = forced_ids(tokenizer, closing or closing_text(tokenizer))
    flat = [(group, i, rollout) for group in groups for i, rollout in enumerate(group.rollouts)]
    thoughts = [_thought(tokenizer, group, i, rollout.completion, budgets[-1]) for group, i, rollout in flat]
    drafts: dict[tuple[int, int], Draft] = {}
    requests: list[SampleRequest] = []
    for budget in budgets:
        for place, (group, i, rollout) in enumerate(flat):
            if thoughts[place] > budget:
                draft = Draft(sample_seed(seed, group.problem.id, i, budget), answer.max_tokens)
                draft.add(rollout.completion)
                draft.cut(budget)
                draft.close(tokenizer, forced)
                drafts[budget, place] = draft
                requests.append(replace(draft.request(group.prompt_ids), seed=draft.first_seed))
    drawn = _answers(sampler, requests, answer, lambda done: report(done, len(requests)))
    for draft, completion in zip(drafts.values(), drawn, strict=True):
        draft.add(completion)
    whole = {key: draft.completion(tokenizer) for key, draft in drafts.items()}
    verdicts = judge_attempts(task, [(flat[place][0].problem, c) for (_, place), c in whole.items()]) if whole else []
    judged = {key: Rollout(c, verdict) for (key, c), verdict in zip(whole.items(), verdicts, strict=True)}
    tokens = dict(zip(drafts, (completion.num_tokens for completion in drawn), strict=True))
    levels = []
    for budget in budgets:
        places = iter(range(len(flat)))
        changed = tuple(
            replace(group, rollouts=tuple(judged.get((budget, next(places)), rollout) for rollout in group.rollouts))
            for group in groups
        )
        here = [count for (at, _), count in tokens.items() if at == budget]
        levels.append(AtBudget(budget, changed, len(here), sum(here)))
    return levels


def truncated_accuracy(groups: Sequence[RolloutGroup], budgets: Sequence[int]) -> BudgetCurve:
    """The curve without a model: at budget b a completion is right if it was right with b tokens or fewer in all.

    Its points never fall: each counts the same decided completions. `tokens` is what would have been drawn under the
    limit, min(tokens, b). A lower bound for what the model gets right when it is asked for an answer at the cut.
    Example: 4 tokens right, 9 right, 2 wrong, budgets 4 and 9: accuracy 1/3 and 2/3, tokens 10/3 and 5.
    """
    budgets = _checked(groups, budgets)
    levels = []
    for budget in budgets:
        rows = [
            [
                (r.right and r.num_tokens <= budget if r.verdict.decided else None, min(r.num_tokens, budget))
                for r in group.rollouts
            ]
            for group in groups
        ]
        cut = sum(count > budget for group in groups for count in group.num_tokens)
        levels.append((budget, rows, cut, 0))
    return _curve(levels)


def area_weights(budgets: Sequence[int]) -> list[float]:
    """The weight of each budget's accuracy in the area; they sum to 1.

    `area_weights([16, 32, 64]) == [.25, .5, .25]`, `area_weights([2, 16, 32]) == [3/8, 4/8, 1/8]`
    """
    if len(budgets) == 1:
        return [1.0]
    places = [log2(budget) for budget in budgets]
    width = places[-1] - places[0]
    inner = [places[0], *places, places[-1]]
    return [(after - before) / 2 / width for before, after in zip(inner, inner[2:], strict=False)]


# --- parts ------------------------------------------------------------------------------------------------------------

Rows = Sequence[Sequence[tuple[bool | None, int]]]  # per problem: is it right (None: undecided), its tokens


def _rows(groups: Sequence[RolloutGroup]) -> Rows:
    return [[(r.right if r.verdict.decided else None, r.num_tokens) for r in group.rollouts] for group in groups]


def _curve(levels: Sequence[tuple[int, Rows, int, int]]) -> BudgetCurve:
    rows = levels[0][1]
    completions = sum(map(len, rows))
    points = []
    accuracies: list[dict[int, float]] = []  # a budget each: problem number -> share of right ones
    for budget, rows, cut, drawn in levels:
        right = [[value for value, _ in row if value is not None] for row in rows]
        decided = [number for number, row in enumerate(right) if row]
        if not decided:
            raise ValueError(f"the judge decided none of the {completions} completions at budget {budget}")
        shares = stats.shares([right[number] for number in decided])
        lengths = stats.lengths([[count for _, count in row] for row in rows])
        assert lengths is not None  # every problem has a completion
        undecided = completions - sum(map(len, right))
        accuracy = stats.bootstrap_mean(shares, bounds=SHARE)
        points.append(BudgetPoint(budget, accuracy, lengths.mean, cut / completions, undecided, drawn))
        accuracies.append(dict(zip(decided, shares.tolist(), strict=True)))
    weights = area_weights([point.budget for point in points])
    common = [number for number in range(len(rows)) if all(number in shares for shares in accuracies)]
    if not common:
        raise ValueError("no problem has a decided sample at every budget, so there is no area under the curve")
    areas = [sum(w * shares[number] for w, shares in zip(weights, accuracies, strict=True)) for number in common]
    return BudgetCurve(len(rows), completions, tuple(points), stats.bootstrap_mean(areas, bounds=SHARE))


def _answers(
    sampler: Sampler, requests: Sequence[SampleRequest], answer: SamplingSettings, report: Callable[[int], None]
) -> list[Completion]:
    if not requests:
        return []
    longest = max(len(request.prefix) for request in requests)
    return sampler.sample(requests, replace(answer, max_tokens=longest + answer.max_tokens), report)


def _thought(
    tokenizer: PreTrainedTokenizerBase, group: RolloutGroup, sample: int, completion: Completion, largest: int
) -> int:
    """The tokens of a completion's thought. One that never closed and ran into the pool's limit is longer than any
    budget that may be asked for."""
    end = thought_end(tokenizer, completion.token_ids)
    if end is not None:
        return end.thought
    if completion.finish_reason is not FinishReason.LENGTH:
        return completion.num_tokens - (completion.finish_reason is FinishReason.STOP)
    if largest > completion.num_tokens:
        raise ValueError(
            f"budget {largest}: sample {sample} of problem {group.problem.id} was cut off after "
            f"{completion.num_tokens} tokens of thought; ask for smaller budgets, or draw a pool with more max_tokens"
        )
    return largest + 1


def _checked(groups: Sequence[RolloutGroup], budgets: Sequence[int]) -> list[int]:
    """The budgets in order, each once, after refusing what has no honest curve."""
    if not budgets or min(budgets) < 1:
        raise ValueError(f"budgets must be numbers of tokens from 1 on, at least one; got {list(budgets)}")
    if not groups:
        raise ValueError("no groups to make a curve of")
    seen: set[str] = set()
    for group in groups:
        group.require_complete("a budget curve")
        if group.problem.id in seen or not group.rollouts:
            raise ValueError(f"problem {group.problem.id} is there twice or has no samples; each counts once")
        seen.add(group.problem.id)
    return sorted(set(budgets))
