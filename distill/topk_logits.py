"""A teacher's next-token distributions on disk: its k likeliest tokens at every position of a trace, and the rest.

For distillation without the teacher beside the student (DistillKit stores logits so; GKD, arXiv 2306.13649, is the
divergence). Of every completion token, EOS included, the file holds the ids and log-probs of the k likeliest tokens
and the log of the mass that all others have together, the *tail*.

The divergence is that of k + 1 events, the k tokens and "any other token", for teacher and student alike. Nothing is
renormalised: a student that puts mass outside the k tokens pays for what exceeds the teacher's tail. So it is defined
for reverse KL too, which over the k tokens alone would reward leaving them. Merging events only ever lowers a
divergence, so the figure is a lower bound of the full one, and with k the whole vocabulary it is the full one.
Deviation: DistillKit fits a polynomial to all but the first tokens and spreads what is missing evenly; we do neither.

A token costs 6k + 8 bytes with fp16 log-probs: 392 for k = 64, so 392 GB for a billion tokens. fp16 moves a log-prob
by at most one part in 2,048; what rounding took from the sum is given back when a row is read.

    traces.jsonl               the rows that were scored
    logits-00000.safetensors   `ids` (M, k) int32, `logprobs` (M, k), `tail` (M,), `token_ids` (M,), of rows end to end
    logits.json                written last: k, vocabulary, temperature, the teacher's stop ids, rows of each shard

A killed run goes on with the first shard that is missing; the bytes are those of an uninterrupted one.

Line: `reason distill RECIPE`, a stage with `method: teacher_logits`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from distill.divergence import CHUNK_TOKENS, OutputLayer, chunked, divergence
from rl.packing import by_prompt, pack, plan_micro_batches
from rl.rows import TrainingRow
from rl.runs import read_json, write_file, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rl.policy import PolicyModel

MANIFEST = "logits.json"


@dataclass(frozen=True, slots=True)
class TopK:
    """The k likeliest tokens at M positions, and the mass of all others.

    Example: (.5, .3, .15, .05) with k 2: ids (0, 1), logprobs (log .5, log .3), tail log .2.
    """

    ids: torch.Tensor  # (M, k)
    logprobs: torch.Tensor  # (M, k), nats, falling
    tail: torch.Tensor  # (M,), nats, fp32; −∞ where k is the whole vocabulary

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: slice) -> TopK:
        return TopK(self.ids[place], self.logprobs[place], self.tail[place])

    def to(self, device: torch.device) -> TopK:
        """On a device, as a loss reads it: int64 ids, fp32 log-probs."""
        return TopK(self.ids.to(device, torch.long), self.logprobs.to(device, torch.float32), self.tail.to(device))


def join(parts: Sequence[TopK]) -> TopK:
    """The positions of all parts, at least one, one after the other."""
    return TopK(*(torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "logprobs", "tail")))


def top_k(logprobs: torch.Tensor, k: int) -> TopK:
    """The k likeliest tokens of log-probs (M, V); ValueError for a k that V has not."""
    if not 1 <= k <= logprobs.shape[-1]:
        raise ValueError(f"top_k = {k}, but the vocabulary has {logprobs.shape[-1]} tokens: take 1 to so many")
    best = logprobs.topk(k)
    return TopK(best.indices, best.values, _tail(logprobs, best.indices))


def _tail(logprobs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The log of the mass outside `ids` (M, k): exact also where it is far below the rounding of 1."""
    return logprobs.scatter(-1, ids, -math.inf).logsumexp(-1)


def top_k_divergence(teacher: TopK, student: torch.Tensor, beta: float = 0.0) -> torch.Tensor:
    """D_β(T‖S) over the teacher's k tokens and one tail, (M,) in nats; `student` are its log-probs (M, V).

    Example: T (.5, .3, .15, .05) with k 2 and S uniform: forward KL of (.5, .3, .2) and (.25, .25, .5) is .218012 (of
    all four tokens .244174).
    """
    found = student.gather(-1, teacher.ids)
    wanted = teacher.logprobs.float()
    if teacher.ids.shape[-1] < student.shape[-1]:  # else there is no other token, whose tail has no gradient
        found = torch.cat([found, _tail(student, teacher.ids).unsqueeze(-1)], -1)
        wanted = torch.cat([wanted, teacher.tail.unsqueeze(-1)], -1)
    return divergence(wanted.log_softmax(-1), found, beta)


# --- scoring ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TeacherTopK:
    """The k likeliest tokens of a teacher at every completion token of rows: a `ScoreTopK`."""

    policy: PolicyModel
    k: int
    vocab: int
    temperature: float = 1.0
    micro_batch_tokens: int = 16_384
    chunk_tokens: int = CHUNK_TOKENS

    @torch.no_grad()
    def __call__(self, rows: Sequence[TrainingRow]) -> list[TopK]:
        """On the CPU, in the order of `rows`. Errors: FloatingPointError that names a row whose scores are not
        finite."""
        head = self.policy.model.get_output_embeddings()
        assert isinstance(head, torch.nn.Linear)
        layer = OutputLayer(head.weight, head.bias, self.policy.transform, self.vocab, self.temperature)
        place = {id(row): position for position, row in enumerate(rows)}
        found: dict[int, TopK] = {}
        for chunk in plan_micro_batches(rows, self.micro_batch_tokens)[0]:
            batch = pack(chunk, head.weight.device)
            hidden = self.policy.hidden(batch).index_select(0, batch.scored)
            best = self._of_hidden(hidden, layer)
            ordered = [row for members in by_prompt(chunk) for row in members]  # as `pack` lays them out
            ends = accumulate((row.num_tokens for row in ordered), initial=0)
            for row, (start, end) in zip(ordered, pairwise(ends), strict=True):
                if not torch.isfinite(best.logprobs[start:end]).all():
                    raise FloatingPointError(f"row {row.name}: the teacher's log-probs are not finite")
                found[place[id(row)]] = best[start:end]
        return [found[i] for i in range(len(rows))]

    def _of_hidden(self, hidden: torch.Tensor, layer: OutputLayer) -> TopK:
        parts: list[TopK] = []

        def keep(logprobs: torch.Tensor, place: slice) -> torch.Tensor:
            best = top_k(logprobs, self.k)
            parts.append(TopK(best.ids.cpu(), best.logprobs.cpu(), best.tail.cpu()))
            return best.tail

        chunked(hidden, layer, keep, self.chunk_tokens)
        return join(parts)


