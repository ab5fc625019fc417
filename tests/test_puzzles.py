"""Puzzles: what is generated, what is refused, and that nothing but the right answer earns anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from rl.judging import JudgeFailed, judge_attempts
from rl.sandbox.base import Ended, Job, Limits, Sandbox, SandboxUnavailable
from rl.sandbox.ladder import find_sandbox
from rl.tasks import puzzle_sets, puzzle_worker
from rl.tasks.base import Task
from rl.tasks.puzzle_sets import BLOCKED, OPEN, PuzzlesRefused, look_up, require_gym
from rl.tasks.puzzle_worker import scored
from rl.tasks.puzzles import (
    INSTRUCTION,
    answer_of,
    difficulties,
    extract,
    imported_folders,
    judge_with,
    longest_answer,
    puzzle_task,
    puzzles,
    sandboxed_worker,
)
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, TextPart, Verdict
from rl.workers import Answer, WorkerPool, python_worker

SEEDS = ((0, 1), (1, 2), (2, 1))  # seed, difficulty


def completion(answer: str, finish: FinishReason = FinishReason.STOP) -> Completion:
    return Completion(f"so it is </think> <answer>{answer}</answer>", (), (), finish)


def puzzle(name: str, gold: str, **values: object) -> Problem:
    return Problem(name, (TextPart("?"),), gold, spec=json.dumps({"set": name, "metadata": values}))


@pytest.fixture(scope="module")
def made() -> dict[str, list[Problem]]:
    """Three problems of each set: of three seeds and two difficulties."""
    return {name: [puzzles(name, 1, seed, level)[0] for seed, level in SEEDS] for name in OPEN}


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    """Two workers in the sandbox."""
    pool = WorkerPool(sandboxed_worker(find_sandbox, 5.0), workers=2, timeout=puzzle_worker.request_seconds(5.0))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def task(pool: WorkerPool) -> Task:
    return replace(puzzle_task(find_sandbox), judge=judge_with(pool.ask))


@pytest.fixture(scope="module")
def outcomes(task: Task) -> Callable[[list[tuple[Problem, str]]], list[Outcome]]:
    def judge(answers: list[tuple[Problem, str]]) -> list[Outcome]:
        return [v.outcome for v in judge_attempts(task, [(problem, completion(given)) for problem, given in answers])]

    return judge


# --- the table -------------------------------------------------------------------------------------------------------


def test_every_set_of_the_package_is_used_or_blocked_with_a_reason():
    from reasoning_gym.factory import DATASETS

    assert metadata.version("reasoning-gym") == puzzle_sets.VERSION
    assert len(DATASETS) == 106 and set(OPEN) | set(BLOCKED) == set(DATASETS)
    assert (len(OPEN), len(BLOCKED), set(OPEN) & set(BLOCKED)) == (69, 37, set())
    assert all(10 < len(reason) < 120 for reason in BLOCKED.values())


def test_blocked_and_unknown_sets_are_refused_by_name():
    for name in BLOCKED:
        with pytest.raises(PuzzlesRefused, match=f"the puzzle set {name} is blocked: .{{10}}"):
            puzzles(name, 1, seed=0)
    with pytest.raises(PuzzlesRefused, match=r"no puzzle set 'knight_knaves'; did you mean knights_knaves\?"):
        puzzles(["gcd", "knight_knaves"], 1, seed=0)
    with pytest.raises(PuzzlesRefused, match=r"no puzzle set '\?\?'; the sets are ab, acre, "):
        difficulties("??")


def test_a_missing_or_another_package_is_refused_with_the_command_that_helps(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    for version, message in (
        (missing, "need reasoning-gym: pip"),
        (lambda name: "0.1.26", "0.1.25, .* not 0.1.26: pip"),
    ):
        monkeypatch.setattr(metadata, "version", version)
        for call in (require_gym, lambda: puzzles("gcd", 1, seed=0), lambda: puzzle_task(find_sandbox)):
            with pytest.raises(PuzzlesRefused, match=message) as refused:
                call()
            assert "pip install 'reason[puzzles]'" in str(refused.value)


def test_the_modules_import_neither_the_package_nor_torch():
    script = "import sys, rl.tasks.puzzles; print({'reasoning_gym', 'torch', 'numpy', 'sympy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# --- problems --------------------------------------------------------------------------------------------------------


def test_a_problem_says_what_it_is_and_where_its_answer_goes(made: dict[str, list[Problem]]):
    for name, problems in made.items():
        for problem, (_, difficulty) in zip(problems, SEEDS, strict=True):
            assert problem.id.startswith(f"{name}-") and problem.source == f"puzzle:{name}"
            assert problem.level == min(difficulty, difficulties(name))
            assert problem.text.endswith(INSTRUCTION) and "<answer>" in INSTRUCTION
            assert problem.answer == problem.answer.strip() != ""
            spec = json.loads(problem.spec)
            assert spec["set"] == name and set(spec["metadata"]) <= set(look_up(name).reads)


def test_worked_examples():
    (problem,) = puzzles("gcd", 1, seed=0)
    assert (problem.id, problem.answer, problem.level, problem.source) == ("gcd-d91faf32114d7ffd", "1", 1, "puzzle:gcd")
    assert "numbers: 752, 131." in problem.text and problem.spec == '{"set": "gcd", "metadata": {}}'
    assert look_up("modulo_grid").levels[2 - 1] == 2 and look_up("acre").nearest(9) == 1
    assert puzzle_worker.request_seconds(5.0) == 68.0
    assert puzzle_worker.with_tuples({"output": [[1, 2]]}) == {"output": ((1, 2),)}


def test_the_same_seed_makes_the_same_problems_in_another_process(made: dict[str, list[Problem]]):
    """Strings hash differently there, so that whatever walks through a set of them gives itself away."""
    script = """
        import sys
        from rl.tasks.puzzle_sets import OPEN
        from rl.tasks.puzzles import puzzles
        for name in OPEN:
            problem = puzzles(name, 1, 0, 1)[0]
            sys.stdout.write(ascii((problem.id, problem.answer, problem.spec)) + "\\n")
    """
    run = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": "77"})
    here = [ascii((problem.id, problem.answer, problem.spec)) for problem, *_ in made.values()]
    assert done.stdout.splitlines() == here


def test_other_seeds_and_difficulties_make_other_problems(made: dict[str, list[Problem]]):
    for name, problems in made.items():
        assert len({problem.id for problem in problems}) == 3, name


def test_neighbouring_seeds_share_nothing():
    """The package's own seeds 1 and 2 share all problems but one."""
    ids = [{problem.id for problem in puzzles("mini_sudoku", 40, seed, 3)} for seed in (1, 2)]
    assert [len(found) for found in ids] == [40, 40] and not ids[0] & ids[1]


