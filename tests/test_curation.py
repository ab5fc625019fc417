"""Curation: planted bad problems are found, every problem has one fate, rates and guesses are counted, files add up."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

import rl.faults
from rl.curation import (
    Curated,
    Dropped,
    Findings,
    Step,
    curate,
    drop_duplicates,
    drop_forms,
    drop_guessable,
    drop_leaks,
    histogram,
    rate_difficulty,
    report,
    write_curated,
)
from rl.decontamination import EvaluationIndex, EvaluationItem, LeakRule, read_items
from rl.difficulty import GUESSES, WithoutThought, closed_thought, draw_guesses, pass_rates, share_kept
from rl.faults import FaultRaised
from rl.jsonl import dump_lines
from rl.pool import Pool, fill_pool, pool_address
from rl.problems import read_problems, read_solved_problems
from rl.prompts import R1_ZERO_TEMPLATE, render_prompt
from rl.samplers.base import SampleRequest, SamplingSettings
from rl.tasks import tiny
from rl.tasks.exact import judge
from rl.tasks.tiny_models import make_tokenizer
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, Rollout, RolloutGroup, TextPart, Verdict


@pytest.fixture(autouse=True)
def _fault_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl.faults, "_POINTS", rl.faults._POINTS | {"curate.write"})


def problem(text: str, answer: str = "5", name: str = "p") -> Problem:
    return Problem(name, (TextPart(text),), answer)


# --- a made set with planted problems ---------------------------------------------------------------------------------

STORIES = (
    "{name} packs {a} boxes. Every box holds {b} {thing}. {c} {thing} break on the way. How many {thing} arrive?",
    "A shop sells {thing} at ${a} each. {name} buys {b} of them and pays with ${c}. How much change is given?",
    "There are {a} rows of {thing} with {b} in each row. {name} adds {c} more. How many {thing} are there now?",
    "{name} reads {a} pages about {thing} a day for {b} days. The book has {c} pages more. How long is the book?",
    "In a club of {a} people each one owns {b} {thing}. {name} owns another {c}. How many {thing} are that in all?",
    "A truck brings {a} crates of {thing}. A crate weighs {b} kg, the truck {c} kg. {name} weighs it. What is it?",
)
NAMES = ("Aya", "Bruno", "Chen", "Dora", "Emeka", "Fatima", "Gus", "Hana", "Ivo", "Jola", "Kofi", "Lena")
THINGS = ("shells", "pencils", "marbles", "lamps", "carrots", "bricks", "kites", "stamps", "spoons", "tickets")
STOCK = "how much money does the shop earn in all at the end of the day if nothing is left"


@dataclass(frozen=True)
class Planted:
    """A problem, why it must go (None: it must stay), and the id that the evidence must name."""

    problem: Problem
    reason: str | None = None
    twin: str = ""


class Maker:
    """Problems with consecutive ids and numbers that no two stories share."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.made: list[Planted] = []
        self.used: set[tuple[int, ...]] = set()
        letters = (["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z"], ["a", "e", "i", "o", "u"])
        self.vocabulary = ["".join(self.rng.choice(letters[i % 2]) for i in range(6)) for _ in range(3000)]

    def plant(self, text: str, answer: str, reason: str | None = None, twin: str = "") -> Problem:
        made = problem(text, answer, f"made-{len(self.made):04}")
        self.made.append(Planted(made, reason, twin))
        return made

    def numbers(self) -> tuple[int, int, int]:
        while (drawn := tuple(sorted(self.rng.sample(range(2, 400), 3)))) in self.used:
            pass
        self.used.add(drawn)
        return drawn[0], drawn[1], drawn[2]

    def story(self) -> tuple[str, str]:
        a, b, c = self.numbers()
        name, thing = self.rng.choice(NAMES), self.rng.choice(THINGS)
        return self.rng.choice(STORIES).format(name=name, thing=thing, a=a, b=b, c=c), str(a * b + c)

    def prose(self, count: int) -> list[str]:
        return self.rng.choices(self.vocabulary, k=count)


