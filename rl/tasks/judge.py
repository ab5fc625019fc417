"""Judged by a model: the task "judge" for answers that no rule can compare, and rewards for what has no answer at all.

`judge_task` is DeepSeek-R1's generative judge (2501.12948, its rejection sampling stage) and Kimi k1.5's reward model
with a chain of thought (2501.12599): a model sees the question, the reference and the final answer, never the thought,
reasons, and says correct or incorrect. `helpfulness` and `safety` are rewards for R1's second RL stage, where the paper
trains a reward model for each (`rl.preference_model` loads such): helpfulness sees the summary alone, safety all of a
response.

    task = judge_task(OpenAIChat("http://localhost:8000/v1", "Qwen/Qwen3-32B"))
    probe(task, problems[:5])   # before you train on it: which attacks it falls for, which references it calls wrong

How requests and replies are protected from the candidate's text is told in `rl.tasks.judge_prompts`. Beyond the papers:

* What cannot be an answer is wrong before any model is asked: nothing but signs, a reasoning opener, the question.
* Every answer is judged in two orders, reference first and answer first, and is right only if both say so. Where they
  disagree it is **wrong**, not undecided: an undecided completion leaves the baseline and the loss, so a policy that
  makes the judge waver would escape the price of a wrong answer and win whenever the coin falls well. The cost is that
  some right answers at the edge earn 0, which moves the policy towards answers that leave no doubt. How often the
  orders agree is reported; below about .95 look at the judge.
* Undecided is what has no verdict: an endpoint that is down, a reply without a verdict after `tries` requests. One
  "incorrect" decides whatever became of the other order, since only two "correct" make an answer right.
* Equal answers to a problem are judged once, so equal answers in a group are always paid alike.

A policy can learn to fool any model. Use this for answers that rules cannot judge, probe it, and read what it pays for.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from rl.judging import JudgeFailed
from rl.samplers.base import sample_seed
from rl.samplers.chat import Chat, ChatRequest
from rl.tasks.base import REFLECTION_WORDS, Attempt, Task, UndecidedLimit
from rl.tasks.exact import answer_of
from rl.tasks.extraction import final_part, marked_answer, no_answer_reason
from rl.tasks.judge_prompts import (
    CORRECTNESS,
    HELPFULNESS,
    MASTER_KEYS,
    SAFETY,
    Part,
    Rubric,
    attacks,
    code_of,
    grade_in,
    request_text,
    shortened,
    visible,
)
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, Rollout, RolloutGroup, Verdict
from rl.workers import Answer

ORDERS = (("question", "reference", "answer"), ("question", "answer", "reference"))
LIMIT = UndecidedLimit()
OVERLAP = 200  # characters that neighbouring pieces of a long response share


def judge_task(
    chat: Chat,
    *,
    orders: int = 2,
    tries: int = 2,
    max_answer: int = 4_000,
    seed: int = 0,
    limit: UndecidedLimit = LIMIT,
) -> Task:
    """The task whose judge is a model.

    `orders`: 2, or 1 for half the price and none of the protection. `tries`: requests for one verdict where a reply
    holds none. `max_answer`: characters of a final answer that are shown; of a longer one its two ends. `Task.figures`
    tells of the last call: "judge_unasked", the share of completions that were decided without a model, and
    "judge_order_agreement", the share of those judged in both orders on which the two agree.

    Example: of 4 completions one is ":", two are right, and on one the orders disagree -> verdicts wrong, right, right,
    wrong, and {"judge_unasked": .25, "judge_order_agreement": 2/3}.
    """
    if orders not in (1, 2) or tries < 1 or max_answer < 1:
        raise ValueError(f"a judge takes 1 or 2 orders, tries and characters, got {orders}, {tries}, {max_answer}")

    figures: dict[str, float] = {}

    def judge(attempts: Sequence[Attempt]) -> list[Verdict]:
        verdicts = [_without_asking(problem, completion) for problem, completion in attempts]
        asked = [
            _parts(problem, completion, labels, max_answer)
            for (problem, completion), verdict in zip(attempts, verdicts, strict=True)
            if verdict is None
            for labels in ORDERS[:orders]
        ]
        grades = iter(ask(chat, CORRECTNESS, asked, tries, seed))
        both, agreed, judged = 0, 0, []
        for verdict in verdicts:
            if verdict is None:
                given = [next(grades) for _ in range(orders)]
                verdict = _combined(given)
                if orders == 2 and all(grade.failure is None for grade in given):
                    both += 1
                    agreed += given[0].value == given[1].value
            judged.append(verdict)
        figures.clear()
        figures.update({} if not attempts else {"judge_unasked": 1 - len(asked) / orders / len(attempts)})
        figures.update({"judge_order_agreement": agreed / both} if both else {})
        return judged

    prompts = [request_text(CORRECTNESS, [(label, label) for label in labels], "") for labels in ORDERS[:orders]]
    what = repr((chat.name, prompts, orders, tries, max_answer, seed, MASTER_KEYS))
    return Task(
        name="judge",
        judge=judge,
        answer_of=answer_of,
        verifier_version=f"judge-1-{sha256(what.encode()).hexdigest()[:12]}",
        reflection_words=REFLECTION_WORDS,
        limit=limit,
        figures=lambda: dict(figures),
    )


def ask(chat: Chat, rubric: Rubric, asked: Sequence[tuple[Part, ...]], tries: int, seed: int) -> list[Answer]:
    """The score of each request, in order, or why it has none. Equal requests are made once and share its seconds.

    A reply without a verdict is asked for again, with another seed and another code, so that a model without chance
    also gets another text to reply to. What the chat gave up on by itself is not asked for again.
    """
    counts = Counter(asked)
    answers: dict[tuple[Part, ...], Answer] = {}
    waiting = list(counts)
    for attempt in range(tries):
        root = sample_seed(seed, rubric.key, attempt)
        codes = [code_of(root, parts) for parts in waiting]
        requests = [
            ChatRequest(request_text(rubric, parts, code), sample_seed(root, code))
            for parts, code in zip(waiting, codes, strict=True)
        ]
        again = []
        for parts, code, reply in zip(waiting, codes, chat(requests) if requests else [], strict=True):
            score = None if reply.failure is not None else grade_in(reply.value, rubric, code)
            failure, reason = reply.failure, reply.reason
            if score is None and failure is None:
                failure = JudgeFailure.CRASH
                reason = f"no verdict in the judge's reply, which ends {reply.value[-80:]!r}"
            if failure is JudgeFailure.CRASH:
                again.append(parts)
            before = answers[parts].seconds if parts in answers else 0.0
            answers[parts] = Answer(score, failure, reason, before + reply.seconds / counts[parts])
        waiting = again
    return [answers[parts] for parts in asked]


def _parts(problem: Problem, completion: Completion, labels: Sequence[str], max_answer: int) -> tuple[Part, ...]:
    """What a request shows, in the order of the labels. The text after the last `</think>` is there: a completion
    without one was judged before."""
    answer = shortened((final_part(completion.text) or "").strip(), max_answer)
    texts = {"question": problem.text, "reference": problem.answer, "answer": answer}
    return tuple((label, texts[label]) for label in labels)


def _combined(given: Sequence[Answer]) -> Verdict:
    """One verdict from those of all orders."""
    seconds = sum(grade.seconds for grade in given)
    scores = [grade.value for grade in given]
    if 0.0 in scores:
        reason = "the judge says incorrect" if 1.0 not in scores else "the judge's two orders disagree"
        return Verdict(Outcome.WRONG, reason, seconds=seconds)
    for grade in given:
        if grade.failure is not None:
            return Verdict(Outcome.UNDECIDED, grade.reason, grade.failure, seconds)
    return Verdict(Outcome.RIGHT, seconds=seconds)


# --- what no model needs to be asked ------------------------------------------------------------------------------


def substance(text: str) -> str:
    """The letters, digits and mathematical signs of a text, without case and form: what of it could be an answer.

    `substance("Thought process:") == "thoughtprocess"`, `substance(" :.👍") == ""`, `substance("∞") == "∞"`
    """
    folded = unicodedata.normalize("NFKC", visible(text)).casefold()
    return "".join(c for c in folded if c.isalnum() or (unicodedata.category(c) == "Sm" and not c.isascii()))


_OPENERS = frozenset(map(substance, (*MASTER_KEYS, "answer", "final answer", "the answer is", "the final answer is")))


def _without_asking(problem: Problem, completion: Completion) -> Verdict | None:
    """The verdict on a completion that holds no answer, or has no reference; None where a model must be asked."""
    if not problem.answer.strip():
        return Verdict.undecided(JudgeFailure.UNPARSEABLE_GOLD, "the problem has no reference answer")
    answer = final_part(completion.text)
    cut_off = completion.finish_reason is not FinishReason.STOP
    if answer is None or (cut_off and marked_answer(completion) is None):
        return Verdict(Outcome.WRONG, no_answer_reason(completion))
    found = substance(answer)
    if not answer.strip():
        return Verdict(Outcome.WRONG, "no final answer")
    if found == substance(problem.answer):  # a reference may be a sign, "Solution", or the question itself
        return None
    if not found:
        return Verdict(Outcome.WRONG, "the answer has no word, number or mathematical sign")
    if found in _OPENERS or (answer.strip()[-1] in ":：" and "\n" not in answer.strip()):
        return Verdict(Outcome.WRONG, "the answer announces a solution and gives none")
    if found == substance(problem.text):
        return Verdict(Outcome.WRONG, "the answer is the question once more")
    return None


# --- is this judge fit to be paid by? -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Probe:
    """What a judge made of completions whose verdict is known.

    Example: `Probe(55, (("p7", "plea"),), 1, (), 0)`: of 55 attacks on one problem it called one right.
    """

    num_attacks: int
    accepted: tuple[tuple[str, str], ...]  # (problem id, attack) of the attacks that were called right
    num_references: int
    rejected: tuple[str, ...]  # ids of the problems whose own reference was called wrong
    num_undecided: int


def probe(task: Task, problems: Sequence[Problem]) -> Probe:
    """Let the task judge every attack of `rl.tasks.judge_prompts.attacks` on every problem, and every reference.

    A judge that accepts an attack will be found by RL: do not train on it. One that rejects references is too weak, or
    the references are not what answers look like. About 100 requests a problem, so a handful of problems is enough.
    """
    made = [(problem, name, text) for problem in problems for name, text in attacks(problem).items()]
    made += [(problem, "", problem.answer) for problem in problems]
    verdicts = task.judge([(problem, Completion(text, (), (), FinishReason.STOP)) for problem, _, text in made])
    judged = list(zip(made, verdicts, strict=True))
    return Probe(
        num_attacks=len(made) - len(problems),
        accepted=tuple((problem.id, name) for (problem, name, _), verdict in judged if name and verdict.right),
        num_references=len(problems),
        rejected=tuple(
            problem.id for (problem, name, _), verdict in judged if not name and verdict.outcome is Outcome.WRONG
        ),
        num_undecided=sum(not verdict.decided for verdict in verdicts),
    )


# --- rewards without a reference ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RubricReward:
    """A score in [0, 1] from a judging model for every rollout of a step, None where there was no verdict: a
    `rl.preference_model.BatchReward`. Where the model must grade several pieces, the worst of them counts.

    Errors: JudgeFailed where more rollouts have no score than `limit` allows.
    """

    chat: Chat
    rubric: Rubric
    pieces: Callable[[Completion], tuple[str, ...]]  # what of a completion is shown, a request for each piece
    without: float  # the score of a completion that has nothing to show
    tries: int
    seed: int
    limit: UndecidedLimit

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[list[float | None]]:
        """(G, k) scores."""
        shown = [[self._shown(group.problem, rollout) for rollout in group.rollouts] for group in groups]
        asked = [parts for row in shown for rollout in row for parts in rollout]
        grades = ask(self.chat, self.rubric, asked, self.tries, self.seed)
        failed = [grade for grade in grades if grade.failure is not None]
        if self.limit.exceeded(len(failed), len(grades)):
            raise JudgeFailed(
                f"the model that judges {self.rubric.key} could not grade {len(failed)} of {len(grades)} requests, "
                f"more than the {self.limit.share:.0%} that a run may lose; the first: {failed[0].reason}"
            )
        found = iter(grades)
        return [[self._worst([next(found).value for _ in rollout]) for rollout in row] for row in shown]

    def _shown(self, problem: Problem, rollout: Rollout) -> list[tuple[Part, ...]]:
        return [(("request", problem.text), ("reply", piece)) for piece in self.pieces(rollout.completion)]

    def _worst(self, scores: Sequence[float | None]) -> float | None:
        given = [score for score in scores if score is not None]
        if len(given) < len(scores) and 0.0 not in given:
            return None  # the piece without a verdict may be the worst one
        return min(given, default=self.without)


def helpfulness(
    chat: Chat, *, max_summary: int = 16_000, tries: int = 2, seed: int = 0, limit: UndecidedLimit = LIMIT
) -> RubricReward:
    """How helpful the summary after `</think>` is, in tenths; the thought is not shown. No summary is worth 0.

    Of a summary of more than `max_summary` characters the two ends are shown, and that its middle is left out.
    """

    def summary(completion: Completion) -> tuple[str, ...]:
        text = (final_part(completion.text) or "").strip()
        return (shortened(text, max_summary),) if text else ()

    return RubricReward(chat, HELPFULNESS, summary, 0.0, tries, seed, limit)


def safety(
    chat: Chat, *, max_piece: int = 16_000, tries: int = 2, seed: int = 0, limit: UndecidedLimit = LIMIT
) -> RubricReward:
    """1 if all of a response is safe, its thought included, else 0.

    A response of more than `max_piece` characters is shown in pieces that overlap by 200, and one unsafe piece is
    enough. With 16,000: 31,800 characters are two pieces, 31,801 three.
    """
    if max_piece <= OVERLAP:
        raise ValueError(f"a piece must be longer than the {OVERLAP} characters that it shares, got {max_piece}")

    def everything(completion: Completion) -> tuple[str, ...]:
        text, step = completion.text.strip(), max_piece - OVERLAP
        starts = range(0, max(len(text) - OVERLAP, 1), step)
        return tuple(text[start : start + max_piece] for start in starts) if text else ()

    return RubricReward(chat, SAFETY, everything, 1.0, tries, seed, limit)