@pytest.mark.parametrize("name", ["chain_sum", "acre", "leg_counting"])  # acre draws all of a data set at once
def test_more_problems_begin_with_the_fewer_and_none_comes_twice(name: str):
    few, many = puzzles(name, 90, seed=5), puzzles(name, 105, seed=5)
    assert many[:90] == few and len({problem.id for problem in many}) == 105


def test_a_mixture_takes_its_sets_in_turn():
    mixed = puzzles(["gcd", "ab", "gcd"], 6, seed=3)
    assert [problem.source for problem in mixed] == ["puzzle:gcd", "puzzle:ab", "puzzle:gcd"] * 2
    assert [p for p in mixed if p.source == "puzzle:gcd"] == puzzles("gcd", 4, seed=3)


def test_a_set_without_more_problems_says_so():
    with pytest.raises(PuzzlesRefused, match="products has about 100 different problems of difficulty 1, and more"):
        puzzles("products", 101, seed=0)


def test_difficulties_are_levels_that_the_set_can_make():
    assert (difficulties("mini_sudoku"), difficulties("acre"), difficulties("caesar_cipher")) == (5, 1, 2)
    easy, hard = puzzles("chain_sum", 1, seed=0)[0], puzzles("chain_sum", 1, seed=0, difficulty=11)[0]
    assert hard.text.count("+") + hard.text.count("-") > easy.text.count("+") + easy.text.count("-")
    assert puzzles("acre", 1, seed=0, difficulty=9)[0].level == 1
    for sets, count, difficulty in (([], 1, 1), ("gcd", 0, 1), ("gcd", 1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            puzzles(sets, count, 0, difficulty)


def test_generating_prints_nothing(capfd: pytest.CaptureFixture[str]):
    puzzles("bf", 2, seed=0)  # reports its progress
    assert capfd.readouterr().out == ""


# --- scores ----------------------------------------------------------------------------------------------------------


def test_every_reference_is_right_and_junk_and_echoes_are_wrong_for_every_set(
    made: dict[str, list[Problem]], outcomes: Callable[[list[tuple[Problem, str]]], list[Outcome]]
):
    problems = [problem for of_a_set in made.values() for problem in of_a_set]
    assert outcomes([(problem, problem.answer) for problem in problems]) == [Outcome.RIGHT] * len(problems)
    junk = [
        (problem, given)
        for problem in problems
        for given in ("qwerty 99", problem.text.removesuffix(INSTRUCTION), "nan nan", "[]", "  ")
    ]
    right = [given for given, outcome in zip(junk, outcomes(junk), strict=True) if outcome is not Outcome.WRONG]
    assert not right


def test_the_scorers_pay_nothing_for_an_empty_answer(made: dict[str, list[Problem]], pool: WorkerPool):
    """An empty answer is wrong before it is scored; nor would a scorer take it."""
    asked = [json.loads(of[0].spec) | {"gold": of[0].answer, "answers": [""]} for of in made.values()]
    scores = [said for reply in pool.ask(asked) for said in reply.value]
    assert len(scores) == len(OPEN) and all(said["gold"] == 1.0 and said.get("score", 0.0) < 1.0 for said in scores)


def test_partial_credit_is_wrong(outcomes: Callable[[list[tuple[Problem, str]]], list[Outcome]]):
    problem = puzzles("mini_sudoku", 1, seed=0)[0]
    cells = problem.answer.split(" ")
    other = "1" if cells[0] != "1" else "2"
    near = " ".join([other, *cells[1:]])  # 15 of 16 cells: the set itself gives .9 x 15/16
    assert outcomes([(problem, near), (problem, problem.answer), (problem, problem.answer + "\n")]) == [
        Outcome.WRONG, Outcome.RIGHT, Outcome.RIGHT,
    ]  # fmt: skip
    backwards = puzzle("spell_backward", "tac")
    assert outcomes([(backwards, "tac"), (backwards, "tacs"), (backwards, "taco taco")])[1:] == [Outcome.WRONG] * 2


def test_what_is_verified_need_not_be_the_reference(outcomes: Callable[[list[tuple[Problem, str]]], list[Outcome]]):
    # SEND + MORE has one solution with distinct letters, but A + B = C has many: 1 + 2 = 3 is the reference.
    problem = puzzle(
        "cryptarithm", "A=1,B=2,C=3", words_letters=["A", "B"], result_letters="C", allow_leading_zero=False
    )
    answers = ["A=1,B=2,C=3", "C=7,A=3,B=4", "A=1,B=2,C=4", "A=1,B=1,C=2"]
    assert outcomes([(problem, given) for given in answers]) == [
        Outcome.RIGHT, Outcome.RIGHT, Outcome.WRONG, Outcome.WRONG,
    ]  # fmt: skip


PAYLOADS = (
    "__import__('pathlib').Path('ran').touch()",
    "[[__import__('pathlib').Path('ran').touch()]]",
    "A=__import__('pathlib').Path('ran').touch(), 1",
    "1/__import__('pathlib').Path('ran').touch()",
)
INSIDE = """
import json, os, sys
sys.stdout = sys.stderr  # scorers print
from reasoning_gym.factory import DATASETS
from rl.tasks import puzzle_sets, puzzle_worker
said = {"worked": [], "refused": [], "scored": 0}
work = json.load(open("work.json"))
control = DATASETS["n_queens"][0](DATASETS["n_queens"][1](seed=0, size=1))
for payload in work["payloads"]:
    control.score_answer(payload, control[0])
    if os.path.exists("ran"):
        said["worked"].append(payload)
        os.remove("ran")
for name, gold, metadata in work["problems"]:
    try:
        request = {"set": name, "gold": gold, "metadata": metadata, "answers": work["payloads"]}
        said["scored"] += len(puzzle_worker.answer(request, 5.0))
    except puzzle_sets.PuzzlesRefused:
        said["refused"].append(name)
said["files"] = sorted(name for name in os.listdir(".") if name[0] != ".")  # matplotlib keeps a cache
os.write(1, json.dumps(said).encode())
"""


def test_no_payload_runs_in_any_set_blocked_ones_included(made: dict[str, list[Problem]]):
    """Each payload would leave a file. They do where a blocked set's scorer is called by hand."""
    problems = [[name, of[0].answer, json.loads(of[0].spec)["metadata"]] for name, of in made.items()]
    problems += [[name, "x", {}] for name in BLOCKED]
    files = {"main.py": INSIDE.encode(), "work.json": json.dumps({"problems": problems, "payloads": PAYLOADS}).encode()}
    limits = Limits(wall_seconds=60, cpu_seconds=60, memory_bytes=puzzle_worker.MEMORY)
    result = find_sandbox().run(Job(("python", "main.py"), files, limits=limits, packages=imported_folders()))
    assert result.ended is Ended.EXITED and result.exit_code == 0, result.stderr[-2000:]
    said = json.loads(result.stdout)
    assert said["worked"] == [PAYLOADS[0], PAYLOADS[1], PAYLOADS[3]]
    assert said["refused"] == list(BLOCKED) and said["scored"] == len(OPEN) * len(PAYLOADS)
    assert said["files"] == ["main.py", "work.json"]


def test_a_blocked_set_in_a_problem_file_is_refused_before_it_is_scored(
    task: Task, pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    answer = f"__import__('pathlib').Path('{tmp_path}/ran').touch()"
    smuggled = [(puzzle(name, answer, valid_answers=[], problem=answer), completion(answer)) for name in BLOCKED]
    for (problem, _), verdict in zip(smuggled, task.judge(smuggled), strict=True):
        assert verdict.failure is JudgeFailure.UNPARSEABLE_GOLD
        assert f"problem {problem.id}: the puzzle set {problem.id} is blocked: " in verdict.reason
    with pytest.raises(JudgeFailed, match="could not decide 37 of 37 completions"):
        judge_attempts(task, smuggled)
    # The worker refuses them too, whoever asks it.
    asked = [json.loads(problem.spec) | {"gold": "x", "answers": [answer]} for problem, _ in smuggled]
    assert all(reply.reason.startswith("PuzzlesRefused: the puzzle set ") for reply in pool.ask(asked))
    assert list(tmp_path.iterdir()) == []


# --- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "finish", "answer"),
    [
        ("<answer>7</answer>", FinishReason.STOP, "7"),
        ("<think>a</think><answer>\n3 1\n1 3\n</answer>", FinishReason.STOP, "3 1\n1 3"),
        ("<answer>7</answer> no, <answer>8</answer>", FinishReason.STOP, "8"),
        (r"</think> \boxed{5}", FinishReason.STOP, "5"),
        (r"\boxed{5} <answer>7</answer>", FinishReason.STOP, "7"),  # the question asks for the tags
        (r"<answer> \boxed{7} </answer>", FinishReason.STOP, "7"),
        (r"<answer>[\boxed{7}]</answer>", FinishReason.STOP, r"[\boxed{7}]"),
        (r"<answer>\boxed{{7}</answer>", FinishReason.STOP, None),
        ("<answer>7</answer> <answer>8", FinishReason.STOP, "7"),
        ("the answer is 7", FinishReason.STOP, None),
        ("#### 7", FinishReason.STOP, None),
        ("<answer> </answer>", FinishReason.STOP, None),
        ("<answer>7</answer> but <think>", FinishReason.STOP, None),
        ("<answer>7</answer></think>", FinishReason.STOP, None),
        ("<answer>7</answer>", FinishReason.LENGTH, None),  # the template may have opened the thought
        ("</think><answer>7</answer> and", FinishReason.LENGTH, "7"),
        ("</think><answer>7", FinishReason.LENGTH, None),
        ("", FinishReason.STOP, None),
    ],
)
def test_where_the_answer_is_read(text: str, finish: FinishReason, answer: str | None):
    assert extract(Completion(text, (), (), finish)) == answer


@pytest.mark.parametrize(
    "text",
    [
        "<answer>" * 100_000, "<answer>" + r"\boxed{" * 50_000 + "</answer>", "<answer>" + " " * 500_000 + "</answer>",
        r"<answer>\boxed{" + "}      " * 50_000 + "</answer>", "{" * 300_000 + "}" * 300_000, "</think>" * 100_000,
    ],
)  # fmt: skip
def test_hostile_texts_take_no_time(text: str):
    started = time.perf_counter()
    extract(Completion(text, (), (), FinishReason.STOP))
    answer_of(text)
    assert time.perf_counter() - started < 5  # a quadratic scan would take minutes


def test_votes_have_one_spelling():
    assert {answer_of(f"<answer>{text}</answer>") for text in ("3 1\n1 3", " 3  1\n\n1 3 ", "3 1 1 3")} == {"3 1 1 3"}
    assert answer_of("3 1 1 3") is None


def judged(*said: object, answers: tuple[str, ...] = ("7",)) -> list[Verdict]:
    """Verdicts by a worker that says what is scripted."""
    judge = judge_with(lambda requests: [Answer(list(said), None, "", 0.5)] * len(requests))
    return judge([(puzzle("gcd", "7"), completion(answer)) for answer in answers])


NONSENSE = Verdict.undecided(JudgeFailure.CRASH, "the worker said something that is no score")


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ({"gold": 1.0, "score": 1.0}, Verdict(Outcome.RIGHT)),
        ({"gold": 1.0, "score": 0.99}, Verdict(Outcome.WRONG, "answered '7', expected '7' (score 0.99)")),
        ({"gold": 1.0, "score": 1.2}, Verdict(Outcome.WRONG, "answered '7', expected '7' (score 1.2)")),
        ({"gold": 1.0, "score": float("nan")}, Verdict(Outcome.WRONG, "answered '7', expected '7' (score nan)")),
        (
            {"gold": 1.0, "unreadable": "KeyError: 1"},
            Verdict(Outcome.WRONG, "answered '7', expected '7' (KeyError: 1)"),
        ),
        (
            {"gold": 0.5, "score": 1.0},
            Verdict.undecided(JudgeFailure.UNPARSEABLE_GOLD, "the reference '7' itself earns 0.5"),
        ),
        (
            {"gold": 0.0, "unreadable": "KeyError: 'x'"},
            Verdict.undecided(JudgeFailure.UNPARSEABLE_GOLD, "the reference '7' itself earns 0"),
        ),
        (
            {"failure": "timeout", "reason": "killed after 5 s"},
            Verdict.undecided(JudgeFailure.TIMEOUT, "killed after 5 s, on '7'"),
        ),
        (
            {"failure": "crash", "reason": "the scorer died"},
            Verdict.undecided(JudgeFailure.CRASH, "the scorer died, on '7'"),
        ),
        ({"failure": "right", "reason": ""}, NONSENSE),
        ({"score": 1.0}, NONSENSE),
    ],
)
def test_verdicts_of_what_a_worker_says(said: dict[str, object], verdict: Verdict):
    (found,) = judged(said | {"seconds": 0.25})
    assert found == verdict and (found.seconds == 0.25 or found == NONSENSE)


