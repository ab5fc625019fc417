"""Logic and puzzles from reasoning-gym (2505.24760): generated here, scored in a sandbox.

    problems = puzzles(["knights_knaves", "mini_sudoku"], count=200, seed=0, difficulty=2)
    task = puzzle_task(find_sandbox)
    task.judge([(problems[0], completion)])   # [Verdict(Outcome.RIGHT)]

Which sets there are, and why others are blocked, stands in rl/tasks/puzzle_sets.py. Generating runs the package's code
on nothing but what it drew itself. Scoring runs it on what a model wrote, which for some sets means running what a
model wrote: so it happens in worker processes within a sandbox (rl/tasks/puzzle_worker.py), apart for each problem, and
without a sandbox no answer is judged.

The question says where the answer goes: between `<answer>` and `</answer>`. It is read after the last `</think>`, from
the last closed pair of tags, else from the last `\\boxed{...}`; an answer that is marked in neither way is none. Right
is what the set's own scorer gives 1.0. It gives partial credit too, for a grid with one wrong cell or a number that is
near, and all of that is wrong here: a verdict is no place for it. Some scorers overlook words beside the right answer.

What the scorer raises on an answer makes that answer wrong, since it has just scored the reference in the same process.
A reference that does not earn 1.0 is an undecided verdict, and so is a scorer that hangs or dies.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
import os
import re
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from rl.sandbox.base import Job, Limits, Sandbox, SandboxUnavailable
from rl.tasks import puzzle_worker
from rl.tasks.base import REFLECTION_WORDS, Attempt, Judge, Task
from rl.tasks.extraction import final_part, last_answer_tag, last_box, no_answer_reason
from rl.tasks.puzzle_sets import VERSION, PuzzleSet, PuzzlesRefused, look_up, require_gym
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, TextPart, Verdict
from rl.workers import Answer, Spawn, WorkerPool

SECONDS = 5.0  # for one answer; an ordinary one takes some milliseconds
INSTRUCTION = "\n\nThink first. Then put the final answer, and nothing else, between <answer> and </answer>."
_CHUNK = 100  # problems that one data set of the package makes
_MOST_REPEATS = 1_000  # of questions, one after the other, before a set is said to have no more
_LIFETIME = 10**6  # seconds of CPU time for a worker; its answers have their own limit
_PROCESSES = 4  # a worker and the child that scores


# --- problems --------------------------------------------------------------------------------------------------------


def puzzles(sets: str | Sequence[str], count: int, seed: int, difficulty: int = 1) -> list[Problem]:
    """`count` different problems, taken from the sets in turn; a set that is named twice gives two in each turn.

    The same arguments give the same problems in every process, and a greater count begins with those of a smaller one.
    Difficulty 1 is the lowest; a set that has fewer gives its highest, and `Problem.level` says which that is.
    `difficulties` says how many a set has. Takes milliseconds a problem for most sets, at worst two seconds.

    Example: `puzzles("gcd", 1, seed=0)` is the problem "gcd-d91faf32114d7ffd" of 752 and 131, with the answer "1", the
    level 1 and the source "puzzle:gcd".

    Errors: PuzzlesRefused for a set that is blocked or unknown or has too few problems, and without reasoning-gym;
    ValueError for a count or a difficulty below 1.
    """
    names = [sets] if isinstance(sets, str) else list(sets)
    if not names or count < 1 or difficulty < 1:
        raise ValueError(f"puzzles need a set, a count and a difficulty of at least 1: {names}, {count}, {difficulty}")
    chosen = {name: look_up(name) for name in names}
    require_gym()
    streams = {name: _different(chosen[name], seed, difficulty) for name in names}
    return [next(streams[name]) for name in itertools.islice(itertools.cycle(names), count)]


def difficulties(name: str) -> int:
    """How many difficulties a set has: `difficulties("mini_sudoku") == 5`. Errors: as `puzzles`."""
    return len(look_up(name).levels)


def _different(puzzle_set: PuzzleSet, seed: int, difficulty: int) -> Iterator[Problem]:
    """The problems of a set whose questions have not come before."""
    seen: set[str] = set()
    repeats = 0
    difficulty = puzzle_set.nearest(difficulty)
    for entry in _entries(puzzle_set, seed, difficulty):
        problem = _problem(puzzle_set, entry, difficulty)
        repeats = repeats + 1 if problem.id in seen else 0
        if repeats > _MOST_REPEATS:
            break
        if not repeats:
            seen.add(problem.id)
            yield problem
    raise PuzzlesRefused(
        f"the puzzle set {puzzle_set.name} has about {len(seen)} different problems of difficulty {difficulty}, and "
        "more were asked for: take fewer, a higher difficulty, or more sets"
    )


def _entries(puzzle_set: PuzzleSet, seed: int, difficulty: int) -> Iterator[Mapping[str, Any]]:
    """The set's own entries, without end, in chunks.

    The package seeds problem i of a data set with its seed + i, so that seeds 1 and 2 share all problems but one; some
    sets draw all of their problems at once, by their size. A hashed seed for each chunk of fixed size avoids both.
    """
    for chunk in itertools.count():
        name = f"{puzzle_set.name} {difficulty} {seed} {chunk}"
        start = int.from_bytes(sha256(name.encode()).digest()[:4], "big") >> 1  # some sets take 32 bits, with the index
        with _quiet():
            data_set = _data_set(puzzle_set, puzzle_set.levels[difficulty - 1], start)
        for index in range(_CHUNK):
            with _quiet():
                entry = data_set[index]
            yield entry


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Some sets print their progress, and one leaves its file open until it is collected."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield


def _data_set(puzzle_set: PuzzleSet, level: int, seed: int) -> Any:
    """A data set of the package at one level of its curriculum."""
    from reasoning_gym.coaching.base_curriculum import DefaultCurriculumContext, RangeAttributeMode
    from reasoning_gym.factory import CURRICULA, DATASETS

    data_set, configuration = DATASETS[puzzle_set.name]
    settings = {"seed": seed, "size": _CHUNK}
    if puzzle_set.name not in CURRICULA:
        return data_set(configuration(**settings))
    curriculum: Any = CURRICULA[puzzle_set.name]
    at_level = curriculum()
    at_level.set_global_level(level)
    # By default a level's ranges begin where those of level 0 do.
    this_level_alone = DefaultCurriculumContext(RangeAttributeMode.UPPER_BOUND)
    return data_set(at_level.generate_configuration(settings, this_level_alone))


def _problem(puzzle_set: PuzzleSet, entry: Mapping[str, Any], difficulty: int) -> Problem:
    question = entry["question"].strip()
    needed = {key: entry["metadata"][key] for key in puzzle_set.reads if key in entry["metadata"]}
    return Problem(
        id=f"{puzzle_set.name}-{sha256(question.encode()).hexdigest()[:16]}",
        question=(TextPart(question + INSTRUCTION),),
        answer=entry["answer"],
        source=f"puzzle:{puzzle_set.name}",
        level=difficulty,
        spec=json.dumps({"set": puzzle_set.name, "metadata": needed}, ensure_ascii=False),
    )


# --- verdicts --------------------------------------------------------------------------------------------------------


def extract(completion: Completion) -> str | None:
    """The answer that a completion marks, without the blanks around it; None if it marks none.

    "<think>...</think> <answer>3 1\\n1 3</answer>" gives "3 1\\n1 3", "</think>\\boxed{5}" gives "5", and a box that
    fills the tags is opened too.
    """
    text = completion.text
    if completion.finish_reason is not FinishReason.STOP and "</think>" not in text:
        return None
    final = final_part(text)
    if final is None:
        return None
    marked = last_answer_tag(final)
    if marked is None:
        marked = last_box(final)
    elif re.fullmatch(r"\s*\\boxed\s*\{.*\}\s*", marked, re.DOTALL):
        marked = last_box(marked)
    return None if marked is None else marked.strip() or None


def answer_of(text: str) -> str | None:
    """The final answer for majority votes, however it is spaced."""
    answer = extract(Completion(text, (), (), FinishReason.STOP))
    return None if answer is None else " ".join(answer.split())


def longest_answer(gold: str) -> int:
    """Characters of an answer that are still looked at: `longest_answer("x" * 50) == 1100`."""
    return 1_000 + 2 * len(gold)


def puzzle_task(sandbox: Callable[[], Sandbox], *, workers: int | None = None, timeout: float = SECONDS) -> Task:
    """The task "puzzles". `sandbox` is asked for each worker that is started (`rl.sandbox.ladder.find_sandbox`, which
    remembers); `timeout` is in seconds for one answer; there is a worker for each CPU unless `workers` says how many.

    Errors: PuzzlesRefused without reasoning-gym.
    """
    require_gym()
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    spawn, most = sandboxed_worker(sandbox, timeout), puzzle_worker.request_seconds(timeout)
    pool = WorkerPool(spawn, workers=workers, timeout=most)
    return Task("puzzles", judge_with(pool.ask), answer_of, f"puzzles-1-reasoning-gym-{VERSION}", REFLECTION_WORDS)


def sandboxed_worker(sandbox: Callable[[], Sandbox], timeout: float) -> Spawn:
    """How `rl.tasks.puzzle_worker` is started in a sandbox."""
    limits = Limits(cpu_seconds=_LIFETIME, memory_bytes=puzzle_worker.MEMORY, processes=_PROCESSES, file_bytes=1 << 20)
    job = Job(("python", "-m", puzzle_worker.__name__, str(timeout)), limits=limits, packages=imported_folders())

    def spawn() -> subprocess.Popen[bytes]:
        try:
            return sandbox().start(job)
        except SandboxUnavailable as error:
            raise OSError(str(error)) from error  # as of any other process that cannot be started

    return spawn


def imported_folders() -> tuple[Path, ...]:
    """What a worker sees of this machine: the folder with reasoning-gym, and the one with this package."""
    package = importlib.util.find_spec("reasoning_gym")
    if package is None or package.origin is None:
        raise PuzzlesRefused("there is no package reasoning_gym")
    return tuple(dict.fromkeys([Path(package.origin).resolve().parents[1], Path(__file__).resolve().parents[2]]))


def judge_with(ask: Callable[[Sequence[Any]], list[Answer]]) -> Judge:
    """A judge whose answers are scored by workers: `ask` is `WorkerPool.ask`."""

    def judge(attempts: Sequence[Attempt]) -> list[Verdict]:
        """One verdict an attempt. The answers to a problem go together, and equal ones are scored once."""
        found: dict[int, Verdict] = {}
        waiting: dict[Problem, dict[str, list[int]]] = {}
        for index, (problem, completion) in enumerate(attempts):
            answer = extract(completion)
            try:
                _puzzle(problem)
            except PuzzlesRefused as refusal:
                found[index] = Verdict.undecided(JudgeFailure.UNPARSEABLE_GOLD, f"problem {problem.id}: {refusal}")
                continue
            if answer is None:
                found[index] = Verdict(Outcome.WRONG, no_answer_reason(completion))
            elif len(answer) > longest_answer(problem.answer):
                found[index] = Verdict(Outcome.WRONG, f"an answer of {len(answer):,} characters is none")
            else:
                waiting.setdefault(problem, {}).setdefault(answer, []).append(index)
        asked = [(problem, some) for problem, answers in waiting.items() for some in _parts([*answers])]
        replies = ask([_puzzle(problem) | {"answers": answers} for problem, answers in asked])
        for (problem, answers), reply in zip(asked, replies, strict=True):
            for answer, verdict in zip(answers, _verdicts(reply, problem.answer, answers), strict=True):
                first, *others = waiting[problem][answer]
                found[first] = verdict
                found |= {index: replace(verdict, seconds=0.0) for index in others}  # its time counts once
        return [found[index] for index in range(len(attempts))]

    return judge


def _puzzle(problem: Problem) -> dict[str, Any]:
    """What a worker is told of a problem. Errors: PuzzlesRefused for no puzzle, or one of a set that is not used."""
    try:
        spec = json.loads(problem.spec)
    except ValueError:
        spec = None
    match spec:
        case {"set": str(name), "metadata": dict(metadata)}:
            look_up(name)
            return {"set": name, "gold": problem.answer, "metadata": metadata}
    raise PuzzlesRefused('it is no puzzle: its spec is not {"set": name, "metadata": {...}}')


def _parts(answers: list[str]) -> Iterator[list[str]]:
    """The answers in parts of at most `puzzle_worker.MOST_ANSWERS`."""
    for start in range(0, len(answers), puzzle_worker.MOST_ANSWERS):
        yield answers[start : start + puzzle_worker.MOST_ANSWERS]


def _verdicts(reply: Answer, gold: str, answers: Sequence[str]) -> list[Verdict]:
    """One verdict an answer of one request."""
    if reply.failure is not None:
        undecided = Verdict.undecided(reply.failure, f"{reply.reason}, on {answers[0][:80]!r}")
        return [replace(undecided, seconds=reply.seconds / len(answers))] * len(answers)
    said = reply.value if isinstance(reply.value, list) else []
    if len(said) != len(answers):
        return [Verdict.undecided(JudgeFailure.CRASH, "the worker said something that is no score")] * len(answers)
    return [_verdict(one, gold, answer) for one, answer in zip(said, answers, strict=True)]


def _verdict(said: Any, gold: str, answer: str) -> Verdict:
    nonsense = Verdict.undecided(JudgeFailure.CRASH, "the worker said something that is no score")
    against = f"answered {answer[:80]!r}, expected {gold[:80]!r}"
    match said:
        case {"seconds": float(seconds), **what}:
            pass
        case _:
            return nonsense
    match what:
        case {"failure": "timeout" | "crash" as failure, "reason": str(reason)}:
            verdict = Verdict.undecided(JudgeFailure(failure), f"{reason}, on {answer[:80]!r}")
        case {"gold": 1.0, "score": 1.0}:
            verdict = Verdict(Outcome.RIGHT)
        case {"gold": 1.0, "score": float(score)}:
            verdict = Verdict(Outcome.WRONG, f"{against} (score {score:.2g})")
        case {"gold": 1.0, "unreadable": str(why)}:
            verdict = Verdict(Outcome.WRONG, f"{against} ({why})")
        case {"gold": float(score)}:
            why = f"the reference {gold[:80]!r} itself earns {score:.2g}"
            verdict = Verdict.undecided(JudgeFailure.UNPARSEABLE_GOLD, why)
        case _:
            return nonsense
    return replace(verdict, seconds=seconds)
