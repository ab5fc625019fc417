"""From training rows to packed micro-batches: a token budget, balanced work, no padding in the forward pass.

A micro-batch is one row of N tokens, each prompt with its completions behind it (`rl.attention` keeps them from seeing
each other). Two things are left out of it because no result needs them: the last token of a completion, which predicts
no other, and every further copy of a prompt that several rows share.

Losses want one line a completion, so the values of the M scored positions are laid out as (B, T), padded on the right:
a few numbers a token, where padded activations would be thousands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil

import torch

from rl.attention import AttentionLayout, PackedSequence, attention_layout
from rl.rows import TrainingRow

# A prompt lies in the row once when that saves at least this share of the tokens. Varlen attention pays for it with a
# gather of keys and values in every layer, which small savings are not worth; buckets gather anyway.
MIN_SHARED = 0.05
# The (B, T) tensors of the losses hold at most this many numbers a token of the budget.
MAX_WIDTH = 64
# At this many tokens a row's attention costs as much as its linear layers: 12 × the hidden size, here 1,024 to 1,536.
EVEN_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch on a device: N packed tokens, B completions of which M tokens are scored, T the longest.

    Example: prompt (5, 6) with completions (7, 8, 1) and (9, 1), shared: `input_ids` ((5, 6, 7, 8, 9)), `position_ids`
    ((0, 1, 2, 3, 2)), `scored` (1, 2, 3, 1, 4), `targets` (7, 8, 1, 9, 1), B 2, T 3, M 5.
    """

    input_ids: torch.Tensor  # (1, N)
    position_ids: torch.Tensor  # (1, N), counted from 0 in each sequence
    layout: AttentionLayout
    scored: torch.Tensor  # (M,), packed positions whose next token is a completion token; shared ones repeat
    targets: torch.Tensor  # (M,), those tokens
    cells: torch.Tensor  # (2, M), the line and the column in (B, T) at which they stand
    completion_mask: torch.Tensor  # (B, T), 1 on trained tokens
    sampler_logprobs: torch.Tensor  # (B, T), nats, 0 on padding
    advantages: torch.Tensor  # (B,), or (B, T) where a row has one a token
    lengths: torch.Tensor  # (B,), completion tokens
    names: tuple[str, ...]  # of the rows, "group[sample]"

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    def padded(self, values: torch.Tensor) -> torch.Tensor:
        """(M,) values of the scored tokens as (B, T), 0 on padding; differentiable."""
        # Not index_copy and a view: FSDP2 warns of every forward that returns one.
        return values.new_zeros(self.completion_mask.shape).index_put((self.cells[0], self.cells[1]), values)


def pack(rows: Sequence[TrainingRow], device: torch.device | str = "cpu", *, share_prompts: bool = True) -> PackedBatch:
    """Pack rows into one micro-batch; rows keep their order, except that those of one prompt come together.

    With `share_prompts` equal prompts lie in it once, if that saves at least `MIN_SHARED` of the tokens. Log-probs and
    gradients are the same either way. A row without prompt or without completion is refused by name.
    """
    if not rows:
        raise ValueError(
            "no rows to pack; a rank without rows that must take part in collective calls packs one with advantage 0 "
            "and trained = (False, ...)"
        )
    for row in rows:
        if not row.prompt_ids or not row.token_ids:
            raise ValueError(
                f"row {row.name} has {len(row.prompt_ids)} prompt and {row.num_tokens} completion tokens; both must be "
                "at least 1: the last prompt token predicts the first completion token"
            )
    groups = by_prompt(rows)
    saved = sum(len(members[0].prompt_ids) * (len(members) - 1) for members in groups)
    share = share_prompts and saved >= MIN_SHARED * sum(_row_tokens(row) - 1 for row in rows)

    ids: list[int] = []
    positions: list[int] = []
    sequences: list[PackedSequence] = []
    ordered = [row for members in groups for row in members]
    prompt = range(0)
    for i, row in enumerate(ordered):
        if not share or i == 0 or row.prompt_ids != ordered[i - 1].prompt_ids:
            prompt = range(len(ids), len(ids) + len(row.prompt_ids))
            ids += row.prompt_ids
            positions += range(len(prompt))
        completion = range(len(ids), len(ids) + row.num_tokens - 1)
        ids += row.token_ids[:-1]
        positions += range(len(prompt), len(prompt) + len(completion))
        sequences.append(PackedSequence(prompt, completion))

    width = max(row.num_tokens for row in ordered)
    scored = [p for s in sequences for p in (s.prompt[-1], *s.completion)]
    lines = [line for line, row in enumerate(ordered) for _ in row.token_ids]
    columns = [t for row in ordered for t in range(row.num_tokens)]

    def integers(values: Sequence[int] | Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long).to(device)

    def padded(values: Sequence[Sequence[float]]) -> torch.Tensor:
        return torch.tensor([[*v, *[0.0] * (width - len(v))] for v in values], dtype=torch.float32).to(device)

    if any(isinstance(row.advantage, tuple) for row in ordered):
        advantages = padded([row.token_advantages for row in ordered])
    else:
        advantages = torch.tensor([row.advantage for row in ordered], dtype=torch.float32).to(device)

    return PackedBatch(
        input_ids=integers(ids).unsqueeze(0),
        position_ids=integers(positions).unsqueeze(0),
        layout=attention_layout(sequences, device),
        scored=integers(scored),
        targets=integers([token for row in ordered for token in row.token_ids]),
        cells=integers([lines, columns]),
        completion_mask=padded([row.trained or (True,) * row.num_tokens for row in ordered]),
        sampler_logprobs=padded([row.sampler_logprobs for row in ordered]),
        advantages=advantages,
        lengths=integers([row.num_tokens for row in ordered]),
        names=tuple(row.name for row in ordered),
    )


