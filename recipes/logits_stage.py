"""The stages of distillation on stored logits: keys become functions and types here, and go no further."""

from __future__ import annotations

from recipes.logits_keys import LogitDistill, TeacherLogits
from recipes.runner import StageContext
from recipes.sft_stage import settings_on_traces
from recipes.stage_inputs import loss_report

TRACES = "traces.jsonl"


def teacher_logits(context: StageContext) -> None:
    import torch

    from distill.on_policy import PromptOf
    from distill.sft import tokenize_traces
    from distill.topk_logits import LogitFacts, TeacherTopK, used_vocabulary, write_logits
    from distill.traces import read_traces, write_traces
    from rl.policy import PolicyModel, load_model, load_tokenizer, stop_token_ids
    from rl.rows import TrainingRow
    from rl.types import Problem, TextPart

    stage: TeacherLogits = context.stage
    name, suffix = context.model(stage.model), context.recipe.problems.prompt_suffix
    tokenizer, model = load_tokenizer(name), load_model(name)
    traces = read_traces(context.inputs[stage.traces] / TRACES)
    prompt_of = PromptOf(tokenizer, suffix + stage.teacher_suffix, stage.teacher_system)
    rows = [
        TrainingRow(
            prompt_of(Problem(trace.problem_id, (TextPart(trace.question),), "")),
            row.completion_ids, (0.0,) * len(row.completion_ids), 0.0, trace.problem_id, place,
        )
        for place, (trace, row) in enumerate(zip(traces, tokenize_traces(tokenizer, traces, suffix), strict=True))
    ]  # fmt: skip
    facts = LogitFacts(
        stage.model, stage.top_k, used_vocabulary(tokenizer), stage.temperature, stop_token_ids(model, tokenizer)
    )
    score = TeacherTopK(PolicyModel(model), facts.k, facts.vocab, facts.temperature, stage.micro_batch_tokens)
    write_traces(context.folder / TRACES, traces)
    write_logits(
        context.folder, rows, score, facts,
        dtype={"float16": torch.float16, "float32": torch.float32}[stage.dtype],
        shard_rows=stage.shard_rows,
        report=lambda done, total: context.progress(done, total, "traces"),
    )  # fmt: skip


def logit_distill(context: StageContext) -> None:
    from distill.topk_distill import LogitLoss, train
    from distill.topk_logits import TeacherLogits as Stored
    from distill.traces import read_traces
    from rl.policy import load_tokenizer

    stage: LogitDistill = context.stage
    scored = context.recipe.stages[stage.logits].config
    assert isinstance(scored, TeacherLogits)
    folder = context.inputs[stage.logits]
    train(
        context.folder,
        model=context.model(stage.model),
        traces=read_traces(folder / TRACES),
        logits=Stored(folder),
        teacher_tokenizer=load_tokenizer(context.model(scored.model)),
        loss=LogitLoss(stage.beta, stage.ce_weight),
        settings=settings_on_traces(context),
        ranks=context.ranks,
        report=loss_report(context),
    )
