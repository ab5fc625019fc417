"""Which problems a step takes, and what a collector remembers between steps."""

from rl.collect import StepDraw
from rl.types import Problem


def stream(names):
    return iter([Problem(name, (), "") for name in names])


def names(problems):
    return [problem.id for problem in problems]


def test_a_step_takes_no_problem_twice():
    draw = StepDraw(stream("abcabdab"))
    assert names(draw.next(2)) == ["a", "b"]
    assert names(draw.next(2)) == ["c", "d"]
    assert draw.taken == 6


def test_a_stream_without_other_problems_ends_the_step_short():
    draw = StepDraw(stream("ab" * 50))
    assert names(draw.next(5)) == ["a", "b"]
    assert names(draw.next(1)) == []
    assert names(StepDraw(stream("a")).next(3)) == ["a"]