def evaluation(maker: Maker) -> list[EvaluationItem]:
    """80 questions: long ones, short ones, and ten that end in one stock phrase."""
    texts = [" ".join([*maker.prose(35), str(maker.rng.randint(2, 99)), *maker.prose(8)]) + "?" for _ in range(40)]
    texts += [" ".join(maker.prose(14)) + "?" for _ in range(30)]
    texts += [f"{' '.join(maker.prose(20))}, {STOCK}?" for _ in range(10)]
    return [EvaluationItem("exam", f"q{i}", text) for i, text in enumerate(texts)]


def made_set(seed: int = 0) -> tuple[list[Planted], list[EvaluationItem]]:
    maker = Maker(seed)
    items = evaluation(maker)
    for _ in range(360):
        maker.plant(*maker.story())
    plant_forms(maker)
    plant_leaks(maker, items)
    plant_duplicates(maker)
    return maker.made, items


OPTIONS = (
    "(A) {} (B) {} (C) {} (D) {}",
    "\nA. {}\nB. {}\nC. {}\nD. {}",
    r"$\textbf{{(A)}}\ {}\quad\textbf{{(B)}}\ {}\quad\textbf{{(C)}}\ {}$",
)
FORMS = (  # question, answer, form
    ("True or false: {a} + {b} = {c}.", "False", "true or false"),
    ("State whether it is true or false that {a} times {b} is above {c}.", r"\text{True}", "true or false"),
    ("Is {a} + {b} larger than {c}?", "Yes", "yes or no"),
    ("Aya has ${a} and ${b}. Can she buy three lamps for ${c} each?", "No.", "yes or no"),
    ("Let n > {a}. Prove that n^2 + {b} n + {c} is positive.", "proof", "proof"),
    ("Show that {a} x + {b} y = {c} has a rational solution.", "see above", "proof"),
    ("In how many ways can {a} of {b} balls be chosen if {c} of them are put aside?", "7", None),
    ("How many of the following are even: {a}, {b}, {c}?", "2", None),
    ("A true or false test of {a} questions is taken by {b} pupils and {c} adults. How many answers?", "9", None),
)


def plant_forms(maker: Maker) -> None:
    for i in range(24):
        text, answer = maker.story()
        values = [answer, *(str(int(answer) + step) for step in (3, 7, 10))]
        maker.plant(f"{text} {OPTIONS[i % 3].format(*values)}", "A" if i % 2 else answer, "multiple choice")
    for text, answer, form in FORMS * 8:
        a, b, c = maker.numbers()
        maker.plant(text.format(a=a, b=b, c=c), answer, form)


def plant_leaks(maker: Maker, items: Sequence[EvaluationItem]) -> None:
    long, short = items[:40], items[40:70]
    for i in range(15):
        copied = (str.upper, str.title, lambda text: text.replace(" ", "  "))[i % 3](long[i].text)
        maker.plant(copied, "7", "evaluation leak", f"q{i}")
        wrapped = f"Solve this and put the answer into a box. {long[i + 15].text} Think step by step."
        maker.plant(wrapped, "8", "evaluation leak", f"q{i + 15}")
        stretch = long[i + 25].text.split()[4 : 17 + i % 5]  # 13 to 17 words
        text = " ".join([*maker.prose(20), *stretch, *maker.prose(15)])
        maker.plant(text, "9", "evaluation leak", f"q{i + 25}")
        half = short[i].text.split()[2 : 10 + i % 3]  # 8 to 10 words of 14
        maker.plant(" ".join([*maker.prose(12), *half, *maker.prose(9)]), "6", "evaluation leak", f"q{40 + i}")
    for i in range(15):  # these must stay: a stock phrase, and 8 to 12 words of a long question
        maker.plant(f"{' '.join(maker.prose(25))}, {STOCK}?", str(i))
        part = long[i].text.split()[10 : 18 + i % 5]
        maker.plant(" ".join([*maker.prose(20), *part, *maker.prose(15)]), str(i))


