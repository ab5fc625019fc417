"""Checks of configs, vocabularies, limits, pools and splits, all without loading a model.

What a config promises is held against the tokenizer, against the shapes in the weights' files and against what the
stages of a recipe want of it. Sources: YaRN (arXiv 2309.00071) for the factor; the widths 151,936 and 152,064 are those
of Qwen2.5 up to 3B and from 7B on.

Line: `reason preflight RECIPE`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from distill.preflight_subjects import (
    EMBEDDING,
    HEAD,
    Defect,
    LimitSubject,
    ModelSubject,
    PairSubject,
    PoolSubject,
    SplitSubject,
    Vocabulary,
    eos_of,
    problem,
)
from rl.prompts import prefills_think, render_prompt

DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
MOST_TRUNCATED = 0.1  # of a pool's completions
UNTRAINED = 1e-6  # the largest entry of an embedding row that nothing was ever learnt into


# --- a config, its tokenizer and its weights --------------------------------------------------------------------------


def embedding(subject: ModelSubject) -> Iterator[Defect]:
    """Every id of the tokenizer has a row, and there are as many rows as the config says."""
    width = subject.config.get_text_config().vocab_size
    rows = _stored_rows(subject)
    vocabulary = subject.tokenizer.get_vocab()
    last = max(vocabulary, key=lambda token: vocabulary[token])
    if vocabulary[last] >= width:
        yield Defect(
            "tokenizer-over-embedding",
            f"{subject.where}, vocab_size",
            f"is {width}, but the tokenizer has {last!r} with id {vocabulary[last]}: training would stop at, or read "
            "beyond, the embedding",
            f"resize the embeddings to {vocabulary[last] + 1} (--fix)",
        )
    if rows is not None and rows != width:
        yield Defect(
            "embedding-rows",
            f"{subject.where}, vocab_size",
            f"is {width}, but the stored embedding has {rows} rows",
            f"set vocab_size to {rows}, or resize the embeddings (--fix)",
        )


def tied_head(subject: ModelSubject) -> Iterator[Defect]:
    """A config that ties the output layer has no other one stored; one that does not has one."""
    stored, tied = subject.stored, bool(getattr(subject.config, "tie_word_embeddings", False))
    if stored is None:
        return
    inputs, head = stored.find(EMBEDDING), stored.find(HEAD)
    if inputs is None:
        return
    if not tied and head is None:
        yield Defect(
            "head-missing",
            f"{subject.where}, tie_word_embeddings",
            "is false, but no output layer is stored: it would start from random numbers",
            "set tie_word_embeddings to true (--fix), or store the output layer",
        )
    if tied and head is not None:
        other = stored.shapes[head] != stored.shapes[inputs]
        if other or (subject.read_weights and not stored.read(head).equal(stored.read(inputs))):
            yield Defect(
                "tied-head-differs",
                f"{subject.where}, tie_word_embeddings",
                f"is true, but {head} is stored with other values than {inputs}: it would be thrown away",
                "set tie_word_embeddings to false",
            )


def dtype(subject: ModelSubject) -> Iterator[Defect]:
    """The config's dtype is that of the weights, and not fp16, whose largest number is 65,504."""
    name = str(getattr(subject.config, "dtype", None) or "").removeprefix("torch.")
    if name == "float16":
        yield Defect(
            "dtype-float16",
            f"{subject.where}, dtype",
            "is float16, in which activations of models trained in bf16 overflow; what a stage writes would have it",
            "set dtype to bfloat16 (--fix)",
        )
    kept = subject.stored.find(EMBEDDING) if subject.stored is not None else None
    if subject.stored is None or kept is None or not name:
        return
    found = DTYPES.get(subject.stored.dtypes[kept])
    if found is not None and found != name:
        yield Defect(
            "dtype-differs",
            f"{subject.where}, dtype",
            f"is {name}, but the weights are stored as {found}: a stage would write them back in the other one",
            f"set dtype to {found} (--fix)",
        )


