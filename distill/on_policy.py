"""On-policy distillation: the student samples, a teacher scores the same tokens, and each token pays for itself.

Reverse KL on the student's own samples (MiniLLM, 2306.08543; GKD, 2306.13649, section 3; Thinking Machines, "On-Policy
Distillation", 2025), as a policy gradient on the RL core. The advantage of token t is minus the one-sample estimate of
the reverse KL at that token:

    A_t = -coefficient × (log π_student(y_t) − log π_teacher(y_t))

with the log-probs that the student had when it sampled. Nothing is discounted (a token answers for itself alone), no
baseline is taken and nothing is divided by a deviation: both would take the KL's meaning away. No reward is used, so
undecided verdicts do not matter; what ran into the token limit counts too, since the teacher's opinion of its tokens is
as good as of any; the EOS token counts, or the student would never learn to stop.

For long2short the teacher is a short model (merged, or from length RL) and the student the long one; or both are the
same model and the teacher is asked to be brief (`PromptOf`): the student learns to do without being asked.

Deviation: Thinking Machines score one sample a problem in batches of 512 to 1,024 problems; group size is the caller's.

Both models see the same token ids, so their tokenizers must agree (`require_same_tokens`). The teacher is a model
beside the student, the student's own weights under its adapters, or behind vLLM servers (distill/teacher_server.py).

Run it: a recipe with a `method: on_policy` stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rl.prompts import THINK_OPEN, prefills_think, render_prompt, render_text
from rl.refusal import StepRefused
from rl.rows import Batch, TrainingRow
from rl.types import Problem, RolloutGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Score = Callable[[Sequence[TrainingRow]], list[tuple[float, ...]]]  # log-probs of the rows' tokens, `Learner.logprobs`


def token_advantages(
    sampler_logprobs: Sequence[float], teacher_logprobs: Sequence[float], coefficient: float = 1.0
) -> tuple[float, ...]:
    """−coefficient × (log π_student − log π_teacher) of each token, (T,).

    Example: student (−1.2, −.2), teacher (−.7, −2.0) -> (.5, −1.8).
    """
    pairs = zip(sampler_logprobs, teacher_logprobs, strict=True)
    return tuple(coefficient * (teacher - student) for student, teacher in pairs)


@dataclass(frozen=True, slots=True)
class TeacherRows:
    """Rows whose advantages come from a teacher: a `rl.rows.RowsOf`.

    `score` gives the teacher's log-probs of completion tokens after a prompt, `prompt_of` the prompt that the teacher
    sees, which may differ from the student's.

    Errors: StepRefused for a teacher log-prob that is not finite; ValueError for groups with aborted samples.
    """

    score: Score
    prompt_of: Callable[[Problem], tuple[int, ...]]
    coefficient: float = 1.0

    def __call__(
        self, groups: Sequence[RolloutGroup], parts: Sequence[Sequence[int]]
    ) -> tuple[list[Batch], dict[str, float]]:
        """Figures: `reverse_kl`, nats per token, and `reverse_kl_completion`, nats per completion: the one-sample
        estimates over the step's rollouts, so of the student before the update."""
        asked: list[TrainingRow] = []
        for group in groups:
            group.require_complete("on-policy distillation")
            prompt = self.prompt_of(group.problem)
            for sample, rollout in enumerate(group.rollouts):
                ids = rollout.completion.token_ids
                asked.append(TrainingRow(prompt, ids, (0.0,) * len(ids), 0.0, group.problem.id, sample))
        found = self.score(asked)
        if bad := [row.group for row, scores in zip(asked, found, strict=True) if not all(map(math.isfinite, scores))]:
            raise StepRefused("a teacher log-prob", bad)
        scores = iter(found)
        rows = [[self._row(group, sample, next(scores)) for sample in range(len(group.rollouts))] for group in groups]
        return [self._batch([row for i in part for row in rows[i]]) for part in parts], self._figures(groups, found)

    def _row(self, group: RolloutGroup, sample: int, scores: tuple[float, ...]) -> TrainingRow:
        completion = group.rollouts[sample].completion
        return TrainingRow(
            group.prompt_ids,
            completion.token_ids,
            completion.sampler_logprobs,
            token_advantages(completion.sampler_logprobs, scores, self.coefficient),
            group.problem.id,
            sample,
        )

    def _batch(self, rows: list[TrainingRow]) -> Batch:
        return [row for row in rows if any(row.token_advantages)], [row.num_tokens for row in rows]

    def _figures(self, groups: Sequence[RolloutGroup], found: Sequence[tuple[float, ...]]) -> dict[str, float]:
        if not found:
            return {}
        completions = [rollout.completion for group in groups for rollout in group.rollouts]
        differences = [
            math.fsum(completion.sampler_logprobs) - math.fsum(scores)
            for completion, scores in zip(completions, found, strict=True)
        ]
        total, tokens = math.fsum(differences), sum(completion.num_tokens for completion in completions)
        return {"reverse_kl": total / tokens, "reverse_kl_completion": total / len(completions)}