REWORDED = (("How many", "What number of"), ("There are", "One sees"), ("buys", "takes"), ("packs", "fills"))


def plant_duplicates(maker: Maker) -> None:
    originals = [planted.problem for planted in maker.made[:80]]
    for i, original in enumerate(originals):
        text = original.text
        if i < 20:
            text = text.upper().replace(".", " .") + "\n"
        elif i < 40:
            for old, new in REWORDED:
                text = text.replace(old, new)
            text = text.replace(next(name for name in NAMES if name in text), "Zoe")
        elif i < 60:
            *told, asked = text.split(". ")
            text = f"{asked} {'. '.join([*told[1:], told[0]])}."
        else:  # must stay: another number, and so another problem
            number = next(word for word in text.replace("$", " ").split() if word.isdigit())
            maker.plant(text.replace(number, f"{number}7"), str(int(original.answer) * 10 + 1))
            continue
        maker.plant(text, original.answer + (".0" if i % 4 == 0 else ""), "near duplicate", original.id)


@pytest.fixture(scope="module")
def planted() -> tuple[list[Planted], Curated]:
    made, items = made_set()
    assert len(made) >= 500
    steps = (drop_forms(), drop_leaks(EvaluationIndex(items)), drop_duplicates())
    return made, curate([one.problem for one in made], *steps)


def test_planted_problems_are_found_and_the_others_stay(planted: tuple[list[Planted], Curated]):
    made, curated = planted
    expected = {one.problem.id: one.reason for one in made}
    found = {dropped.problem.id: dropped.reason for dropped in curated.dropped}
    for reason in dict.fromkeys(filter(None, expected.values())):
        hits = sum(expected[name] == reason for name, given in found.items() if given == reason)
        given = sum(one == reason for one in found.values())
        wanted = sum(one == reason for one in expected.values())
        precision, recall = hits / given, hits / wanted
        logging.getLogger(__name__).info("%s: precision %.3f, recall %.3f of %d", reason, precision, recall, wanted)
        # Of 20 rewordings those with three new phrases in 20 words share less than half of their pairs: not found.
        assert wanted >= 15 and precision >= 0.98 and recall >= (0.85 if reason == "near duplicate" else 0.98)
    assert sum(reason is None for reason in expected.values()) >= 400


def test_the_evidence_names_the_other_side(planted: tuple[list[Planted], Curated]):
    made, curated = planted
    twins = {one.problem.id: one.twin for one in made}
    items = {item.id: item.text for item in made_set()[1]}
    for dropped in curated.dropped:
        evidence = dropped.evidence
        if dropped.reason == "evaluation leak":
            assert evidence["item"] == twins[dropped.problem.id]
            assert evidence["evaluation_text"] == items[evidence["item"]]
            assert evidence["words"] >= 8 and len(evidence["shared"].split()) == evidence["words"]
        elif dropped.reason == "near duplicate":
            assert evidence["kept"] == twins[dropped.problem.id] and not evidence["answers_disagree"]
            assert 0.5 <= evidence["similarity"] <= 1
        else:
            assert evidence["found"]
    counts = curated.steps[1].counts
    assert counts["kept, sharing part of an evaluation question"] == 15
    assert counts["kept, sharing only templates of evaluation questions"] == 15
    kinds = Counter(facts["overlap"]["kind"] for facts in curated.facts.values())
    assert kinds == {"part": 15, "template": 15}


# --- every problem once -----------------------------------------------------------------------------------------------


def ends_with(letter: str, reason: str) -> Step:
    return Step(reason, lambda given, progress: Findings([Dropped(p, reason, {}) for p in given if letter in p.id]))


