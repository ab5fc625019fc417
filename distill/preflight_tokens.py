"""Checks of tokenizer, template and rows: what is sampled from, what is trained on, and where it ends.

Checks on a `TokenizerSubject` need no model, those on a `RowsSubject` the rows of a training stage: only there does a
template have to give back the answer. Each finding has a name of its own, the row or key, and the fix. Deviations: a
pad token that is the EOS token is no defect by itself (the base models of R1's students have it, and our rows carry
their labels); it is one where the batch does not train EOS.

Line: `reason preflight RECIPE`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from distill.guards import IGNORED, TokenRow, tokenize_row
from distill.preflight_subjects import Defect, Example, RowsSubject, TokenizerSubject, eos_of, problem
from rl.prompts import THINK_CLOSE, THINK_OPEN, prefills_think, render_prompt, render_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_ROWS = 16  # rows whose prompts are compared
BATCH = 8  # rows of the batch whose labels are looked at
THOUGHTLESS = 0.5  # a mix may hold rows without a thought, but not mostly
KEEP_TEMPLATE = "give the tokenizer a template that keeps the assistant's message as it is (--fix writes one)"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a row cannot be trained on as it is. Example: `Refusal("thought-dropped", "...", "give ...")`."""

    check: str
    found: str
    fix: str


# --- the tokenizer and its template -----------------------------------------------------------------------------------


def end_of_text(subject: TokenizerSubject) -> Iterator[Defect]:
    """An EOS token must exist, and the padding must not be the unknown token."""
    tokenizer = subject.tokenizer
    if tokenizer.eos_token_id is None:
        end = turn_end(tokenizer)
        yield Defect(
            "no-eos",
            f"{subject.where}, eos_token",
            "the tokenizer has no EOS token: nothing would ever end a completion",
            f"set eos_token{f' to {end}' if end else ''}",
        )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.unk_token_id:
        yield Defect(
            "pad-is-unk",
            f"{subject.where}, pad_token",
            f"{tokenizer.pad_token!r} is also the unknown token: a collator that masks padding hides unknown text",
            "set pad_token to a token that is never in a text",
        )


def stop_ids(subject: TokenizerSubject) -> Iterator[Defect]:
    """The generation config ends completions with the tokenizer's EOS, pads with its pad, and stops at no text."""
    tokenizer, generation = subject.tokenizer, subject.generation
    eos = eos_of(tokenizer)
    if generation is None or eos is None:
        return
    configured = as_ids(generation.eos_token_id)
    if eos not in configured:
        yield Defect(
            "generation-eos",
            f"{subject.where}, generation_config.eos_token_id",
            f"is {generation.eos_token_id}, the tokenizer's EOS {tokenizer.eos_token!r} is {eos}: an engine that reads "
            "the generation config does not stop where the student was taught to",
            f"set it to {sorted({*configured, eos})}",
        )
    pad = generation.pad_token_id
    if pad is not None and tokenizer.pad_token_id is not None and pad != tokenizer.pad_token_id:
        yield Defect(
            "generation-pad",
            f"{subject.where}, generation_config.pad_token_id",
            f"is {pad}, the tokenizer's pad {tokenizer.pad_token!r} is {tokenizer.pad_token_id}",
            f"set it to {tokenizer.pad_token_id}",
        )
    end = turn_end(tokenizer)
    number = tokenizer.get_vocab().get(end)
    if number is not None and number not in (*configured, eos):
        yield Defect(
            "turn-end-is-no-stop",
            f"{subject.where}, generation_config.eos_token_id",
            f"is {generation.eos_token_id}, the template ends a turn with {end!r} ({number}), where no engine stops",
            f"add {number} (--fix)",
        )
    inside = [
        (row.name, repr(tokenizer.convert_ids_to_tokens(hit)))
        for row in subject.rows
        for hit in sorted({*configured}.intersection(_ids(tokenizer, row.completion)))[:1]
    ]
    if inside:
        yield _of_rows(
            "stop-in-text",
            f"{subject.where}, generation_config.eos_token_id",
            inside,
            len(subject.rows),
            "would be stopped within the completion",
            "take this id out of the list",
        )