def test_a_worker_that_is_lost_or_says_nonsense_is_undecided():
    for said in ([], [None], [3], [{"gold": 1.0, "score": 1.0}], [{}, {}]):
        assert judged(*said) == [NONSENSE]
    lost = judge_with(lambda requests: [Answer(None, JudgeFailure.TIMEOUT, "the verifier was killed", 68.0)])
    verdicts = lost([(puzzle("gcd", "7"), completion(answer)) for answer in ("7", "8")])
    assert verdicts == [Verdict.undecided(JudgeFailure.TIMEOUT, "the verifier was killed, on '7'")] * 2
    assert [verdict.seconds for verdict in verdicts] == [34.0, 34.0]


def test_equal_answers_to_a_problem_are_scored_once_and_their_time_counts_once():
    right, wrong = ({"gold": 1.0, "score": score, "seconds": 0.5} for score in (1.0, 0.0))
    verdicts = judged(right, wrong, answers=("7", "8", "7", "7"))
    assert [verdict.right for verdict in verdicts] == [True, False, True, True]
    assert [verdict.seconds for verdict in verdicts] == [0.5, 0.5, 0.0, 0.0]


def test_many_answers_go_in_parts():
    requests: list[dict[str, Any]] = []

    def ask(some: Sequence[Any]) -> list[Answer]:
        requests.extend(some)
        scores = ([float(given == r["gold"]) for given in r["answers"]] for r in some)
        return [Answer([{"gold": 1.0, "score": s, "seconds": 0.0} for s in of], None, "", 0.0) for of in scores]

    problems = [puzzle("gcd", "3"), puzzle("gcd", "12")]
    attempts = [(problem, completion(str(number))) for number in range(20) for problem in problems]
    verdicts = judge_with(ask)(attempts)
    assert [len(request["answers"]) for request in requests] == [8, 8, 4] * 2
    assert [i for i, verdict in enumerate(verdicts) if verdict.right] == [6, 25]  # 3 of the first, 12 of the second