def test_a_problem_goes_under_the_first_reason_and_counts_add_up():
    problems = [problem("?", name=name) for name in ("a", "ab", "b", "c", "abc")]
    told: list[tuple[str, int, int]] = []

    def third(given: Sequence[Problem], progress: Callable[[int, int], None]) -> Findings:
        progress(1, len(given))
        return Findings([], {p.id: {"seen": True} for p in given}, {"looked at": len(given)})

    steps = (ends_with("a", "has a"), ends_with("b", "has b"), Step("look", third))
    curated = curate(problems, *steps, progress=lambda *args: told.append(args))
    assert [p.id for p in curated.kept] == ["c"]
    assert [d.problem.id for d in curated.dropped if d.reason == "has a"] == ["a", "ab", "abc"]
    assert [d.problem.id for d in curated.dropped if d.reason == "has b"] == ["b"]
    assert curated.reasons == {"has a": 3, "has b": 1}
    assert [(step.read, step.dropped) for step in curated.steps] == [(5, 3), (2, 1), (1, 0)]
    assert (curated.facts, told) == ({"c": {"seen": True}}, [("look", 1, 1)])
    backwards = curate(problems, *steps[1::-1])
    assert backwards.reasons == {"has b": 3, "has a": 1} and backwards.kept == curated.kept


def test_no_step_and_no_problem():
    assert curate([problem("?")]).kept == (problem("?"),)
    nothing = curate([], drop_forms(), drop_duplicates(), drop_leaks(EvaluationIndex([])))
    assert (nothing.kept, nothing.dropped, nothing.summary()["read"]) == ((), (), 0)


def test_bad_input_and_bad_steps_are_refused():
    with pytest.raises(ValueError, match="1 ids belong to several problems, the first is 'a'"):
        curate([problem("x", name="a"), problem("y", name="a")])
    stranger, twice = [Dropped(problem("?", name="z"), "odd", {})], [Dropped(problem("?", name="a"), "odd", {})] * 2
    for odd in (Findings(stranger), Findings(twice)):
        with pytest.raises(RuntimeError, match="drops a problem twice, or one that it was not given"):
            curate([problem("?", name="a")], Step("odd", lambda given, progress, odd=odd: odd))


# --- pass rates -------------------------------------------------------------------------------------------------------


class Scripted:
    """Answers in `outcome(problem, seed)`'s words; knows the problems by their prompts."""

    policy_version = 0

    def __init__(self, problems: Sequence[Problem], outcome: Callable[[Problem, int], str]) -> None:
        self.tokenizer = make_tokenizer()
        self._problems = {render_prompt(self.tokenizer, p): p for p in problems}
        self._outcome = outcome
        self.requests: list[SampleRequest] = []
        self.max_tokens: set[int] = set()

    def sample(self, requests, settings, report=lambda finished: None) -> list[Completion]:
        self.requests += requests
        self.max_tokens.add(settings.max_tokens)
        report(len(requests))
        said = [self._outcome(self._problems[request.prompt_ids], request.seed) for request in requests]
        return [Completion(text, (7, 7), (0.0, 0.0), FinishReason.STOP) for text in said]


def wrong(asked: Problem) -> str:
    return f"{(int(asked.answer) + 1) % 100:02}"


def chance(seed: int) -> float:
    return random.Random(seed).random()