@dataclass(frozen=True, slots=True)
class PromptOf:
    """The prompt that the teacher sees: the question with its own suffix, perhaps after a system text.

    Errors: ValueError if the template of the tokenizer leaves the system text out.
    """

    tokenizer: PreTrainedTokenizerBase
    suffix: str = ""
    system: str = ""

    def __call__(self, problem: Problem) -> tuple[int, ...]:
        if not self.system:
            return render_prompt(self.tokenizer, problem, self.suffix)
        text = self._with_system(problem)
        if self.system not in text:
            raise ValueError(
                "the teacher's chat template leaves a system message out; say it at the end of the question instead "
                "(teacher_suffix)"
            )
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _with_system(self, problem: Problem) -> str:
        if self.tokenizer.chat_template is None:
            return f"{self.system}\n{render_text(self.tokenizer, problem, self.suffix)}"
        messages = [
            {"role": "system", "content": self.system},
            {"role": "user", "content": problem.text + self.suffix},
        ]
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert isinstance(rendered, str)
        return rendered


def require_same_tokens(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, teacher_stops: Sequence[int]
) -> None:
    """Refuse a teacher that would read the student's token ids as something else.

    Every id of the student must be the same string for the teacher, which may have more; the student's EOS must be one
    of the ids that end the teacher's completions; and both templates must leave a completion to begin in the same
    place, inside the thought or before it. The width of the output layers may differ (padded vocabularies).

    Errors: ValueError that names the first difference and what to do.
    """
    known = {number: token for token, number in teacher.get_vocab().items()}
    for token, number in sorted(student.get_vocab().items(), key=lambda item: item[1]):
        if known.get(number) != token:
            there = f"{known[number]!r}" if number in known else "nothing"
            raise ValueError(
                f"teacher: its tokenizer is another one: id {number} is {token!r} for the student and {there} for the "
                "teacher, which could not score the student's tokens; take a teacher of the same family, or distil "
                "from its traces (method: traces and sft), which are text"
            )
    end = student.eos_token_id
    if end not in teacher_stops:
        raise ValueError(
            f"teacher: it never ends with the student's EOS {student.eos_token!r} (id {end}) but with ids "
            f"{list(teacher_stops)}: the student would learn never to stop; take a teacher with the same EOS"
        )
    if prefills_think(student) != prefills_think(teacher):
        opens, leaves = ("student", "teacher") if prefills_think(student) else ("teacher", "student")
        raise ValueError(
            f"teacher: the {opens}'s template has opened {THINK_OPEN} before a completion begins, the {leaves}'s has "
            "not: the same tokens would mean something else; take a teacher with the student's template"
        )


def configured_stop_ids(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end a model's completions, from its folder or hub id: no weights are loaded.

    Example: a generation config with eos_token_id [2, 7] and a tokenizer whose EOS is 7 give (2, 7).
    """
    from transformers import AutoConfig, GenerationConfig

    from rl.policy import all_stop_ids

    try:
        found = GenerationConfig.from_pretrained(name)
    except OSError:  # it has none: transformers makes one of the model's config
        found = GenerationConfig.from_model_config(AutoConfig.from_pretrained(name))
    return all_stop_ids(found.eos_token_id, tokenizer)
