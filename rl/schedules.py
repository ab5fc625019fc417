"""Values that change during a run: a function of the step, with nothing to store and nothing to resume.

The maximum length is such a value. R1-Zero (2501.12948, Nature version) samples up to 32,768 tokens until
step 8,200 and 65,536 from then on; MiniMax-M1 (2506.13585) goes from 40K to 80K in six stages; long2short RL (Kimi
k1.5, 2501.12599, section 2.4) goes down.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class StepSchedule:
    """A value that holds from a step on until the next one given. `stages`: (first step, value), steps count from 1.

    Example, R1-Zero's: `StepSchedule(((1, 32768), (8200, 65536)))` gives 32,768 at step 8,199 and 65,536 at 8,200.
    """

    stages: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.stages]
        if not steps or steps[0] != 1:
            raise ValueError(f"a schedule must give a value for step 1, but its steps are {steps}; let it start at 1")
        if any(later <= earlier for earlier, later in pairwise(steps)):
            raise ValueError(f"the steps of a schedule must rise, got {steps}")

    def __call__(self, step: int) -> int:
        """The value at a step. Steps after the last one given have its value; ValueError for a step below 1."""
        if step < 1:
            raise ValueError(f"steps count from 1, got {step}")
        return [value for first, value in self.stages if first <= step][-1]


def constant(value: int) -> StepSchedule:
    """The schedule that never changes: `constant(256)(1) == constant(256)(10_000) == 256`."""
    return StepSchedule(((1, value),))
