"""The long2short RL stage: a token limit that is read off a pool becomes a number, then it is an RL stage."""

from __future__ import annotations

from dataclasses import replace

from recipes.rl_keys import FromPool, LengthRl
from recipes.runner import StageContext
from recipes.stage_inputs import pool_groups, problems_of, settings_of, task_of


def length_rl(context: StageContext) -> None:
    from recipes.rl_stage import run_rl

    stage: LengthRl = context.stage
    facts: dict[str, object] = {"max_tokens": stage.max_tokens}
    if isinstance(stage.max_tokens, FromPool):
        from long2short.length_rl import limit_from_pool

        limit = limit_from_pool(pool_groups(context, stage.max_tokens.pool), stage.max_tokens.percentile)
        facts = limit.facts()
        stage = stage.model_copy(update={"max_tokens": limit.max_tokens})
        if wrong := [f"{key}: {message}" for key, message in stage.problems_with_limits()]:
            raise ValueError(f"with max_tokens {limit.max_tokens} from the pool: {'; '.join(wrong)}")
        context = replace(context, stage=stage)
    dev = problems_of(context, "dev", stage.eval_problems) if stage.eval_every else []
    run_rl(context, problems_of(context, "train"), dev, task_of(context.recipe), settings_of(stage), facts)