def test_pass_rates_of_a_pool_are_those_of_counting(tmp_path: Path):
    problems = tiny.problems("train", 30, (2, 3))
    share = {p.id: i / 29 for i, p in enumerate(problems)}
    sampler = Scripted(problems, lambda p, seed: f"</think>{p.answer if chance(seed) < share[p.id] else wrong(p)}")
    settings = SamplingSettings(max_tokens=8)
    pool = Pool.open(tmp_path / "pool", pool_address("base", problems, sampler.tokenizer, settings, 3))
    fill_pool(pool, sampler, sampler.tokenizer, problems, tiny.TASK, 10, settings, 3)

    counted = dict.fromkeys((p.id for p in problems), 0)
    answers = {p.id: p.answer for p in problems}
    for path in (tmp_path / "pool").glob("samples-*.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()):
            counted[row["problem"]] += row["text"] == f"</think>{answers[row['problem']]}"
    version = tiny.TASK.verifier_version
    curated = curate(problems, rate_difficulty(lambda given, progress: pool.groups(given, version)))
    assert curated.facts == {name: {"pass_rate": count / 10} for name, count in counted.items()}
    assert curated.kept == tuple(problems)
    assert sum(curated.summary()["pass_rates"].values()) == 30
    bands = curate(problems, rate_difficulty(lambda given, progress: pool.groups(given, version), True, True))
    solved = Counter(counted.values())
    assert bands.reasons == {"never solved": solved[0], "always solved": solved[10]}
    assert [p.id for p in bands.kept] == [name for name, c in counted.items() if 0 < c < 10]


def group(name: str, verdicts: str, finish: FinishReason = FinishReason.STOP) -> RolloutGroup:
    """One rollout a letter: r, w or u (undecided)."""
    said = {"r": Verdict(Outcome.RIGHT), "w": Verdict(Outcome.WRONG), "u": Verdict.undecided(JudgeFailure.TIMEOUT)}
    rollouts = tuple(Rollout(Completion("x", (1,), (0.0,), finish), said[letter]) for letter in verdicts)
    return RolloutGroup(problem("?", name=name), (1,), rollouts)


def test_what_is_undecided_leaves_the_rate():
    rates = pass_rates([group("a", "rrrwwwwwwu"), group("b", "uu"), group("c", "")])
    assert (rates["a"].rate, rates["a"].undecided) == (1 / 3, 1)
    assert rates["b"].rate is None and rates["c"].rate is None
    groups = [group("a", "uw"), group("b", "uu"), group("c", "ur")]
    problems = [g.problem for g in groups]
    curated = curate([*problems, problem("?", name="d")], rate_difficulty(lambda given, progress: groups, True, True))
    assert curated.reasons == {"never solved": 1, "always solved": 1}
    assert [p.id for p in curated.kept] == ["b", "d"]
    assert curated.steps[0].counts == {"without a pass rate": 2}


def test_groups_that_cannot_be_rated_are_refused():
    with pytest.raises(ValueError, match="1 of 1 samples were aborted"):
        pass_rates([group("a", "w", FinishReason.ABORTED)])
    with pytest.raises(ValueError, match="problem a has two groups"):
        pass_rates([group("a", "w"), group("a", "r")])


def test_the_histogram_has_every_rate_once():
    assert +Counter(histogram([0, 0.1, 0.35, 1])) == {"0": 1, "to 0.1": 1, "to 0.4": 1, "1": 1}
    assert +Counter(histogram([7 / 10, 0.999, 0.001])) == {"to 0.7": 1, "below 1": 1, "to 0.1": 1}
    for k in (1, 7, 10, 16):
        assert sum(histogram([right / k for right in range(k + 1)]).values()) == k + 1


# --- guesses ----------------------------------------------------------------------------------------------------------


def test_the_arithmetic_of_eight_guesses():
    assert share_kept(0.1) == pytest.approx(0.43046721)
    assert share_kept(0.25) == pytest.approx(0.10011292)
    assert (share_kept(0), share_kept(1), share_kept(0.5, 1)) == (1, 0, 0.5)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.1, 0.43), (0.25, 0.10)])
