"""The stage that makes a base model ready to be a student."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recipes.runner import StageContext
from recipes.student_keys import Prepare

if TYPE_CHECKING:
    from distill.students import Preparation


def preparation_of(stage: Prepare) -> Preparation:
    from distill.students import Preparation

    return Preparation(stage.template, stage.eos_token, stage.pad_token, stage.context, stage.rope_theta)


def prepare(context: StageContext) -> None:
    from distill.students import prepare_student

    stage: Prepare = context.stage
    prepare_student(context.model(stage.model), context.folder / "model", preparation_of(stage))