def used_vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest id that the tokenizer knows; an output layer may have more rows."""
    return max(tokenizer.get_vocab().values()) + 1


# --- files ------------------------------------------------------------------------------------------------------------

ScoreTopK = Callable[[Sequence[TrainingRow]], list[TopK]]


@dataclass(frozen=True, slots=True)
class LogitFacts:
    """What stored logits are logits of."""

    teacher: str
    k: int
    vocab: int  # ids 0 … vocab − 1 are compared
    temperature: float  # of the teacher's softmax; the student's is the same
    stops: tuple[int, ...]  # ids that end the teacher's completions


def write_logits(
    folder: Path,
    rows: Sequence[TrainingRow],
    score: ScoreTopK,
    facts: LogitFacts,
    *,
    dtype: torch.dtype = torch.float16,
    shard_rows: int = 256,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Score `rows` and write shards of `shard_rows` rows, then the manifest, whose content is returned.

    Shards that are there already, of these rows, are kept. Example: 600 rows in shards of 256: 256, 256 and 88.

    Errors: ValueError for no rows; what `score` raises.
    """
    if not rows:
        raise ValueError("there are no rows to score")
    shards = []
    for number, start in enumerate(range(0, len(rows), shard_rows)):
        name = f"logits-{number:05}.safetensors"
        part = rows[start : start + shard_rows]
        if not _holds(folder / name, part, facts.k, dtype):
            write_file(folder / name, _shard(part, join(score(part)), dtype), "logits.shard")
        shards.append({"name": name, "tokens": [row.num_tokens for row in part]})
        report(start + len(part), len(rows))
    tokens = sum(row.num_tokens for row in rows)
    manifest = {
        "teacher": facts.teacher,
        "k": facts.k,
        "vocab": facts.vocab,
        "temperature": facts.temperature,
        "stops": list(facts.stops),
        "dtype": str(dtype).removeprefix("torch."),
        "rows": len(rows),
        "tokens": tokens,
        "shards": shards,
    }
    write_json(folder / MANIFEST, manifest, "logits.manifest")
    return manifest


def _shard(rows: Sequence[TrainingRow], best: TopK, dtype: torch.dtype) -> bytes:
    tensors = {
        "ids": best.ids.to(torch.int32),
        "logprobs": best.logprobs.to(dtype),
        "tail": best.tail.float(),
        "token_ids": _token_ids(rows),
    }
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def _token_ids(rows: Sequence[TrainingRow]) -> torch.Tensor:
    return torch.tensor([token for row in rows for token in row.token_ids], dtype=torch.int32)


def _holds(path: Path, rows: Sequence[TrainingRow], k: int, dtype: torch.dtype) -> bool:
    """Whether a shard that an earlier run wrote is the one that would be written; it is whole if it is there."""
    if not path.is_file():
        return False
    with safe_open(path, framework="pt") as shard:
        token_ids, logprobs = shard.get_tensor("token_ids"), shard.get_slice("logprobs")
        return torch.equal(token_ids, _token_ids(rows)) and logprobs[:0].shape == (0, k) and logprobs[:0].dtype == dtype


class TeacherLogits:
    """The stored logits of a folder, row by row: row i is trace i of its `traces.jsonl`.

    Errors: ValueError for a folder without a manifest, and for a shard that has not the rows which it names.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / MANIFEST).is_file():
            raise ValueError(f"{folder} has no {MANIFEST}: it is not what a teacher_logits stage writes")
        self.folder, found = folder, read_json(folder / MANIFEST)
        self.facts = LogitFacts(
            found["teacher"], found["k"], found["vocab"], found["temperature"], tuple(found["stops"])
        )
        self._places = [
            (shard["name"], start, end)
            for shard in found["shards"]
            for start, end in pairwise(accumulate(shard["tokens"], initial=0))
        ]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, row: int) -> TopK:
        """The distributions at a row's completion tokens, as they were stored."""
        return TopK(*self._read(row, "ids", "logprobs", "tail"))

    def token_ids(self, row: int) -> tuple[int, ...]:
        """The completion of a row as the teacher read it, EOS included."""
        (found,) = self._read(row, "token_ids")
        return tuple(found.tolist())

    def _read(self, row: int, *names: str) -> Iterator[torch.Tensor]:
        name, start, end = self._places[row]
        with safe_open(self.folder / name, framework="pt") as shard:
            for tensor in names:
                found = shard.get_slice(tensor)[start:end]
                if len(found) != end - start:
                    raise ValueError(f"{self.folder / name} has not the {end} tokens that {MANIFEST} names")
                yield found
