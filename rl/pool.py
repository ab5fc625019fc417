"""The rollout pool on disk: sample once, use for traces, shortest, pairs and evaluation.

    pool.json                          the address: what was sampled, from what, how
    samples-00000.jsonl                completions, a shard a file
    verdicts-<version>-00000.jsonl     what one version of the verifier says of the completions of shard 00000
    judging.jsonl                      a log: how long each shard's verdicts took, the slowest, the undecided

A pool is addressed by model, problems, template, sampling settings and seed, without the number of samples: asking for
16 where 8 are there draws the other 8. Verdicts lie beside the samples, so that a better verifier judges without
sampling. Every file is written whole and renamed into place, so a killed fill goes on with the next shard, and no
sample is there twice. Shards hold what was missing in a fixed order: a fill that was killed cuts the rest into the
same shards as one that was not, so a sampler that is reproducible per call makes the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from rl.jsonl import dump_lines, read_rows
from rl.judging import JUDGING, judge_attempts, judging_figures, notable_verdicts, verdict_of, verdict_row
from rl.prompts import render_prompt
from rl.runs import append_line, read_json, write_file, write_json
from rl.samplers.base import Sampler, SampleRequest, SamplingSettings, sample_seed
from rl.tasks.base import Task
from rl.types import Completion, FinishReason, Problem, Rollout, RolloutGroup, Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Key = tuple[str, int]  # (problem id, sample index)

SAMPLE_FIELDS = {
    "problem": str,
    "sample": int,
    "prompt_ids": list,
    "token_ids": list,
    "sampler_logprobs": list,
    "text": str,
    "finish_reason": str,
    "policy_version": int,
}
VERDICT_FIELDS = {"problem": str, "sample": int, "outcome": str, "reason": str, "failure": str}


@dataclass(frozen=True, slots=True)
class PoolAddress:
    """What a pool's samples are samples of. Two pools with one address hold draws from one distribution.

    Example: `PoolAddress("9a0f…", "5d41…", "77c3…", 1.0, 1.0, 160, 0)`; see `pool_address`.
    """

    model: str  # fingerprint of the model folder, or a hub id
    problems: str  # fingerprint of ids, questions and answers
    template: str  # fingerprint of the chat template and the prompt suffix
    temperature: float
    top_p: float
    max_tokens: int
    seed: int


def pool_address(
    model: str,
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    settings: SamplingSettings,
    seed: int,
    suffix: str = "",
) -> PoolAddress:
    """The address of the samples that `fill_pool` draws with the same arguments; `model` is its fingerprint.

    Errors: ValueError for a rule that stops repetitions: it has no place in the address.
    """
    if settings.stop_repetition is not None:
        raise ValueError(
            "a pool holds completions that nothing but their end or their limit has stopped; leave out stop_repetition"
        )
    asked = [[p.id, p.text, p.answer, p.spec] if p.spec else [p.id, p.text, p.answer] for p in problems]
    return PoolAddress(
        model=model,
        problems=_fingerprint(asked),
        template=_fingerprint([tokenizer.chat_template, suffix]),
        temperature=float(settings.temperature),
        top_p=float(settings.top_p),
        max_tokens=settings.max_tokens,
        seed=seed,
    )


class Pool:
    """An open pool. Use `Pool.open`; it keeps an index in memory and reads completions from disk when asked."""

    def __init__(self, folder: Path, address: PoolAddress) -> None:
        self.folder = folder
        self.address = address
        self._index: dict[Key, int] = {}  # what is there, and in which shard
        self._num_shards = 0

    @classmethod
    def open(cls, folder: Path, address: PoolAddress | None = None) -> Pool:
        """Open the pool in `folder`, or make an empty one there; without an address, open what is there.

        ValueError if the folder holds a pool with another address (the message names the field), or a damaged one.
        """
        path = folder / "pool.json"
        if path.is_file():
            stored = _read_address(path)
            for field in fields(PoolAddress) if address is not None else ():
                there, wanted = getattr(stored, field.name), getattr(address, field.name)
                if there != wanted:
                    raise ValueError(
                        f"{folder} holds samples with {field.name} = {there!r}, not {wanted!r}: "
                        "samples of two kinds cannot share a pool, use another folder"
                    )
            address = stored
        elif address is None:
            raise ValueError(f"{folder} holds no pool: pool.json is missing")
        else:
            write_json(path, asdict(address), "pool.address")
        pool = cls(folder, address)
        pool._read_index()
        return pool

    def __len__(self) -> int:
        """How many samples the pool holds."""
        return len(self._index)

    def missing(self, problems: Sequence[Problem], samples: int) -> list[tuple[Problem, int]]:
        """What a pool with `samples` completions of each problem lacks, by problem and then by sample index."""
        return [(p, i) for p in problems for i in range(samples) if (p.id, i) not in self._index]

    def add_shard(self, rows: Sequence[tuple[Problem, int, tuple[int, ...], Completion]]) -> None:
        """Write (problem, sample index, prompt ids, completion) rows as the next shard: all of them or none."""
        keys = [(problem.id, sample) for problem, sample, _, _ in rows]
        seen: set[Key] = set()
        for key in keys:
            if key in self._index or key in seen:
                raise ValueError(f"{self.folder}: sample {key[1]} of problem {key[0]} is already in the pool")
            seen.add(key)
        lines = dump_lines(_sample_row(*row) for row in rows)
        write_file(self._samples_path(self._num_shards), lines, "pool.shard")
        self._index.update(dict.fromkeys(keys, self._num_shards))
        self._num_shards += 1

    def judge(self, problems: Sequence[Problem], task: Task) -> None:
        """Write the verdicts that this version of the task's verifier has not yet given; shard by shard."""
        by_id = {problem.id: problem for problem in problems}
        for shard in range(self._num_shards):
            path = self._verdicts_path(shard, task.verifier_version)
            if path.is_file():
                continue
            samples = list(self._read_samples(shard))
            for (problem_id, _), _, _ in samples:
                if problem_id not in by_id:
                    raise ValueError(f"{self.folder} holds samples of {problem_id}, which is not among the problems")
            verdicts = judge_attempts(task, [(by_id[key[0]], completion) for key, _, completion in samples])
            judged = [(*key, verdict) for (key, _, _), verdict in zip(samples, verdicts, strict=True)]
            rows = [{"problem": problem, "sample": i, **verdict_row(verdict)} for problem, i, verdict in judged]
            write_file(path, dump_lines(rows), "pool.verdicts")
            figures = {name: round(value, 4) for name, value in judging_figures(verdicts).items()}
            line = {"verifier": task.verifier_version, "shard": shard, "verdicts": len(verdicts), **figures}
            append_line(self.folder / JUDGING, line | {"notable": notable_verdicts(judged)})

    def verifiers(self) -> list[str]:
        """The verifier versions that have judged every shard, the one that did so last at the end."""
        found: dict[str, list[Path]] = {}
        for path in self.folder.iterdir():
            if match := re.fullmatch(r"verdicts-(.+)-\d{5,}\.jsonl", path.name):
                found.setdefault(match.group(1), []).append(path)
        whole = {version: paths for version, paths in found.items() if len(paths) == self._num_shards}
        return sorted(whole, key=lambda version: (max(path.stat().st_mtime_ns for path in whole[version]), version))

    def samples(self) -> Iterator[tuple[str, int, Completion]]:
        """(problem id, sample index, completion) of everything there is, shard by shard."""
        for shard in range(self._num_shards):
            for (problem, sample), _, completion in self._read_samples(shard):
                yield problem, sample, completion

    def verdicts(self, version: str) -> dict[Key, Verdict]:
        """What one verifier version says of every sample; ValueError if it has not judged them all."""
        found: dict[Key, Verdict] = {}
        for shard in range(self._num_shards):
            found |= self._read_verdicts(shard, version)
        return found

    def groups(
        self, problems: Sequence[Problem], verifier_version: str, samples: int | None = None
    ) -> list[RolloutGroup]:
        """One judged group a problem, in order, with its samples 0..k-1 in order.

        `samples` is k; None takes as many as the pool holds of the best-sampled problem. ValueError, by name, if a
        problem lacks one of them or a verdict: a statistic over unequal groups would be wrong and look right.
        """
        if samples is None:
            samples = 1 + max((self._last_sample(problem.id) for problem in problems), default=-1)
        lacking = self.missing(problems, samples)
        if lacking:
            problem, sample = lacking[0]
            raise ValueError(
                f"{self.folder} lacks {len(lacking)} of {samples} samples x {len(problems)} problems, the first is "
                f"sample {sample} of problem {problem.id}: fill the pool first"
            )
        wanted = {(problem.id, sample) for problem in problems for sample in range(samples)}
        found: dict[Key, tuple[tuple[int, ...], Rollout]] = {}
        for shard in sorted({self._index[key] for key in wanted}):
            verdicts = self._read_verdicts(shard, verifier_version)
            for key, prompt_ids, completion in self._read_samples(shard):
                if key in wanted:
                    found[key] = (prompt_ids, Rollout(completion, verdicts[key]))
        return [self._group(problem, [found[problem.id, i] for i in range(samples)]) for problem in problems]

    def _group(self, problem: Problem, drawn: list[tuple[tuple[int, ...], Rollout]]) -> RolloutGroup:
        prompts = {prompt_ids for prompt_ids, _ in drawn}
        if len(prompts) > 1:
            raise ValueError(f"{self.folder}: problem {problem.id} was sampled from {len(prompts)} different prompts")
        return RolloutGroup(problem, next(iter(prompts), ()), tuple(rollout for _, rollout in drawn))

    def _last_sample(self, problem_id: str) -> int:
        sample = 0
        while (problem_id, sample) in self._index:
            sample += 1
        return sample - 1

    def _samples_path(self, shard: int) -> Path:
        return self.folder / f"samples-{shard:05d}.jsonl"

    def _verdicts_path(self, shard: int, version: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", version):
            raise ValueError(f"verifier version {version!r} cannot be part of a file name: use letters, digits, . _ -")
        return self.folder / f"verdicts-{version}-{shard:05d}.jsonl"

    def _read_index(self) -> None:
        names = {path.name for path in self.folder.iterdir() if re.fullmatch(r"samples-\d{5,}\.jsonl", path.name)}
        for shard in range(len(names)):
            if self._samples_path(shard).name not in names:
                raise ValueError(f"{self._samples_path(shard)} is missing, later shards are there: the pool is damaged")
            for key, _, _ in self._read_samples(shard):
                if key in self._index:
                    raise ValueError(f"{self._samples_path(shard)}: sample {key[1]} of {key[0]} is there twice")
                self._index[key] = shard
        self._num_shards = len(names)

    def _read_samples(self, shard: int) -> Iterator[tuple[Key, tuple[int, ...], Completion]]:
        for place, row in read_rows(self._samples_path(shard), SAMPLE_FIELDS):
            try:
                completion = Completion(
                    text=row["text"],
                    token_ids=tuple(row["token_ids"]),
                    sampler_logprobs=tuple(row["sampler_logprobs"]),
                    finish_reason=FinishReason(row["finish_reason"]),
                    policy_version=row["policy_version"],
                )
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            yield (row["problem"], row["sample"]), tuple(row["prompt_ids"]), completion

    def _read_verdicts(self, shard: int, version: str) -> dict[Key, Verdict]:
        path = self._verdicts_path(shard, version)
        if not path.is_file():
            raise ValueError(f"{path} is missing: verifier {version!r} has not judged these samples")
        verdicts: dict[Key, Verdict] = {}
        for place, row in read_rows(path, VERDICT_FIELDS):
            try:
                verdicts[row["problem"], row["sample"]] = verdict_of(row)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
        expected = {key for key, there in self._index.items() if there == shard}
        if verdicts.keys() != expected:
            key = min(verdicts.keys() ^ expected)
            raise ValueError(f"{path}: sample {key[1]} of problem {key[0]} has a verdict or a completion, not both")
        return verdicts


def fill_pool(
    pool: Pool,
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    task: Task,
    samples: int,
    settings: SamplingSettings,
    seed: int,
    suffix: str = "",
    shard_size: int = 512,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Draw what `samples` completions of each problem lack, `shard_size` a shard, and judge them.

    Sample i of a problem is drawn with the seed (`seed`, problem id, i), as `rl.rollout.sample_groups` does. Killed and
    called again, it goes on after the last whole shard. `progress(done, total)` counts samples.
    """
    wanted = (float(settings.temperature), float(settings.top_p), settings.max_tokens, seed)
    address = pool.address
    if wanted != (address.temperature, address.top_p, address.max_tokens, address.seed):
        raise ValueError(
            f"{pool.folder}: asked to sample with {settings} and seed {seed}, but its address is {address}"
        )
    lacking = pool.missing(problems, samples)
    total = samples * len(problems)
    done = total - len(lacking)
    progress(done, total)
    for start in range(0, len(lacking), shard_size):
        batch = lacking[start : start + shard_size]
        prompts = {problem.id: render_prompt(tokenizer, problem, suffix) for problem, _ in batch}
        requests = [SampleRequest(prompts[p.id], sample_seed(seed, p.id, i)) for p, i in batch]
        before = done
        completions = sampler.sample(
            requests, settings, lambda finished, before=before: progress(before + finished, total)
        )
        pool.add_shard([(p, i, prompts[p.id], c) for (p, i), c in zip(batch, completions, strict=True)])
        done += len(batch)
        progress(done, total)
    pool.judge(problems, task)


def _sample_row(
    problem: Problem, sample: int, prompt_ids: tuple[int, ...], completion: Completion
) -> dict[str, object]:
    return {
        "problem": problem.id,
        "sample": sample,
        "prompt_ids": list(prompt_ids),
        "token_ids": list(completion.token_ids),
        "sampler_logprobs": list(completion.sampler_logprobs),
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "policy_version": completion.policy_version,
    }


def _read_address(path: Path) -> PoolAddress:
    value = read_json(path)
    names = {field.name for field in fields(PoolAddress)}
    if not isinstance(value, dict) or value.keys() != names:
        raise ValueError(f"{path}: not a pool's address, which has the keys {sorted(names)}")
    return PoolAddress(**value)


def _fingerprint(value: object) -> str:
    return sha256(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:16]
