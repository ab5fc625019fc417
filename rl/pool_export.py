"""A pool as a file for other tools: chat messages or flat rows, JSON lines or Parquet, and a summary to look at.

    reason pool export POOL PROBLEMS --to FILE --format messages

Rows come in canonical order (by problem id, then by sample), so equal pools give equal files, and only one shard's
worth of them is in memory. `datasets.load_dataset("json", data_files=FILE)` (or `"parquet"`) reads them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from rl.faults import fault
from rl.pool_files import full_disk
from rl.pool_store import Pool
from rl.prompts import THINK_CLOSE, THINK_OPEN
from rl.types import Completion, Outcome, Problem, Verdict

PARQUET_ROWS = 2048  # in memory at once, and in a row group


@dataclass(frozen=True, slots=True)
class Judged:
    """One judged sample of a pool."""

    problem: Problem
    sample: int
    prompt_ids: tuple[int, ...]
    completion: Completion
    verdict: Verdict

    @property
    def correct(self) -> bool | None:
        """None: the judge could not decide."""
        return self.verdict.right if self.verdict.decided else None


Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Format:
    """A form of export: what a sample becomes, and how rows become bytes."""

    row: Callable[[Judged, str], Row]  # the sample and the prompt suffix
    write: Callable[[IO[bytes], Iterable[Row]], None]


def message_row(judged: Judged, suffix: str) -> Row:
    """A conversation of two messages, the thought kept.

    A template that opens `<think>` in the prompt leaves it out of the completion; here it is put back, since whoever
    reads the file does not see the prompt.

    Example: `{"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content":
    "<think>easy</think>4"}], "problem": "p1", "sample": 0, "correct": true, "num_tokens": 9}`
    """
    text = judged.completion.text
    if THINK_CLOSE in text and THINK_OPEN not in text:
        text = THINK_OPEN + text
    return {
        "messages": [
            {"role": "user", "content": judged.problem.text + suffix},
            {"role": "assistant", "content": text},
        ],
        "problem": judged.problem.id,
        "sample": judged.sample,
        "correct": judged.correct,
        "num_tokens": judged.completion.num_tokens,
    }


def flat_row(judged: Judged, suffix: str) -> Row:
    """Everything about a sample in one row: the question, the completion with its token ids, the verdict."""
    completion = judged.completion
    return {
        "problem": judged.problem.id,
        "sample": judged.sample,
        "question": judged.problem.text + suffix,
        "answer": judged.problem.answer,
        "text": completion.text,
        "correct": judged.correct,
        "outcome": str(judged.verdict.outcome),
        "reason": judged.verdict.reason,
        "num_tokens": completion.num_tokens,
        "finish_reason": str(completion.finish_reason),
        "policy_version": completion.policy_version,
        "prompt_ids": list(judged.prompt_ids),
        "token_ids": list(completion.token_ids),
        "sampler_logprobs": list(completion.sampler_logprobs),
    }


def write_lines(file: IO[bytes], rows: Iterable[Row]) -> None:
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n")


def write_parquet(file: IO[bytes], rows: Iterable[Row]) -> None:
    """The rows of `flat_row` as Parquet."""
    import pyarrow
    from pyarrow import parquet

    text, count = pyarrow.string(), pyarrow.int64()
    schema = pyarrow.schema(
        [("problem", text), ("sample", count), ("question", text), ("answer", text), ("text", text),
         ("correct", pyarrow.bool_()), ("outcome", text), ("reason", text), ("num_tokens", count),
         ("finish_reason", text), ("policy_version", count), ("prompt_ids", pyarrow.list_(count)),
         ("token_ids", pyarrow.list_(count)), ("sampler_logprobs", pyarrow.list_(pyarrow.float64()))]
    )  # fmt: skip
    waiting = iter(rows)
    with parquet.ParquetWriter(file, schema) as writer:
        while batch := list(islice(waiting, PARQUET_ROWS)):
            writer.write_table(pyarrow.Table.from_pylist(batch, schema))


FORMATS = {
    "messages": Format(message_row, write_lines),
    "rows": Format(flat_row, write_lines),
    "parquet": Format(flat_row, write_parquet),
}


def judged_samples(pool: Pool, problems: Sequence[Problem], verifier: str | None = None) -> Iterator[Judged]:
    """The judged samples of these problems in canonical order; `verifier` is by default the one that judged last.

    Errors: ValueError if no verifier, or not this one, has judged the whole pool.
    """
    known = pool.verifiers()
    if not known or verifier not in (None, *known):
        raise ValueError(
            f"{pool.folder} has not been judged by {verifier or 'any verifier'}; its verifiers: "
            f"{', '.join(known) or 'none'}. Judge it: reason rescore"
        )
    verdicts = pool.verdicts(verifier or known[-1])
    by_id = {problem.id: problem for problem in problems}
    for (problem, sample), prompt_ids, completion in pool.in_order():
        if problem in by_id:
            yield Judged(by_id[problem], sample, prompt_ids, completion, verdicts[problem, sample])


def export_pool(
    pool: Pool,
    problems: Sequence[Problem],
    path: Path,
    form: Format,
    verifier: str | None = None,
    right_only: bool = False,
    suffix: str = "",
) -> int:
    """Write the pool's samples of `problems` to `path`, whole or not at all; how many rows there are.

    `suffix` is what was appended to every question when the pool was sampled; a pool does not hold its text.

    Errors: ValueError if the file is there, if there is no row to write, and as `judged_samples`; OSError, PoolFull
    among them, with nothing left of the file.
    """
    if path.exists():
        raise ValueError(f"{path} is there and is never overwritten; move it away or name another file")
    count = 0  # rows so far

    def rows() -> Iterator[Row]:
        nonlocal count
        for judged in judged_samples(pool, problems, verifier):
            if judged.correct or not right_only:
                count += 1
                yield form.row(judged, suffix)

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with full_disk(path, pool.size()), temporary.open("wb") as file:
            form.write(file, rows())
            fault("write.temp")
            file.flush()
            os.fsync(file.fileno())
        if not count:
            what = "right sample" if right_only else "sample"
            raise ValueError(f"{pool.folder} holds no {what} of these {len(problems)} problems: nothing to export")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


# --- a summary --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PoolSummary:
    """What `reason pool show` shows.

    Example: 5 problems with 2 to 4 samples each, 18 in all, 1,204 tokens, {"stop": 17, "length": 1}, and verifiers
    {"tiny-1": {"right": 9, "wrong": 8, "undecided": 1}}.
    """

    address: dict[str, Any]
    num_problems: int
    fewest: int  # samples of a problem
    most: int
    num_samples: int
    num_shards: int
    tokens: int
    finish_reasons: dict[str, int]
    verifiers: dict[str, dict[str, int]]  # those that judged all, by outcome
    size: int  # bytes
    canonical_hash: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize_pool(pool: Pool) -> PoolSummary:
    """Read all of a pool and count."""
    reasons, tokens = Counter[str](), 0
    for _, _, completion in pool.samples():
        reasons[str(completion.finish_reason)] += 1
        tokens += completion.num_tokens
    held = Counter(key[0] for key in pool.keys_in_order())
    outcomes = {
        version: Counter(str(v.outcome) for v in pool.verdicts(version).values()) for version in pool.verifiers()
    }
    return PoolSummary(
        address=pool.address.to_json(),
        num_problems=len(held),
        fewest=min(held.values(), default=0),
        most=max(held.values(), default=0),
        num_samples=len(pool),
        num_shards=pool.num_shards,
        tokens=tokens,
        finish_reasons=dict(sorted(reasons.items())),
        verifiers={version: {str(o): counts[str(o)] for o in Outcome} for version, counts in outcomes.items()},
        size=pool.size(),
        canonical_hash=pool.canonical_hash(),
    )