def row_cost(row: TrainingRow, even_tokens: int = EVEN_TOKENS) -> float:
    """Work of one row in token units: L + L² / `even_tokens`, linear layers and attention.

    Example: 16,384 tokens cost 32,768 units, 1,024 tokens 1,088.
    """
    tokens = _row_tokens(row)
    return tokens + tokens * tokens / even_tokens


def _row_tokens(row: TrainingRow) -> int:
    return len(row.prompt_ids) + row.num_tokens


def plan_micro_batches(
    rows: Sequence[TrainingRow], max_tokens: int, parts: int = 1, *, even_tokens: int = EVEN_TOKENS
) -> list[list[list[TrainingRow]]]:
    """Cut rows into micro-batches for `parts` data-parallel ranks: per rank a list of micro-batches.

    Every row stands in exactly one micro-batch. Every rank gets the same number of them (the fewest that fit), and the
    j-th ones of all ranks cost about the same (`row_cost`), so that no rank waits for another. A micro-batch holds at
    most `max_tokens` tokens, prompt + completion, counted *before* prompts are shared: attention still works on the
    copies, so the budget does not rely on what sharing saves. A micro-batch is empty only where there are fewer rows
    than micro-batches. Rows of one prompt stay together as far as balance allows.

    Longest processing time first: bundles of rows (the rows of one prompt, cut so that a bundle is at most an eighth of
    a micro-batch) in falling order of cost, each into the cheapest micro-batch that still has room. A function of its
    arguments alone. A row longer than `max_tokens` is refused by name.
    """
    for row in rows:
        if _row_tokens(row) > max_tokens:
            raise ValueError(
                f"row {row.name} has {_row_tokens(row)} tokens, more than micro_batch_tokens = {max_tokens}; raise "
                "micro_batch_tokens or lower the sampling's max_tokens"
            )
    count = ceil(sum(map(_row_tokens, rows)) / (max_tokens * parts))
    while (filled := _fill(rows, max_tokens, count * parts, even_tokens)) is None:
        count += 1
    # Neighbours in falling order of cost form one step. Every second step is dealt backwards, to even out the sums.
    filled.sort(key=lambda batch: -batch.cost)
    steps = [filled[j * parts : (j + 1) * parts] for j in range(count)]
    return [[(step if j % 2 == 0 else step[::-1])[rank].rows for j, step in enumerate(steps)] for rank in range(parts)]


@dataclass(slots=True)
class _Bundle:
    """Rows with their sums: a piece of one prompt's rows, or a micro-batch that is being filled with such pieces."""

    rows: list[TrainingRow] = field(default_factory=list)
    tokens: int = 0
    longest: int = 0  # completion tokens
    cost: float = 0.0

    def add(self, other: _Bundle) -> None:
        self.rows += other.rows
        self.tokens += other.tokens
        self.longest = max(self.longest, other.longest)
        self.cost += other.cost

    def has_room(self, other: _Bundle, max_tokens: int) -> bool:
        lines = len(self.rows) + len(other.rows)
        numbers = lines * max(self.longest, other.longest)
        return self.tokens + other.tokens <= max_tokens and (lines == 1 or numbers <= MAX_WIDTH * max_tokens)


def _fill(rows: Sequence[TrainingRow], max_tokens: int, count: int, even_tokens: int) -> list[_Bundle] | None:
    """`count` micro-batches filled with the rows, or None if they do not fit."""
    batches = [_Bundle() for _ in range(count)]
    limit = sum(map(_row_tokens, rows)) / max(count, 1) / 8
    for bundle in sorted(_bundles(rows, limit, even_tokens), key=lambda bundle: -bundle.cost):
        with_room = [batch for batch in batches if batch.has_room(bundle, max_tokens)]
        if not with_room:
            return None
        min(with_room, key=lambda batch: batch.cost).add(bundle)
    return batches


def _bundles(rows: Sequence[TrainingRow], limit: float, even_tokens: int) -> list[_Bundle]:
    """The rows of each prompt, cut into bundles of at most `limit` tokens (or one row)."""
    bundles: list[_Bundle] = []
    for members in by_prompt(rows):
        for i, row in enumerate(members):
            single = _Bundle([row], _row_tokens(row), row.num_tokens, row_cost(row, even_tokens))
            if i == 0 or bundles[-1].tokens + single.tokens > limit:
                bundles.append(single)
            else:
                bundles[-1].add(single)
    return bundles


def by_prompt(rows: Sequence[TrainingRow]) -> list[list[TrainingRow]]:
    """Rows of equal prompts together, prompts and rows in order of appearance."""
    found: dict[tuple[int, ...], list[TrainingRow]] = {}
    for row in rows:
        found.setdefault(row.prompt_ids, []).append(row)
    return list(found.values())
