"""The rules of merging: golden arithmetic, mergekit's results, the ends, the exact threshold, chance, and pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from long2short import merge_rules
from long2short.merge_rules import Rule, dare, linear, merge_tensor, slerp, task_arithmetic, ties, trim_thresholds
from tests.golden.merge_mergekit import CASES, SHAPES

GOLDEN = Path(__file__).parent / "golden" / "merge_mergekit.safetensors"


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def randoms(number: int, seed: int = 0, count: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(number, generator=generator) for _ in range(count))


# --- golden arithmetic ------------------------------------------------------------------------------------------------


def test_the_examples_of_the_docstrings():
    zero = torch.zeros(4)
    assert merge_tensor(Rule(linear), (tensor(2, 1), tensor(-1, 1)), 0.75).tolist() == [1.25, 1.0]
    arc = merge_tensor(Rule(slerp), (tensor(1, 0), tensor(0, 2)), 0.5)
    torch.testing.assert_close(arc, tensor(0.70711, 1.41421), rtol=0, atol=5e-6)
    assert merge_tensor(task_arithmetic(0.5), (tensor(3), tensor(2), tensor(1)), 0.5).tolist() == [1.75]
    deltas = (tensor(1, -2, 0.1, 3), tensor(-0.5, -1, 0.2, -4), zero)
    assert merge_tensor(ties(0.75), deltas, 0.5).tolist() == [1.0, -1.5, 0.0, -4.0]
    drawn = merge_tensor(dare(0.25, seed=0), (torch.ones(1000), torch.zeros(1000), torch.zeros(1000)), 0.5)
    assert set(drawn.tolist()) == {0.0, 2.0}


def test_ties_by_hand():
    # Weighted .25 and .75: (0.25, -0.5, 0.75) and (-0.75, 0.75, 0.75); their sum is (-0.5, 0.25, 1.5).
    parents = (tensor(2, -1, 4), tensor(0, 2, 2), tensor(1, 1, 1))
    assert merge_tensor(ties(1.0), parents, 0.25).tolist() == [0.0, 2.0, 2.5]
    # The sum is not divided: base + -0.75, + 0.75, + 1.5; half of it with scale .5.
    assert merge_tensor(ties(1.0, normalize=False), parents, 0.25).tolist() == [0.25, 1.75, 2.5]
    assert merge_tensor(ties(1.0, 0.5, normalize=False), parents, 0.25).tolist() == [0.625, 1.375, 1.75]
    # A sum of zero elects +.
    assert merge_tensor(ties(1.0), (tensor(3), tensor(-3), tensor(0)), 0.5).tolist() == [3.0]


@pytest.mark.parametrize("case", CASES)
def test_mergekits_results_within_one_ulp(case):
    golden = load_file(GOLDEN)
    method, weight, parameters = CASES[case]
    rule = {
        "linear": lambda: Rule(linear),
        "slerp": lambda: Rule(slerp),
        "ties": lambda: ties(parameters["density"], normalize=parameters.get("normalize", True)),
        "task_arithmetic": lambda: task_arithmetic(),
    }[method]()
    for name in SHAPES:
        parents = tuple(golden[f"{name}.{parent}"].float() for parent in ("long", "short", "base"))
        ours = merge_tensor(rule, parents[: 3 if rule.takes_base else 2], weight).bfloat16()
        theirs = golden[f"{name}.{case}"]
        assert ours.shape == theirs.shape and not torch.equal(theirs.float(), parents[0])
        assert int((in_steps(ours) - in_steps(theirs)).abs().max()) <= 1


def in_steps(values: torch.Tensor) -> torch.Tensor:
    """bf16 as integers that grow by one a step."""
    bits = values.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


# --- properties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule", [Rule(linear), Rule(slerp), task_arithmetic(), ties(1.0), ties(1.0, normalize=False), dare(1.0, seed=0)]
)
def test_the_ends_are_the_parents(rule):
    parents = (tensor(-0.0, 1e-45, 3.0, 1.0), tensor(0.1, 2.0, -0.0, 1e8), tensor(1e9, 0.3, 0.7, -1.0))
    parents = parents if rule.takes_base else parents[:2]
    assert rule.interpolates
    for weight, parent in ((1, parents[0]), (0, parents[1]), (1.0, parents[0])):
        merged = merge_tensor(rule, parents, weight)
        assert torch.equal(merged.view(torch.int32), parent.view(torch.int32))  # bits: -0.0 is not 0.0


@pytest.mark.parametrize("rule", [Rule(linear), Rule(slerp), task_arithmetic(), dare(1.0, seed=0)])
@pytest.mark.parametrize("weight", [1e-4, 1 - 1e-4])
def test_a_sweep_is_continuous_at_its_ends(rule, weight):
    parents = randoms(1000)[: 3 if rule.takes_base else 2]
    parent = parents[0] if weight > 0.5 else parents[1]
    torch.testing.assert_close(merge_tensor(rule, parents, weight), parent, rtol=0, atol=2e-3)


def test_rules_that_do_not_lead_to_a_parent_do_not_say_so():
    for rule in (task_arithmetic(0.7), ties(0.5), ties(1.0, 0.5), dare(0.9, seed=0), dare(1.0, 2.0, seed=0)):
        assert not rule.interpolates
    base = torch.zeros(4)
    assert merge_tensor(ties(0.5), (tensor(1, 2, 3, 4), tensor(9, 9, 9, 9), base), 1).tolist() == [0, 0, 3, 4]


def test_with_whole_deltas_they_are_the_average():
    long, short, base = randoms(5000)
    average = merge_tensor(Rule(linear), (long, short), 0.3)
    torch.testing.assert_close(merge_tensor(task_arithmetic(), (long, short, base), 0.3), average, rtol=0, atol=1e-6)
    torch.testing.assert_close(merge_tensor(dare(1.0, seed=0), (long, short, base), 0.3), average, rtol=0, atol=1e-6)


@given(st.floats(0.05, 0.95), st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_slerp_keeps_the_angle_and_the_length_of_unit_tensors(weight, seed):
    long, short, _ = (values.double() for values in randoms(64, seed))
    long, short = long / long.norm(), short / short.norm()
    merged = merge_tensor(Rule(slerp), (long.float(), short.float()), weight).double()
    whole, part = torch.acos(long @ short), torch.acos((merged @ short) / merged.norm())
    assert float(merged.norm()) == pytest.approx(1, abs=1e-5)
    assert float(part / whole) == pytest.approx(weight, abs=1e-4)


def test_slerp_of_parallel_opposite_and_zero_tensors():
    one = tensor(1, 2, 3)
    torch.testing.assert_close(merge_tensor(Rule(slerp), (2 * one, one), 0.25), 1.25 * one)
    torch.testing.assert_close(merge_tensor(Rule(slerp), (-one, one), 0.25), 0.5 * one)
    assert merge_tensor(Rule(slerp), (torch.zeros(3), torch.zeros(3)), 0.5).tolist() == [0, 0, 0]
    torch.testing.assert_close(merge_tensor(Rule(slerp), (one, torch.zeros(3)), 0.5), one * 0.5**0.5)


@pytest.mark.parametrize("rule", [Rule(linear), Rule(slerp), task_arithmetic(0.7), ties(0.6), dare(0.5, seed=0)])
def test_a_tensor_without_elements_stays_one(rule):
    nothing = torch.zeros(0, 4)
    assert merge_tensor(rule, (nothing,) * (3 if rule.takes_base else 2), 0.5).shape == (0, 4)


# --- the threshold of TIES --------------------------------------------------------------------------------------------


def thresholds(long: torch.Tensor, short: torch.Tensor, density: float) -> tuple[float, float]:
    pieces = [(a.clone(), b.clone(), torch.zeros_like(a)) for a, b in zip(long.split(7), short.split(7), strict=True)]
    return trim_thresholds(lambda look: (look(tuple(p.clone() for p in piece)) for piece in pieces), density)


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=60),
    st.floats(0.01, 1.0, exclude_max=True),
    st.integers(0, 9),
)
@settings(max_examples=100, deadline=None)
def test_the_threshold_is_the_kth_largest_magnitude(values, density, repeat):
    long = tensor(*values, *values[:1] * repeat)
    short = long.flip(0) * 3e-20  # down to denormal numbers
    wanted = max(1, int(density * long.numel()))
    found = thresholds(long, short, density)
    for parent, threshold in zip((long, short), found, strict=True):
        assert threshold == float(parent.abs().sort(descending=True).values[wanted - 1])


def test_equals_at_the_threshold_all_stay():
    base = torch.zeros(6)
    parents = (tensor(5, -2, 2, 2, 1, 0), base.clone(), base)
    assert merge_tensor(ties(0.34), parents, 0.5).tolist() == [5, -2, 2, 2, 0, 0]  # two were asked for
    assert merge_tensor(ties(0.01), parents, 0.5).tolist() == [5, 0, 0, 0, 0, 0]  # at least one


# --- chance and pieces ------------------------------------------------------------------------------------------------


def test_dare_is_seeded_per_tensor_parent_and_piece(monkeypatch):
    monkeypatch.setattr(merge_rules, "PIECE", 4000)
    ones, zeros = torch.ones(8000), torch.zeros(8000)
    one = merge_tensor(dare(0.5, seed=1), (ones, zeros, zeros), 0.5, "a")
    assert torch.equal(one, merge_tensor(dare(0.5, seed=1), (ones, zeros, zeros), 0.5, "a"))
    assert not torch.equal(one, merge_tensor(dare(0.5, seed=2), (ones, zeros, zeros), 0.5, "a"))
    assert not torch.equal(one, merge_tensor(dare(0.5, seed=1), (ones, zeros, zeros), 0.5, "b"))
    assert not torch.equal(one[:4000], one[4000:])
    both = merge_tensor(dare(0.5, seed=1), (ones, 2 * ones, zeros), 0.5, "a")
    assert set(both.tolist()) == {0.0, 1.0, 2.0, 3.0}  # the two parents are drawn apart
    # Within five standard errors of what was asked for.
    assert float(one.mean()) == pytest.approx(0.5, abs=5 * 0.5 / 8000**0.5)


@pytest.mark.parametrize("rule", [Rule(linear), Rule(slerp), task_arithmetic(0.7), ties(0.6)])
def test_the_size_of_pieces_does_not_matter(rule, monkeypatch):
    parents = randoms(1000)[: 3 if rule.takes_base else 2]
    whole = merge_tensor(rule, parents, 0.4)
    monkeypatch.setattr(merge_rules, "PIECE", 17)
    torch.testing.assert_close(merge_tensor(rule, parents, 0.4), whole, rtol=1e-5, atol=1e-7)
    assert torch.equal(parents[0], randoms(1000)[0])  # parents are left as they are
