"""Preflight: the damage that nobody reports, found before the first step.

Implements the checks that the users of other trainers asked for after the fact: answers cut at a default length, EOS
masked because it is also the padding, a template that eats the thought, vocabulary rows that are another string, a loss
scaled by the micro-batch. `CHECKS` is the one table of all checks; a subject is looked at by those of its type.

    defects = examine([TokenizerSubject(...), ModelSubject(...), RowsSubject(...)])
    defects[0].check, defects[0].where, defects[0].fix

Line: `reason preflight RECIPE`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from distill.preflight_model import LIMIT_CHECKS, MODEL_CHECKS, PAIR_CHECKS, POOL_CHECKS, SPLIT_CHECKS
from distill.preflight_subjects import (
    Defect,
    LimitSubject,
    ModelSubject,
    PairSubject,
    PoolSubject,
    RowsSubject,
    SplitSubject,
    Subject,
    TokenizerSubject,
    TrainingSubject,
)
from distill.preflight_tokens import ROWS_CHECKS, TOKENIZER_CHECKS
from distill.preflight_training import TRAINING_CHECKS

Check = Callable[[Any], Iterator[Defect]]

CHECKS: dict[type, tuple[Check, ...]] = {
    TokenizerSubject: TOKENIZER_CHECKS,
    ModelSubject: MODEL_CHECKS,
    RowsSubject: ROWS_CHECKS,
    PairSubject: PAIR_CHECKS,
    LimitSubject: LIMIT_CHECKS,
    PoolSubject: POOL_CHECKS,
    SplitSubject: SPLIT_CHECKS,
    TrainingSubject: TRAINING_CHECKS,
}


def examine(subjects: Iterable[Subject]) -> list[Defect]:
    """Every defect of every subject, each once, in the order of the table."""
    found = (defect for subject in subjects for check in CHECKS[type(subject)] for defect in check(subject))
    return list(dict.fromkeys(found))
