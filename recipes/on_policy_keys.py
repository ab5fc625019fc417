"""What `method: on_policy` may be told: the keys of on-policy distillation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from recipes.keys import Rate, Ref
from recipes.policy_keys import PolicyKeys
from recipes.rl_keys import Collapse
from recipes.server_keys import AddressKeys

Text = Annotated[str, Field(max_length=10_000)]


class TeacherServer(AddressKeys):
    """vLLM servers that you started with the teacher (`vllm serve TEACHER`)."""

    model: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    """What the server calls the teacher [the teacher's hub id or folder]."""
    connections: Annotated[int, Field(ge=1, le=4096)] = 32
    """Requests under way on each server at most."""


class OnPolicy(PolicyKeys):
    """On-policy distillation: the student samples, the teacher scores its tokens, each token pays for itself."""

    REFERENCES: ClassVar[dict[str, str]] = {"model": "model", "teacher": "model"}

    method: Literal["on_policy"]
    teacher: Ref
    """Model to learn from, with the student's tokenizer: a stage, a folder (./ ../ /) or a hub id (org/name)."""
    teacher_suffix: Text = ""
    """Text after the question that only the teacher sees: " Answer briefly." teaches briefness to the same model."""
    teacher_system: Text = ""
    """System message that only the teacher sees."""
    teacher_server: TeacherServer | None = None
    """Servers that score for the teacher, whose weights are then not loaded here; needs temperature 1."""
    coefficient: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Weight of the reverse KL: the scale of the advantages."""
    learning_rate: Rate = 5e-5
    """Learning rate (constant after the warm-up); with lora about 1e-4."""
    group_size: Annotated[int, Field(ge=1, le=4096)] = 4
    """Completions per problem."""
    collapse: Collapse | None = None
    """What is watched, and what happens when it shows; null watches nothing."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        yield from super().problems_with_keys()
        if self.repetition is not None and self.repetition.penalty:
            yield "repetition.penalty", "has no effect: there is no reward in on-policy distillation; remove it"
        if self.teacher == self.model and not (self.teacher_suffix or self.teacher_system):
            yield (
                "teacher",
                "is the model itself and is asked the same, so there is nothing to learn; name another model, or give "
                "teacher_suffix or teacher_system",
            )

    def problems_with_limits(self) -> Iterator[tuple[str, str]]:
        yield from super().problems_with_limits()
        if self.teacher_server is not None and self.temperature != 1:
            yield (
                "teacher_server",
                f"a server scores at temperature 1, and the student would sample at {self.temperature}: set "
                "temperature: 1, or load the teacher here",
            )
