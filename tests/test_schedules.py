"""Schedules: R1-Zero's maximum length, one that goes down, and the ones that are refused."""

import pytest

from rl.schedules import StepSchedule, constant


def test_r1_zero_doubles_its_length_at_step_8200():
    schedule = StepSchedule(((1, 32768), (8200, 65536)))
    assert [schedule(step) for step in (1, 8199, 8200, 10_400)] == [32768, 32768, 65536, 65536]


def test_long2short_goes_down():
    schedule = StepSchedule(((1, 160), (3, 80), (4, 40)))
    assert [schedule(step) for step in range(1, 6)] == [160, 160, 80, 40, 40]


def test_constant():
    assert constant(256)(1) == constant(256)(10_000) == 256


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), r"must give a value for step 1, but its steps are \[\]"),
        (((2, 10),), r"must give a value for step 1, but its steps are \[2\]"),
        (((1, 10), (5, 20), (5, 30)), r"must rise, got \[1, 5, 5\]"),
        (((1, 10), (5, 20), (3, 30)), r"must rise, got \[1, 5, 3\]"),
    ],
)
def test_schedules_that_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        StepSchedule(stages)


def test_there_is_no_step_0():
    with pytest.raises(ValueError, match="steps count from 1, got 0"):
        constant(256)(0)