def prompt_start(subject: TokenizerSubject) -> Iterator[Defect]:
    """One BOS at the start of a prompt where the tokenizer wants one; never two."""
    tokenizer, bos = subject.tokenizer, subject.tokenizer.bos_token_id
    if bos is None or not subject.rows:
        return
    prompt = render_prompt(tokenizer, problem("row", subject.rows[0].question), subject.suffix)
    count = next((place for place, token in enumerate(prompt) if token != bos), len(prompt))
    if count > 1:
        yield Defect(
            "double-bos",
            f"{subject.where}, chat_template",
            f"a prompt begins with {count} times {tokenizer.bos_token!r}",
            "let either the template or the tokenizer write it",
        )
    plain = tokenizer("a")["input_ids"]
    if not count and bos != tokenizer.eos_token_id and list(plain)[:1] == [bos]:
        yield Defect(
            "no-bos",
            f"{subject.where}, chat_template",
            f"the tokenizer begins a text with {tokenizer.bos_token!r}, the template's prompt does not",
            "begin the template with {{ bos_token }}",
        )


def template(subject: TokenizerSubject) -> Iterator[Defect]:
    """Real rows come back from the template as prompt + completion + end of turn."""
    yield from _refused(subject.where, subject.tokenizer, subject.rows[:PROMPT_ROWS], subject.suffix)


def _refused(where: str, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], suffix: str) -> Iterator[Defect]:
    """One defect a kind of refusal, with the rows."""
    hits: dict[str, list[tuple[str, Refusal]]] = {}
    for row in rows:
        found = refusal(tokenizer, row, suffix)
        if found is not None:
            hits.setdefault(found.check, []).append((row.name, found))
    for check, named in hits.items():
        first = named[0][1]
        names = ", ".join(name for name, _ in named[:3])
        yield Defect(
            check, f"{where}, {names}", f"{len(named)} of {len(rows)} rows, the first: {first.found}", first.fix
        )


def refusal(tokenizer: PreTrainedTokenizerBase, row: Example, suffix: str = "") -> Refusal | None:
    """What the guards of `distill.guards` say against a row, by the name of the defect; None for a good row."""
    if eos_of(tokenizer) is None or not row.completion:
        return None  # defects of their own: no-eos, empty-target
    try:
        tokenize_row(tokenizer, row.question, row.completion, row.name, suffix)
    except ValueError as error:
        check, fix = _name_of(tokenizer, row, suffix)
        return Refusal(check, str(error), fix)
    return None


def _name_of(tokenizer: PreTrainedTokenizerBase, row: Example, suffix: str) -> tuple[str, str]:
    """The name of what is wrong with a row that the guards refuse, and the fix; in the order of the guards."""
    if tokenizer.chat_template is not None:
        prompt = render_text(tokenizer, problem(row.name, row.question), suffix)
        whole = _conversation(tokenizer, row, suffix)
        if not whole.startswith(prompt + row.completion):
            answer = whole[len(prompt.rstrip().removesuffix(THINK_OPEN)) :]
            thought, closed, _ = answer.partition(THINK_CLOSE)
            kept = closed and thought.strip().removeprefix(THINK_OPEN).strip()
            dropped = THINK_CLOSE in row.completion and not kept
            return ("thought-dropped" if dropped else "template-rewrites"), KEEP_TEMPLATE
        end = whole[len(prompt + row.completion) :].strip()
        if end and end != str(tokenizer.eos_token):
            return "turn-end-is-not-eos", f"set eos_token to {end[:40]!r} (--fix writes it)"
    ids = _ids(tokenizer, row.completion)
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        return "unknown-token", "drop the row, or take a tokenizer that knows these characters"
    if set(tokenizer.all_special_ids).intersection(ids):
        return "special-in-text", "take the special token out of the text, or drop the row"
    return "text-changed", "switch off what rewrites text in the tokenizer (normalizer, clean-up, added spaces)"


def turn_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes after an assistant's message, without spaces: "<|im_end|>"; "" if nothing."""
    if tokenizer.chat_template is None:
        return ""
    whole = _conversation(tokenizer, Example("probe", "a", "b"), "")
    return whole[whole.rfind("b") + 1 :].strip() if "b" in whole else ""