def positions(subject: ModelSubject) -> Iterator[Defect]:
    """As many positions as the longest row of any stage, and rope scaling that reaches as far as the config says."""
    config = subject.config.get_text_config()
    limit, reach = getattr(config, "max_position_embeddings", None), yarn_reach(config)
    if limit is None:
        return
    if reach is not None and reach < limit:
        yield Defect(
            "rope-scaling",
            f"{subject.where}, rope_parameters",
            f"YaRN reaches {reach} positions, but max_position_embeddings is {limit}",
            f"set the factor to {limit * _rope(config)['factor'] / reach:g}, or max_position_embeddings to {reach}",
        )
    over = [context for context in subject.contexts if context.tokens > limit]
    if not over:
        return
    most = max(context.tokens for context in over)
    wanted = "; ".join(f"{context.where} wants {context.tokens}" for context in over[:4])
    if reach is not None and reach >= most:
        fix = f"YaRN reaches {reach}: set max_position_embeddings to {reach} (--fix)"
    else:
        fix = f"ask for at most {limit} tokens, or extend the model (rope_theta or YaRN, and max_position_embeddings)"
    yield Defect(
        "positions", f"{subject.where}, max_position_embeddings", f"is {limit}, but {wanted} tokens of one row", fix
    )


def yarn_reach(config: Any) -> int | None:
    """The positions that YaRN scales to: factor 4 of 32,768 is 131,072; None without YaRN."""
    rope = _rope(config)
    if rope.get("rope_type", rope.get("type")) != "yarn":
        return None
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return int(original * rope["factor"])


def _rope(config: Any) -> dict[str, Any]:
    """The rope settings of a config; models with one set a kind of layer have none of these checks."""
    return getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}


def untrained_rows(subject: ModelSubject) -> Iterator[Defect]:
    """No token of the recipe's prompts and completions, EOS included, has an embedding row that is (almost) zero."""
    stored = subject.stored
    name = stored.find(EMBEDDING) if stored is not None and subject.read_weights else None
    if stored is None or name is None:
        return
    weight, tokenizer = stored.read(name), subject.tokenizer
    used = {eos for eos in (eos_of(tokenizer),) if eos is not None}
    for row in subject.rows:
        used |= set(tokenizer(row.completion, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]
        used |= set(render_prompt(tokenizer, problem("row", row.question)))
    empty = [i for i in sorted(used) if i < len(weight) and weight[i].abs().max().item() < UNTRAINED]
    if empty:
        tokens = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} (id {i})" for i in empty[:5])
        yield Defect(
            "untrained-rows",
            f"{subject.where}, {name}",
            f"{len(empty)} of {len(used)} tokens that the rows use have an embedding of zeros: {tokens}",
            "start these rows from the mean of the others (--fix), and train the embeddings (no LoRA without them)",
        )


def _stored_rows(subject: ModelSubject) -> int | None:
    name = subject.stored.find(EMBEDDING) if subject.stored is not None else None
    return None if subject.stored is None or name is None else subject.stored.shapes[name][0]


# --- two models -------------------------------------------------------------------------------------------------------


def vocabularies(subject: PairSubject) -> Iterator[Defect]:
    """Every id is the same string on both sides, and where logits are compared or weights averaged, so is the width."""
    student, teacher = subject.student, subject.teacher
    known = {number: token for token, number in teacher.tokenizer.get_vocab().items()}
    own = sorted((number, token) for token, number in student.tokenizer.get_vocab().items())
    differing = [(number, token) for number, token in own if known.get(number) != token]
    if differing:
        number, token = differing[0]
        yield Defect(
            "vocabulary-strings",
            subject.where,
            f"{len(differing)} of {len(own)} ids are other strings, the first: id {number} is {token!r} for "
            f"{student.name} and {known.get(number)!r} for {teacher.name}",
            "take models of one tokenizer, or hand on text: method traces, then sft",
        )
    if subject.same_rows and student.rows != teacher.rows:
        yield Defect(
            "vocabulary-rows",
            subject.where,
            f"{student.name} has {student.rows} output rows, {teacher.name} {teacher.rows}: their logits and weights "
            "do not fit on each other",
            f"resize the embeddings of one to {max(student.rows, teacher.rows)}",
        )