def test_long_answers_and_none_are_wrong_without_a_worker():
    assert longest_answer("x" * 50) == 1100
    judge = judge_with(lambda requests: [])
    long, absent = judge([(puzzle("gcd", "7"), completion(answer)) for answer in ("7" * 1003, "")])
    assert (long.outcome, long.reason) == (Outcome.WRONG, "an answer of 1,003 characters is none")
    assert (absent.outcome, absent.reason) == (Outcome.WRONG, "no final answer (finish reason stop)")
    assert judged({"gold": 1.0, "score": 1.0, "seconds": 0.0}, answers=("7" * 1002,))[0].right


@pytest.mark.parametrize(
    "spec", ["", "3", "{}", '{"set": "gcd"}', '{"set": 3, "metadata": {}}', '{"set": "gcd", "metadata": []}']
)
def test_what_is_no_puzzle_is_undecided(spec: str):
    problem = replace(puzzle("gcd", "7"), spec=spec)
    (verdict,) = judge_with(lambda requests: [])([(problem, completion("7"))])
    assert verdict.failure is JudgeFailure.UNPARSEABLE_GOLD and "it is no puzzle" in verdict.reason


def test_a_reference_that_its_set_does_not_accept_is_undecided(task: Task):
    problems = [puzzle("prime_factorization", "two"), puzzle("kakurasu", "1"), puzzle("arc_agi", "1", output=[[2]])]
    failures = [verdict.failure for verdict in task.judge([(problem, completion("1")) for problem in problems])]
    assert failures == [JudgeFailure.UNPARSEABLE_GOLD] * 3


