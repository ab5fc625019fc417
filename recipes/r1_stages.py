"""The stages of the R1 pipeline that no other pipeline has: made data, a preference model, general prompts in RL."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from recipes.r1_keys import MADE, MadeTraces, PreferenceModel
from recipes.rl_keys import Grpo
from recipes.runner import StageContext
from recipes.stage_inputs import files_of, loss_report, not_set, problems_of
from rl.problems import BadProblems
from rl.runs import write_json
from rl.types import Problem

if TYPE_CHECKING:
    from rl.curriculum import ProblemSource
    from rl.preference_training import Preference

TRACES = "traces.jsonl"
TRIES = 20  # demonstrations of one problem, of which the first right one is taken


def made_traces(context: StageContext) -> None:
    from distill.traces import Trace, TraceSelection, write_traces
    from rl.tasks.tiny_models import make_tokenizer
    from rl.tasks.tiny_words import NEW_TOKENS

    stage: MadeTraces = context.stage
    made = {"worked": _worked, "general": _general}[stage.kind](context, stage.count)
    tokenizer = make_tokenizer(tuple(NEW_TOKENS))
    traces = [
        Trace(problem.id, problem.text, text, len(tokenizer(text)["input_ids"]) + 1, context.name)
        for problem, text in made
    ]
    write_traces(context.folder / TRACES, traces)
    write_json(context.folder / "summary.json", TraceSelection(tuple(traces), {}).summary(), "traces.summary")


def _worked(context: StageContext, count: int) -> list[tuple[Problem, str]]:
    """A careful, right solution of each train problem, all of it in the notation of the question."""
    from rl.tasks import tiny, tiny_words

    rng = random.Random(context.seed)
    found = []
    for problem in problems_of(context, "train", count):
        drawn = (tiny_words.demonstrate(problem, "careful", 0.0, rng) for _ in range(TRIES))
        right = next((text for text in drawn if tiny.answer_of(text) == problem.answer), None)
        if right is not None:
            found.append((problem, right))
    return found


def _general(context: StageContext, count: int) -> list[tuple[Problem, str]]:
    """General prompts with right replies, half of them kind; nothing needs a thought."""
    from rl.tasks.tiny_general import KIND, general_problems, right_reply

    rng = random.Random(context.seed)
    prompts = general_problems("train", count)
    return [(prompt, f"</think>{right_reply(prompt.text)}{rng.choice(('', KIND))}") for prompt in prompts]


def preference_model(context: StageContext) -> None:
    from rl.preference_training import PreferenceSettings, read_preferences, train_preference_model

    stage: PreferenceModel = context.stage
    summary = train_preference_model(
        context.folder,
        model=context.model(stage.model),
        preferences=_made_preferences(context) if stage.pairs == MADE else read_preferences(files_of(context)[0]),
        settings=PreferenceSettings(
            stage.epochs, stage.batch_size, stage.learning_rate, stage.max_length, stage.weight_decay
        ),
        seed=context.seed,
        report=loss_report(context),
    )
    write_json(context.folder / "summary.json", summary, "preference.summary")


def _made_preferences(context: StageContext) -> list[Preference]:
    from rl.preference_training import Preference
    from rl.tasks.tiny_general import preference_pairs

    pairs = preference_pairs(context.stage.count, context.seed)
    return [Preference(problem.text, better, worse) for problem, better, worse in pairs]


# --- RL for all scenarios ---------------------------------------------------------------------------------------------


def with_prompts(context: StageContext, source: ProblemSource) -> ProblemSource:
    """The source of an RL stage's problems, with general prompts in its last steps where the keys say so."""
    from rl.curriculum import Shuffled
    from rl.general import WithGeneral, first_general_step, general_prompts

    stage: Grpo = context.stage
    keys = stage.general
    if keys is None:
        return source
    prompts = Shuffled(general_prompts(_prompt_texts(context, keys.prompts)), context.seed)
    return WithGeneral(source, prompts, first_general_step(stage.steps, keys.from_share), keys.share)


def _prompt_texts(context: StageContext, ref: str) -> list[str]:
    """The questions of a stage's traces or of a file."""
    from distill.traces import read_traces
    from rl.decontamination import read_items

    (reference,) = (r for r in context.recipe.stages[context.name].references() if r.key == "general.prompts")
    if reference.kind == "stage":
        return [trace.question for trace in read_traces(context.inputs[ref] / TRACES)]
    if reference.path is None:
        raise BadProblems(ref, [(0, not_set(ref))])
    return [item.text for item in read_items(reference.path)]
