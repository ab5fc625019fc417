"""From the rows of one optimizer step to micro-batches: a token budget, padded or packed, shared over the processes.

An optimizer step is `batch_size` rows, however they are cut: the loss is divided by the trained tokens of the whole
step, over all processes, so a cut changes rounding and nothing else. No row is split, so no tail is ever lost; TRL 1.16
packs across optimizer steps (its batch size counts packs, not rows) and splits or drops what does not fit.

* `whole_share`: each process takes its rows at once, padded to the longest. What `micro_batch_tokens: null` means.
* `RowCut`: so many rows at a time, in their order.
* `PaddedCut`: rows sorted by length, cut where rows × longest would pass the budget, so that little is padding.
* `PackedCut`: rows laid end to end in one line of at most the budget, longest first into the line with most room, the
  fewest lines that hold them (rl/packing.py). Position ids restart with every row and attention does not see across
  rows (rl/attention.py); the layout goes to the model with the batch, no dense mask is built.

Line: `reason distill RECIPE`, the keys `micro_batch_tokens` and `packing` of a stage with `method: sft`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distill.guards import IGNORED, TokenRow
from rl.packing import pack, plan_micro_batches
from rl.rows import TrainingRow

# (rows of an optimizer step, number of processes) -> for each process its micro-batches, for all the same number.
Cut = Callable[[Sequence[TokenRow], int], list[list[list[TokenRow]]]]
# (rows, device) -> what the model's forward is given.
InputsOf = Callable[[Sequence[TokenRow], torch.device], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one process runs at once.

    Example: two processes run rows of 3 and 4 completion tokens: each has `num_trained` 7.
    """

    rows: tuple[TokenRow, ...]  # at least one
    trained: bool  # False: a process without rows runs one that trains nothing, to take part in what all do together
    num_trained: int  # trained tokens of the micro-batches that all processes run at this time


class SftSteps(torch.utils.data.Dataset[list[MicroBatch]]):
    """The micro-batches of process `rank` of `world`, optimizer step by optimizer step; every process has as many.

    `order` are row indices, all epochs end to end. Example: 10 rows in an order of 30, batches of 4: 8 steps.
    """

    def __init__(
        self, rows: Sequence[TokenRow], order: Sequence[int], batch_size: int, cut: Cut, rank: int = 0, world: int = 1
    ) -> None:
        self.rows, self.order, self.batch_size, self.cut = rows, order, batch_size, cut
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __getitem__(self, step: int) -> list[MicroBatch]:
        if not 0 <= step < len(self):
            raise IndexError(step)
        rows = [self.rows[i] for i in self.order[step * self.batch_size : (step + 1) * self.batch_size]]
        parts = self.cut(rows, self.world)
        idle = min(rows, key=len)
        found = []
        for together in zip(*parts, strict=True):
            count = sum(len(row.completion_ids) for own in together for row in own)
            own = together[self.rank]
            found.append(MicroBatch(tuple(own) or (idle,), bool(own), count))
        return found


def whole_share(rows: Sequence[TokenRow], parts: int) -> list[list[list[TokenRow]]]:
    """One micro-batch a process: rows (a, b, c) for 2 processes give [[[a, c]], [[b]]]."""
    return [[list(rows[part::parts])] for part in range(parts)]


@dataclass(frozen=True, slots=True)
class RowCut:
    """Micro-batches of `num_rows` rows in their order: rows (a, b, c, d, e) by 2 for one process are ab, cd, e."""

    num_rows: int

    def __call__(self, rows: Sequence[TokenRow], parts: int) -> list[list[list[TokenRow]]]:
        shares = [rows[part::parts] for part in range(parts)]
        starts = range(0, len(shares[0]), self.num_rows)
        return [[list(share[start : start + self.num_rows]) for start in starts] for share in shares]