def test_without_a_sandbox_nothing_is_decided_and_nothing_runs(tmp_path: Path):
    def none() -> Sandbox:
        raise SandboxUnavailable("no bubblewrap here")

    task = puzzle_task(none, workers=1)
    assert task.judge([]) == []
    for verdict in task.judge([(puzzle("gcd", "7"), completion(answer)) for answer in ("7", "8")]):
        assert verdict.failure is JudgeFailure.INFRASTRUCTURE and "no bubblewrap here" in verdict.reason


def test_the_task_judges_in_the_sandbox_that_it_is_given():
    task = puzzle_task(find_sandbox, workers=1)
    problem = puzzles("knights_knaves", 1, seed=0)[0]
    right, wrong, cut_off = task.judge([
        (problem, completion(problem.answer)),
        (problem, completion("nobody is anything")),
        (problem, Completion("<think>so <answer>" + problem.answer, (), (), FinishReason.LENGTH)),
    ])  # fmt: skip
    assert (right.outcome, wrong.outcome, cut_off.outcome) == (Outcome.RIGHT, Outcome.WRONG, Outcome.WRONG)
    assert (task.name, task.verifier_version) == ("puzzles", "puzzles-1-reasoning-gym-0.1.25")


# --- the worker ------------------------------------------------------------------------------------------------------