def _conversation(tokenizer: PreTrainedTokenizerBase, row: Example, suffix: str) -> str:
    """Question and completion through the template, the thought opened where the prompt opens it."""
    prompt = render_text(tokenizer, problem(row.name, row.question), suffix)
    stem = prompt.rstrip()
    prefill = prompt[len(stem) - len(THINK_OPEN) :] if stem.endswith(THINK_OPEN) else ""
    messages = [
        {"role": "user", "content": row.question + suffix},
        {"role": "assistant", "content": prefill + row.completion},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert isinstance(rendered, str)
    return rendered


# --- rows to train on -------------------------------------------------------------------------------------------------


def targets(subject: RowsSubject) -> Iterator[Defect]:
    """Nothing empty, no thought opened twice or never, none cut off before its end."""
    opened = prefills_think(subject.tokenizer)
    hits: dict[str, list[tuple[str, str]]] = {}
    for row in subject.rows:
        for check in _flaws(row.completion, opened):
            hits.setdefault(check, []).append((row.name, repr(row.completion[-40:])))
    total = len(subject.rows)
    for check, what, fix in FLAWS:
        named = hits.get(check, [])
        if named and (check not in MAY_BE_MIXED or len(named) > THOUGHTLESS * total):
            yield _of_rows(check, subject.where, named, total, what, fix)


FLAWS = (
    ("empty-target", "have no completion at all", "drop them"),
    ("empty-answer", "end with the thought: no answer follows", "drop them"),
    ("empty-thought", "have nothing in the thought", "drop them, or mix in rows with thoughts"),
    ("no-thought", "have no thought, so that the student unlearns to think", "mix in rows with thoughts"),
    (
        "truncated-target",
        "never close the thought: cut off where they were made",
        "drop them, or draw again with more max_tokens",
    ),
    (
        "think-opened-twice",
        "open the thought that the template's prompt has opened",
        "take <think> off the completions, or out of the template's generation prompt",
    ),
    (
        "think-not-opened",
        "close a thought that neither they nor the prompt opened",
        "put <think> before the completions, or at the end of the template's generation prompt",
    ),
)
MAY_BE_MIXED = ("empty-thought", "no-thought")


def _flaws(completion: str, opened: bool) -> Iterator[str]:
    """The names of what is wrong with one completion. `opened`: the template's prompt ends in `<think>`.

    Example: `"4+4=8</think>"` has the flaw "empty-answer" where the prompt opens the thought.
    """
    text = completion.strip()
    if not text:
        yield "empty-target"
        return
    begins = text.startswith(THINK_OPEN)
    if begins and opened:
        yield "think-opened-twice"
    if THINK_CLOSE not in text:
        yield "truncated-target" if opened or begins else "no-thought"
        return
    if not begins and not opened:
        yield "think-not-opened"
    thought, _, answer = text.partition(THINK_CLOSE)
    if not thought.removeprefix(THINK_OPEN).strip():
        yield "empty-thought"
    if not answer.strip():
        yield "empty-answer"


def tokens(subject: RowsSubject) -> Iterator[Defect]:
    """Every row passes the guards: it comes back from the template, and nothing of it is unknown or special."""
    hits: dict[str, list[tuple[str, Refusal]]] = {}
    for row in subject.rows:
        found = refusal(subject.tokenizer, row, subject.suffix)
        if found is not None:
            hits.setdefault(found.check, []).append((row.name, found))
    for check, named in hits.items():
        first = named[0][1]
        names = ", ".join(name for name, _ in named[:3])
        found = f"{len(named)} of {len(subject.rows)} rows, the first: {first.found}"
        yield Defect(check, f"{subject.where}, {names}", found, first.fix)


def lengths(subject: RowsSubject) -> Iterator[Defect]:
    """No row is longer than max_length: trainers that cut there lose the answer and EOS."""
    sizes = [(row.name, len(row)) for row in _tokenized(subject, subject.rows)]
    over = [(name, f"{size} tokens") for name, size in sizes if size > subject.max_length]
    if over:
        longest = max(size for _, size in sizes)
        yield _of_rows(
            "rows-over-max-length",
            f"{subject.where}, max_length",
            over,
            len(sizes),
            f"are longer than {subject.max_length} tokens",
            f"set max_length to {longest}, or drop these rows when the traces are chosen",
        )


def prefill(subject: RowsSubject) -> Iterator[Defect]:
    """The prompt of a trained row is the prompt that the sampler gets, token by token."""
    differing = []
    for row, made in _pairs(subject, subject.rows[:PROMPT_ROWS]):
        asked = subject.prompt(row.question)
        if made.prompt_ids != asked:
            decode = partial(subject.tokenizer.decode, skip_special_tokens=False)
            ends = (repr(str(decode(list(ids)))[-24:]) for ids in (made.prompt_ids, asked))
            differing.append((row.name, "trained after {}, sampled after {}".format(*ends)))
    if differing:
        yield _of_rows(
            "prompt-differs",
            subject.where,
            differing,
            min(len(subject.rows), PROMPT_ROWS),
            "are trained after another prompt than the sampler's",
            "use one template with one generation prompt for both",
        )


def mask(subject: RowsSubject) -> Iterator[Defect]:
    """In the batch that the trainer gets, the first trained token is the response's first, and the last is EOS."""
    eos = eos_of(subject.tokenizer)
    rows = _tokenized(subject, _mixed_lengths(subject.rows))
    if not rows or eos is None:
        return
    hits: dict[str, list[tuple[str, str]]] = {}
    for row, (ids, labels) in zip(rows, subject.collate(rows), strict=True):
        for check, what in _mask_flaws(row, ids, labels, eos, subject.tokenizer.pad_token_id):
            hits.setdefault(check, []).append((row.name, what))
    for check, named in hits.items():
        fix = "set pad_token to a token of its own (--fix)" if check == "pad-is-eos" else MASK_FIX
        yield _of_rows(check, f"{subject.where}, labels", named, len(rows), "have wrong labels", fix)


MASK_FIX = "hand the trainer labels with the prompt masked and the completion with its EOS trained"


def _mask_flaws(
    row: TokenRow, ids: Sequence[int], labels: Sequence[int], eos: int, pad: object
) -> Iterator[tuple[str, str]]:
    if list(ids) != row.input_ids:
        yield "row-changed", f"{len(ids)} tokens in the batch, {len(row)} in the row"
        return
    start = len(row.prompt_ids)
    trained = [place for place, label in enumerate(labels) if label != IGNORED]
    wrong = [place for place in trained if labels[place] != ids[place]]
    if not trained or trained[0] != start or wrong:
        begins = f"begins at token {trained[0]}" if trained else "trains nothing"
        shifted = f", token {wrong[0]} has the label of another" if wrong else ""
        yield "mask-shifted", f"{begins}{shifted}; the response begins at token {start}"
    if ids[-1] == eos and labels[-1] == IGNORED:
        yield ("pad-is-eos" if pad == eos else "eos-not-trained"), "the last token, EOS, is masked"
    elif ids[-1] != eos:
        yield "row-without-eos", "the last token is not EOS"


def _mixed_lengths(rows: Sequence[Example]) -> list[Example]:
    """Up to eight rows with the shortest and the longest among them, so that there is padding."""
    ordered = sorted(rows, key=lambda row: len(row.completion))
    return ordered[: BATCH // 2] + ordered[BATCH // 2 :][-BATCH // 2 :]


def _pairs(subject: RowsSubject, rows: Sequence[Example]) -> Iterator[tuple[Example, TokenRow]]:
    """Rows with their tokens; those that the guards refuse are found by `tokens`."""
    for row in rows:
        try:
            yield row, subject.tokenize(row)
        except ValueError:
            continue


def _tokenized(subject: RowsSubject, rows: Sequence[Example]) -> list[TokenRow]:
    return [made for _, made in _pairs(subject, rows)]


def as_ids(value: list[int] | int | None) -> list[int]:
    """`as_ids(None) == []`, `as_ids(7) == [7]`: a config has either form."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]


def _of_rows(check: str, where: str, hits: Sequence[tuple[str, str]], total: int, what: str, fix: str) -> Defect:
    """`hits`: (row, detail). "3 of 40 rows are longer than 96 tokens: trace 1 (99 tokens), ..." """
    named = ", ".join(f"{name} ({detail})" for name, detail in hits[:3]) + (", ..." if len(hits) > 3 else "")
    return Defect(check, where, f"{len(hits)} of {total} rows {what}: {named}", fix)


TOKENIZER_CHECKS: tuple[Callable[[TokenizerSubject], Iterator[Defect]], ...] = (
    end_of_text,
    stop_ids,
    prompt_start,
)
ROWS_CHECKS: tuple[Callable[[RowsSubject], Iterator[Defect]], ...] = (targets, tokens, lengths, prefill, mask)