def test_the_guess_filter_keeps_what_eight_guesses_miss(share: float, expected: float):
    problems = tiny.problems("train", 300, (2, 3))
    sampler = Scripted(problems, lambda p, seed: p.answer if chance(seed) < share else wrong(p))

    draw = partial(draw_guesses, sampler, sampler.tokenizer, task=tiny.TASK, seed=5, suffix="")
    curated = curate(problems, drop_guessable(lambda given, progress: draw(given)))
    assert len(curated.kept) / 300 == pytest.approx(expected, abs=0.086)  # 3 standard deviations
    assert len(sampler.requests) == 300 * GUESSES == 2400
    # By hand: a problem goes exactly when one of its seeds is lucky.
    lucky = {request.prompt_ids for request in sampler.requests if chance(request.seed) < share}
    guessed = [p for p in problems if render_prompt(sampler.tokenizer, p) in lucky]
    assert [d.problem for d in curated.dropped] == guessed
    for dropped in curated.dropped:
        assert dropped.evidence["guesses"] == 8 and dropped.evidence["right"] >= 1
        assert dropped.evidence["a_right_guess"] == f"</think>{dropped.problem.answer}"


def test_a_guess_begins_behind_a_closed_thought():
    problems = tiny.problems("train", 2, (2,))
    sampler = Scripted(problems, lambda p, seed: p.answer)
    told: list[int] = []
    settings = SamplingSettings(max_tokens=4)
    groups = draw_guesses(sampler, sampler.tokenizer, problems, tiny.TASK, 5, 3, settings, "", told.append)
    assert told == [6]
    (close,) = sampler.tokenizer("</think>", add_special_tokens=False)["input_ids"]
    assert {request.prefix for request in sampler.requests} == {(close,)}
    assert sampler.max_tokens == {5}  # room for 4 tokens behind the thought
    assert len({request.seed for request in sampler.requests}) == 6
    assert [g.prompt_ids for g in groups] == [render_prompt(sampler.tokenizer, p) for p in problems]
    assert all(r.right and r.completion.text == f"</think>{g.problem.answer}" for g in groups for r in g.rollouts)


def test_a_model_guesses(tiny_model_folder: Path):
    from rl.policy import load_model, load_tokenizer
    from rl.samplers.transformers import TransformersSampler

    tokenizer = load_tokenizer(tiny_model_folder)
    sampler = TransformersSampler(load_model(tiny_model_folder), tokenizer)
    problems = tiny.problems("train", 2, (2,))
    settings = SamplingSettings(max_tokens=3)
    groups = draw_guesses(sampler, tokenizer, problems, tiny.TASK, 5, settings=settings, suffix="")
    rollouts = [rollout for one in groups for rollout in one.rollouts]
    assert len(rollouts) == 16
    assert all(0 < rollout.num_tokens <= 3 and rollout.completion.text.startswith("</think>") for rollout in rollouts)
    assert groups == draw_guesses(sampler, tokenizer, problems, tiny.TASK, 5, settings=settings, suffix="")


@pytest.mark.parametrize(
    ("template", "closing"),
    [
        ("{{ messages[0].content }}<think>", "</think>"),
        ("{{ messages[0].content }}{{ '<|assistant|><think>\\n' }}", "\n</think>\n\n"),
        ("{% if 0 %}</think>{% endif %}{{ messages[0].content }}<|assistant|>", "<think>\n\n</think>\n\n"),
        (R1_ZERO_TEMPLATE, "<think>\n\n</think>\n\n"),
        ("{{ messages[0].content }}<|assistant|>", ""),
        (None, ""),
    ],
)
def test_how_a_thought_is_closed(template: str | None, closing: str):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    assert closed_thought(tokenizer) == closing


def test_a_boxed_guess_that_ran_out_of_tokens_counts():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    asked = problem("2+3", "5")
    talker = Scripted([asked], lambda p, seed: r"\boxed{5}, because")
    request = SampleRequest(render_prompt(talker.tokenizer, asked), 0)
    (guess,) = WithoutThought(talker, tokenizer).sample([request], SamplingSettings())
    assert talker.requests == [request]  # nothing to close
    guess = replace(guess, finish_reason=FinishReason.LENGTH)
    assert judge(asked, guess).right
    assert not judge(asked, replace(guess, text=r"\boxed{5}, because")).right