def test_what_the_scorer_raises_on_the_answer_is_told_from_what_it_raises_on_the_reference():
    def number(text: str, entry: dict[str, Any]) -> float:
        entry["metadata"]["seen"].append(text)  # as some scorers do
        return float(text == entry["answer"] and entry["metadata"]["seen"] == [text] and float(text) > 0)

    def score(gold: str, given: str) -> dict[str, Any]:
        return scored(number, gold, {"seen": []}, given)

    assert score("1", "1") == {"gold": 1.0, "score": 1.0}
    assert score("1", "2") == {"gold": 1.0, "score": 0.0}
    assert scored(lambda text, _: float(text), "1", {}, "x") == {
        "gold": 1.0, "unreadable": "ValueError: could not convert string to float: 'x'",
    }  # fmt: skip
    assert scored(lambda text, _: float(text), "x", {}, "1")["gold"] == 0.0


CHILDREN = """
import ctypes, os, sys
from rl.tasks.puzzle_worker import in_children
from rl.worker_main import serve

seen = []

def remember():
    seen.append(1)
    return {"seen": len(seen)}

def deep(n):
    return deep(n + 1)

def write_everywhere():
    for descriptor in [0, *range(3, 64)]:
        try:
            os.write(descriptor, b'[0, "", "forged"]\\n')
        except OSError:
            pass

works = {
    "say": lambda: {"score": 1.0},
    "remember": remember,
    "print": lambda: {"score": float(sys.stdout.write("[0, true]\\n" * 5000) > 0)},
    "hang": lambda: ctypes.PyDLL(None).sleep(600),
    "die": lambda: os._exit(0),
    "fault": os.abort,
    "raise": lambda: {}["x"],
    "deep": lambda: deep(0),
    "memory": lambda: {"score": len(bytearray(1 << 34))},
    "flood": lambda: {"score": "x" * 5000},
    "forge": write_everywhere,
}
serve(lambda kinds: in_children([works[kind] for kind in kinds], 1.0), seconds=20.0, memory=2**30)
"""


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerPool]:
    path = tmp_path_factory.mktemp("worker") / "children.py"
    path.write_text(CHILDREN)
    pool = WorkerPool(python_worker(str(path)), workers=1, timeout=15.0)
    yield pool
    pool.close()


