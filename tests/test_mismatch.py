"""Sampler against trainer: correction weights, and figures that add up over micro-batches and ranks."""

import json
import math
from typing import ClassVar

import pytest
import torch

from rl.mismatch import LENGTH_EDGES, IcePop, Mismatch, TruncatedIS
from rl.ranks import Ranks


def old_and_sampler(ratios):
    return torch.tensor([ratios]).log(), torch.zeros(1, len(ratios))


def test_truncated_importance_sampling():
    assert TruncatedIS(2.0)(*old_and_sampler([0.3, 0.9, 1.5, 4]))[0].tolist() == pytest.approx([0.3, 0.9, 1.5, 2])


def test_icepop_leaves_out_what_is_outside_the_window():
    assert IcePop(0.5, 5)(*old_and_sampler([0.3, 0.9, 1.5, 4, 6]))[0].tolist() == pytest.approx([0, 0.9, 1.5, 4, 0])
    # both ends belong to it (exp of an exact log-ratio of 0)
    assert IcePop(1.0, 5.0)(*old_and_sampler([1.0]))[0].tolist() == [1.0]
    assert IcePop(0.5, 1.0)(*old_and_sampler([1.0]))[0].tolist() == [1.0]


def test_weights_are_detached_and_finite():
    old = torch.tensor([[1000.0, -1000.0, 0.1]], requires_grad=True)
    for correction in (TruncatedIS(2.0), IcePop(0.5, 5.0)):
        weights = correction(old, torch.zeros(1, 3))
        assert not weights.requires_grad
        assert weights.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: TruncatedIS(0.0), "cap must be above 0"), (lambda: IcePop(5.0, 0.5), "low 5.0 and high 0.5")],
)
def test_bounds_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_figures_of_one_short_completion():
    old, sampler = torch.tensor([[-0.9, -1.3, 7.0]]), torch.tensor([[-1.0, -1.0, float("nan")]])
    weights = torch.tensor([[1.1, 0.0, 0.0]])
    means = Mismatch.of(old, sampler, torch.tensor([[1, 1, 0]]), weights).means()
    k3 = (math.exp(0.1) - 1 - 0.1 + math.exp(-0.3) - 1 + 0.3) / 2
    expected = {"mismatch_mean": 0.2, "mismatch_max": 0.3, "mismatch_k3": k3, "mismatch_masked": 0.5}
    assert k3 == pytest.approx(0.02299, abs=1e-5)
    assert means == {
        **{name: pytest.approx(value, rel=1e-5) for name, value in expected.items()},
        **{f"{name}/1-128": pytest.approx(value, rel=1e-5) for name, value in expected.items()},
    }


def test_length_buckets():
    """128 tokens belong to the first bucket, 129 to the second; empty buckets are not reported."""
    width = 1100
    lengths = [128, 129, 1025, 0]
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    difference = torch.tensor([0.1, 0.2, 0.4, 0.8]).unsqueeze(-1).expand(4, width)
    means = Mismatch.of(difference, torch.zeros(4, width), mask).means()
    names = {name.partition("/")[2] for name in means}
    assert names == {"", "1-128", "129-1024", "1025-4096"}
    assert [means[f"mismatch_max/{n}"] for n in ("1-128", "129-1024", "1025-4096")] == pytest.approx([0.1, 0.2, 0.4])
    assert means["mismatch_max"] == pytest.approx(0.4)
    assert means["mismatch_mean"] == pytest.approx((128 * 0.1 + 129 * 0.2 + 1025 * 0.4) / (128 + 129 + 1025))
    assert LENGTH_EDGES == (128, 1024, 4096, 16384)


def made(rows=6, width=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    mask = (torch.arange(width) < lengths.unsqueeze(-1)).long()
    sampler = -torch.rand(rows, width, generator=generator)
    old = sampler + 0.1 * torch.randn(rows, width, generator=generator)
    return old, sampler, mask, IcePop(0.9, 1.1)(old, sampler)


def test_micro_batches_add_up():
    tensors = made()
    whole = Mismatch.of(*tensors).means()
    total = Mismatch()
    for part in ([0], [1, 2, 3], [4, 5]):
        total.add(Mismatch.of(*(tensor[part] for tensor in tensors)))
    total.add(Mismatch())
    assert total.means() == {name: pytest.approx(value, rel=1e-9) for name, value in whole.items()}
    assert 0 < whole["mismatch_masked"] < 1


def test_nothing_measured_is_not_reported_as_zero():
    assert Mismatch().means() == {}
    assert Mismatch.of(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2)).means() == {}


class Exchange(Ranks):
    """Two ranks in one process: what the first one sends, as JSON, reaches the second."""

    sent: ClassVar[list[str]] = []

    def gather(self, values):
        earlier = [value for text in self.sent for value in json.loads(text)]
        self.sent.append(json.dumps(list(values)))
        return [*earlier, *values]


def test_ranks_add_up_and_one_may_have_had_no_rows():
    tensors = made()
    first, second = (Mismatch.of(*(tensor[part] for tensor in tensors)) for part in ([0, 1], [2, 3, 4, 5]))
    exchange = Exchange(0, 2)
    assert Mismatch().means(exchange) == {}
    alone = first.means(exchange)
    assert alone == first.means()
    whole = {name: pytest.approx(value, rel=1e-9) for name, value in Mismatch.of(*tensors).means().items()}
    assert second.means(exchange) == whole