@dataclass(frozen=True, slots=True)
class PaddedCut:
    """Micro-batches of at most `max_tokens` tokens with their padding, rows of similar length together.

    Example: lengths 9, 2, 8, 3 with `max_tokens` 18 for one process: [[9, 8], [3, 2]].
    """

    max_tokens: int

    def __call__(self, rows: Sequence[TokenRow], parts: int) -> list[list[list[TokenRow]]]:
        """Errors: ValueError for a row longer than the budget."""
        batches: list[list[TokenRow]] = []
        for row in sorted(rows, key=len, reverse=True):
            _check_fits(row, self.max_tokens)
            if batches and len(batches[-1][0]) * (len(batches[-1]) + 1) <= self.max_tokens:
                batches[-1].append(row)
            else:
                batches.append([row])
        while len(batches) % parts:  # every process needs as many: halve the largest, or leave one empty
            largest = max(range(len(batches)), key=lambda i: (len(batches[i]) > 1, _cells(batches[i])))
            whole = batches[largest]
            half = (len(whole) + 1) // 2
            batches[largest : largest + 1] = [whole[:half], whole[half:]]
        batches.sort(key=_cells, reverse=True)
        # Neighbours in falling order of size run at the same time. Every second time they are dealt backwards.
        steps = [batches[start : start + parts] for start in range(0, len(batches), parts)]
        return [[(step if j % 2 == 0 else step[::-1])[part] for j, step in enumerate(steps)] for part in range(parts)]


@dataclass(frozen=True, slots=True)
class PackedCut:
    """Micro-batches of at most `max_tokens` tokens without padding; an empty one only where rows are too few."""

    max_tokens: int

    def __call__(self, rows: Sequence[TokenRow], parts: int) -> list[list[list[TokenRow]]]:
        """Errors: ValueError for a row longer than the budget."""
        for row in rows:
            _check_fits(row, self.max_tokens)
        packed = [_packing_row(row) for row in rows]
        back = {id(line): row for line, row in zip(packed, rows, strict=True)}
        plan = plan_micro_batches(packed, self.max_tokens, parts)
        return [[[back[id(line)] for line in batch] for batch in part] for part in plan]


def packed_inputs(rows: Sequence[TokenRow], device: torch.device) -> dict[str, Any]:
    """One line of all rows, for a model with packed attention. The last token of a row predicts nothing and is left
    out.

    Example: rows (5, 6 | 7, 1) and (8 | 9, 1) of prompt | completion: `input_ids` ((5, 6, 7, 8, 9)), `position_ids`
    ((0, 1, 2, 0, 1)), `shift_labels` ((-100, 7, 1, 9, 1)): the label of a position is the token it predicts.
    """
    batch = pack([_packing_row(row) for row in rows], device, share_prompts=False)
    labels = torch.full_like(batch.input_ids, IGNORED)
    labels[0, batch.scored] = batch.targets
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "shift_labels": labels,
        # A mask with four dimensions is handed on as it is, so that transformers builds none; nothing reads it.
        "attention_mask": torch.zeros(1, 1, 1, 1, device=device),
        "packed_layout": batch.layout,
    }


def without_labels(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs, none of which is trained."""
    labels = {name: torch.full_like(inputs[name], IGNORED) for name in ("labels", "shift_labels") if name in inputs}
    return {**inputs, **labels}


def sequences_of(inputs: Mapping[str, Any]) -> list[tuple[list[int], list[int]]]:
    """What a model is trained on, read back from its inputs: for each sequence its ids, and what each must predict.

    Example: the row (5, 6 | 7, 1) of prompt | completion is ([5, 6, 7], [-100, 7, 1]), padded or packed.
    """
    if "shift_labels" in inputs:
        ids, labels, positions = (inputs[name][0].tolist() for name in ("input_ids", "shift_labels", "position_ids"))
        starts = [place for place, position in enumerate(positions) if position == 0]
        ends = [*starts[1:], len(ids)]
        return [(ids[start:end], labels[start:end]) for start, end in zip(starts, ends, strict=True)]
    found = []
    for ids, labels, mask in zip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"].bool(), strict=True):
        found.append((ids[mask].tolist()[:-1], labels[mask].tolist()[1:]))
    return found


def sequence_of(row: TokenRow) -> tuple[list[int], list[int]]:
    """What `sequences_of` must find of a row."""
    return row.input_ids[:-1], row.labels[1:]


def _packing_row(row: TokenRow) -> TrainingRow:
    return TrainingRow(row.prompt_ids, row.completion_ids, (0.0,) * len(row.completion_ids), 0.0, row.name)


def _cells(rows: Sequence[TokenRow]) -> int:
    """Tokens with padding, rows in falling order of length."""
    return len(rows) * len(rows[0]) if rows else 0


def _check_fits(row: TokenRow, max_tokens: int) -> None:
    if len(row) > max_tokens:
        raise ValueError(
            f"{row.name} has {len(row)} tokens, more than micro_batch_tokens = {max_tokens}: raise micro_batch_tokens "
            "to max_length at least; no row is ever cut"
        )