def ends_and_thoughts(subject: PairSubject) -> Iterator[Defect]:
    """The student's EOS ends the teacher's completions, and both templates open the thought or both do not."""
    student, teacher = subject.student, subject.teacher
    if student.tokenizer.eos_token_id not in teacher.stop_ids:
        yield Defect(
            "eos-differs",
            subject.where,
            f"{student.name} ends with {student.tokenizer.eos_token!r} (id {student.tokenizer.eos_token_id}), "
            f"{teacher.name} with ids {list(teacher.stop_ids)}: the student would learn never to stop",
            "set both to one EOS",
        )
    if prefills_think(student.tokenizer) != prefills_think(teacher.tokenizer):
        yield Defect(
            "prefill-differs",
            subject.where,
            f"the template of {_opener(student, teacher)} opens <think> in the prompt, the other's does not",
            "give both the same template",
        )


def _opener(student: Vocabulary, teacher: Vocabulary) -> str:
    return student.name if prefills_think(student.tokenizer) else teacher.name


# --- limits, pools, splits --------------------------------------------------------------------------------------------


def limits(subject: LimitSubject) -> Iterator[Defect]:
    """The longest prompt with the longest completion that can be drawn fits into a training row."""
    longest = subject.longest_prompt + subject.max_tokens
    if longest > subject.max_length:
        yield Defect(
            "max-length-below-max-tokens",
            subject.where,
            f"is {subject.max_length}, but {subject.source} allows {subject.max_tokens} tokens after a prompt of up to "
            f"{subject.longest_prompt}: after all the sampling the longest rows would stop the run",
            f"set it to {longest}, or overflow to drop",
        )


def pool(subject: PoolSubject) -> Iterator[Defect]:
    """A pool that can be gone on with, and that was not cut off at max_tokens."""
    if subject.damage:
        yield Defect(
            "pool-damaged",
            subject.where,
            f"{len(subject.damage)} findings, the first: {subject.damage[0]}",
            "`reason pool check` lists them; take damaged files from a backup, or draw the pool again",
        )
    if subject.samples and subject.truncated > MOST_TRUNCATED * subject.samples:
        yield Defect(
            "pool-truncated",
            subject.where,
            f"{subject.truncated} of {subject.samples} completions ({subject.truncated / subject.samples:.0%}) were "
            f"cut off at max_tokens = {subject.max_tokens}: they have no answer and no EOS, and only short ones remain",
            "raise max_tokens",
        )


def splits(subject: SplitSubject) -> Iterator[Defect]:
    """No question that is measured on is trained on (spaces and case aside)."""
    known = {_plain(text): name for name, text in subject.test}
    both = [(name, known[_plain(text)]) for name, text in subject.train if _plain(text) in known]
    if both:
        named = ", ".join(f"{ours} is {theirs}" for ours, theirs in both[:3])
        yield Defect(
            "train-in-test",
            subject.where,
            f"{len(both)} of {len(subject.train)} training questions are test questions: {named}",
            "drop them from the training rows (`reason curate --against` finds near duplicates as well)",
        )


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def relatives(subject: PairSubject) -> Iterator[Defect]:
    """Models whose weights are averaged have one architecture, rope and positions included."""
    if subject.unlike is not None:
        yield Defect(
            "merge-partner",
            subject.where,
            subject.unlike,
            "name a relative, or give it the other's settings with a `method: prepare` stage (context, rope_theta)",
        )


MODEL_CHECKS: tuple[Callable[[ModelSubject], Iterator[Defect]], ...] = (
    embedding,
    tied_head,
    dtype,
    positions,
    untrained_rows,
)
PAIR_CHECKS: tuple[Callable[[PairSubject], Iterator[Defect]], ...] = (vocabularies, ends_and_thoughts, relatives)
LIMIT_CHECKS: tuple[Callable[[LimitSubject], Iterator[Defect]], ...] = (limits,)
POOL_CHECKS: tuple[Callable[[PoolSubject], Iterator[Defect]], ...] = (pool,)
SPLIT_CHECKS: tuple[Callable[[SplitSubject], Iterator[Defect]], ...] = (splits,)