def test_a_child_that_hangs_or_dies_costs_its_own_answer(children: WorkerPool):
    kinds = ["say", "hang", "die", "fault", "say", "raise", "deep", "memory", "flood", "print", "say"]
    (reply,) = children.ask([kinds])
    said = [what.get("score") or f"{what['failure']}: {what['reason']}" for what in reply.value]
    died = "crash: the scorer died"
    assert said[:4] == [1.0, "timeout: killed after 1 s", died, died]
    assert said[4:8] == [1.0, died, died, died]
    assert said[8:] == ["crash: the scorer said nonsense", 1.0, 1.0]
    seconds = [what["seconds"] for what in reply.value]
    assert 1 <= seconds[1] < 2 and sum(seconds) - seconds[1] < 2


def test_a_request_leaves_nothing_behind(children: WorkerPool):
    (pid,) = children.pids()
    replies = children.ask([["remember", "remember"], ["remember"], ["die", "remember"]])
    assert [[what.get("seen") for what in reply.value] for reply in replies] == [[1, 2], [1], [None, 1]]
    assert children.pids() == [pid]  # one process all along, and no child is left of it
    assert Path(f"/proc/{pid}/task/{pid}/children").read_text() == ""


def test_a_child_cannot_speak_for_its_parent(children: WorkerPool):
    """All that it may write to is its own pipe, where something else than a result is nonsense."""
    first, second = children.ask([["forge", "say"], ["say"]])
    assert first.value[0]["reason"] == "the scorer said nonsense" and first.value[1]["score"] == 1.0
    assert second.value[0]["score"] == 1.0