def test_guesses_that_were_not_judged_clear_nothing_and_drop_nothing():
    groups = [group("a", "wwwwwwwu"), group("b", "uuuuuuuu"), group("c", "wwwwwwww"), group("d", "uuuuuuur")]
    curated = curate([g.problem for g in groups], drop_guessable(lambda given, progress: groups))
    assert [p.id for p in curated.kept] == ["a", "b", "c"]
    assert curated.steps[0].counts == {"kept with guesses that were not judged": 2}


# --- files ------------------------------------------------------------------------------------------------------------


def small() -> Curated:
    problems = [
        Problem("open", (TextPart("What is `6` x 7?\n| a | b |"),), "42", source="mine", level=3),
        problem("Is 7 prime?", "Yes", "yes"),
        problem("What is 6 x 7 ? | a | b |", "42", "twin"),
        problem("Name the largest planet of the sun.", "Jupiter", "leak"),
        problem("Say 1 + 1.", "2", "easy"),
    ]
    index = EvaluationIndex([EvaluationItem("quiz", "9", "Name the largest planet of the sun.")])
    rated = rate_difficulty(lambda given, progress: [replace(group("", "rw"), problem=p) for p in given])
    guesses = {"easy": "wr"}
    guessed = drop_guessable(lambda g, _: [replace(group("", guesses.get(p.id, "ww")), problem=p) for p in g])
    return curate(problems, drop_forms(), drop_leaks(index), drop_duplicates(), rated, guessed)


def test_the_files_add_up_and_are_read_back(tmp_path: Path):
    curated = small()
    write_curated(tmp_path / "out", curated)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["dropped.jsonl", "problems.jsonl", "report.json", "report.md"]
    (kept,) = read_problems(tmp_path / "out" / "problems.jsonl")
    assert (kept.id, kept.text, kept.answer, kept.level) == ("open", "What is `6` x 7?\n| a | b |", "42", 3)
    (row,) = map(json.loads, (tmp_path / "out" / "problems.jsonl").read_text().splitlines())
    assert (row["pass_rate"], row["source"]) == (0.5, "mine")
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [row["id"] for row in dropped] == ["yes", "leak", "twin", "easy"]
    assert [row["reason"] for row in dropped] == ["yes or no", "evaluation leak", "near duplicate", "guessable"]
    assert dropped[1]["evidence"]["evaluation_text"] == "Name the largest planet of the sun."
    assert dropped[2]["evidence"]["kept"] == "open"
    assert dropped[3]["pass_rate"] == 0.5
    summary = json.loads((tmp_path / "out" / "report.json").read_text())
    assert summary["read"] == summary["kept"] + sum(summary["reasons"].values()) == 5
    assert summary["pass_rates"]["to 0.5"] == 2
    assert [step["read"] for step in summary["steps"]] == [5, 4, 3, 2, 2]


def test_the_report_shows_each_reason_and_is_no_markup():
    text = report(small())
    assert "1 of 5 problems are kept." in text
    assert "| near duplicate | 3 | 1 | 2 |" in text
    assert "    kept_question: What is `6` x 7? | a | b |\n" in text
    assert "With 2 guesses a problem that is guessed with chance .1 stays in 81% of cases" in text
    for reason in ("yes or no", "evaluation leak", "near duplicate", "guessable"):
        assert f"## Dropped: {reason} (1)" in text
    assert "  to 0.5        2  ########" in text


def test_worked_solutions_are_kept(tmp_path: Path):
    (tmp_path / "p.jsonl").write_text('{"question": "6 x 7?", "answer": "6 * 7 = 42\\n#### 42"}\n')
    solved = read_solved_problems(tmp_path / "p.jsonl")
    write_curated(tmp_path / "out", curate([p for p, _ in solved]), {p.id: solution for p, solution in solved})
    ((again, solution),) = read_solved_problems(tmp_path / "out" / "problems.jsonl")
    assert (again.id, again.answer, solution) == (solved[0][0].id, "42", "6 * 7 = 42")
    with pytest.raises(ValueError, match="problem p holds ####"):
        write_curated(tmp_path / "bad", curate([problem("?", "a #### b")]))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_an_unfinished_folder_is_written_again_and_a_finished_one_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
):
    write_curated(tmp_path / "whole", small())
    monkeypatch.setenv("REASON_FAULT", f"curate.write:{count}:raise")
    with pytest.raises(FaultRaised):
        write_curated(tmp_path / "torn", small())
    assert not (tmp_path / "torn" / "report.json").exists()
    monkeypatch.delenv("REASON_FAULT")
    write_curated(tmp_path / "torn", small())
    with pytest.raises(FileExistsError, match="holds a finished curation"):
        write_curated(tmp_path / "torn", curate([problem("?")]))
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "torn" / path.name).read_bytes() == path.read_bytes()


SCRIPT = """
import json, sys
from pathlib import Path
from rl.curation import curate, drop_duplicates, drop_forms, drop_leaks, report
from rl.decontamination import EvaluationIndex, read_items
from rl.problems import read_problems
folder = Path(sys.argv[1])
steps = drop_forms(), drop_leaks(EvaluationIndex(read_items(folder / "exam.jsonl"))), drop_duplicates()
curated = curate(read_problems(folder / "made.jsonl"), *steps)
assert not {"torch", "transformers"} & sys.modules.keys()
sys.stdout.write(report(curated) + json.dumps([[d.problem.id, d.evidence] for d in curated.dropped]))
"""


def test_the_result_does_not_depend_on_the_hash_seed_and_needs_no_torch(tmp_path: Path):
    made, items = made_set()
    rows = [{"id": m.problem.id, "question": m.problem.text, "answer": m.problem.answer} for m in made[::3]]
    (tmp_path / "made.jsonl").write_text(dump_lines(rows))
    (tmp_path / "exam.jsonl").write_text(dump_lines({"question": item.text} for item in items))
    root = str(Path(rl.faults.__file__).parents[1])
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]

    def said(seed: str) -> bytes:
        environment = os.environ | {"PYTHONHASHSEED": seed}
        return subprocess.run(command, check=True, capture_output=True, env=environment, cwd=root).stdout

    first, second = said("1"), said("2")
    assert first == second
    assert b"Dropped: near duplicate" in first and b"Dropped: evaluation leak" in first


# --- real problems, and made ones of their format ---------------------------------------------------------------------


@pytest.fixture(params=["made", pytest.param("real", marks=pytest.mark.skipif(
    "REASON_DATA" not in os.environ, reason="set REASON_DATA to a folder with gsm8k-train.jsonl and aime24.jsonl",
))])  # fmt: skip
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "real":
        return Path(os.environ["REASON_DATA"])
    maker = Maker(1)
    stories = [maker.story() for _ in range(20)]
    rows = [{"question": text, "answer": f"So it is.\n#### {answer}"} for text, answer in stories]
    (tmp_path / "gsm8k-train.jsonl").write_text(dump_lines(rows))
    exams = [{"id": i, "problem": " ".join(maker.prose(30)), "answer": "7"} for i in range(20)]
    (tmp_path / "aime24.jsonl").write_text(dump_lines(exams))
    return tmp_path


def test_grade_school_problems_survive_curation_against_contest_problems(data: Path):
    problems = [problem for problem, _ in read_solved_problems(data / "gsm8k-train.jsonl")][:800]
    index = EvaluationIndex(read_items(data / "aime24.jsonl"), LeakRule(run=8))
    curated = curate(problems, drop_forms(), drop_leaks(index), drop_duplicates())
    logging.getLogger(__name__).info("%d kept of %d: %s", len(curated.kept), len(problems), curated.reasons)
    assert len(curated.kept) >= 0.999 * len(problems)
