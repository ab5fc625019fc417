"""The losses: hand-worked values of every slot, and what must not change them (padding, order, micro-batches)."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.kl import KLTerm, k2, k3, k3_corrected
from rl.mismatch import IcePop, TruncatedIS
from rl.objectives import (
    Constant,
    LossInputs,
    Objective,
    OffPolicyMask,
    SequenceMean,
    SequenceSum,
    TokenMean,
    cispo,
    dapo,
    dr_grpo,
    grpo,
    gspo,
    kimi,
    luspo,
    policy_loss,
    r1,
    sapo,
    sequence_log_ratio,
    sequence_mean_log_ratio,
    token_log_ratio,
    vespo,
)
from rl.rules import Cispo, Clip, MirrorDescent, Sapo, Vespo

EVERYTHING = Objective(
    token_log_ratio, Clip(0.2, 0.28, dual=3.0), TokenMean(), OffPolicyMask(0.05), IcePop(0.8, 1.2),
    KLTerm(k3_corrected, 0.1),
)  # fmt: skip
NAMED = {
    "grpo": grpo(), "grpo+kl": grpo(KLTerm(k3, 0.04)), "r1": r1(), "dapo": dapo(), "dr_grpo": dr_grpo(32),
    "gspo": gspo(), "luspo": luspo(), "cispo": cispo(1.1), "sapo": sapo(), "vespo": vespo(), "kimi": kimi(0.3),
    "everything": EVERYTHING,
}  # fmt: skip


def make_inputs(lengths=(5, 2, 0, 7), width=7, seed=0) -> LossInputs:
    """Rows of the given lengths; old, sampler and ref log-probs lie around the policy's; doubles."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale):
        return scale * torch.randn(len(lengths), width, generator=generator, dtype=torch.double)

    policy = -1 - noise(0.5).abs()
    old = policy + noise(0.3)
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    advantages = torch.randn(len(lengths), generator=generator, dtype=torch.double)
    return LossInputs(policy, old, old + noise(0.1), advantages, mask, policy + noise(0.3))


def loss_and_gradient(objective, inputs, denominator=10.0):
    policy = inputs.policy_logprobs.clone().requires_grad_()
    loss, sums = policy_loss(objective, replace(inputs, policy_logprobs=policy), denominator)
    loss.backward()
    assert policy.grad is not None
    return loss.detach(), policy.grad, sums


def ratios(values, advantage=1.0) -> LossInputs:
    """One completion with the given probability ratios."""
    policy = torch.tensor([values], dtype=torch.double).log()
    zeros = torch.zeros_like(policy)
    return LossInputs(policy, zeros, zeros, torch.tensor([advantage], dtype=torch.double), torch.ones_like(policy))


def token_losses(rule, values, advantage):
    inputs = ratios(values, advantage)
    log_ratio = token_log_ratio(inputs)
    losses, bounded = rule(inputs.policy_logprobs, log_ratio, inputs.advantages.unsqueeze(-1))
    return losses[0].tolist(), bounded[0].tolist()


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "clipped"),
    [(1.5, 1.0, 1.28, True), (0.5, 1.0, 0.5, False), (1.5, -1.0, -1.5, False), (0.5, -1.0, -0.8, True)],
)
def test_clip_higher(ratio, advantage, expected, clipped):
    losses, bounded = token_losses(Clip(0.2, 0.28), [ratio], advantage)
    assert losses == pytest.approx([-expected])
    assert bounded == [clipped]


def test_a_negative_advantage_is_bounded_by_dual_clip_and_by_delta():
    ratios = [0.5, 1.0, 2.0, 7.0]
    free, _ = token_losses(Clip(0.2, 0.28), ratios, -1.0)
    dual, bounded = token_losses(Clip(0.2, 0.28, dual=3.0), ratios, -1.0)
    assert free == pytest.approx([0.8, 1, 2, 7])
    assert dual == pytest.approx([0.8, 1, 2, 3])
    assert bounded == [True, False, False, True]
    # above 1 + high the two-sided clip is the dual clip; neither touches a positive advantage
    assert token_losses(Clip(0.2, 0.28, delta=3.0), ratios, -1.0) == (pytest.approx(dual), bounded)
    for rule in (Clip(0.2, 0.28, dual=3.0), Clip(0.2, 0.28, delta=3.0)):
        assert token_losses(rule, ratios, 1.0) == token_losses(Clip(0.2, 0.28), ratios, 1.0)
    # R1's wide clip does not protect from large ratios, dual clip does, below 1 + high too
    assert token_losses(Clip(10, 10), [7.0], -1.0)[0] == pytest.approx([7])
    assert token_losses(Clip(10, 10, dual=3.0), [7.0], -1.0)[0] == pytest.approx([3])


def test_cispo_caps_the_weight_and_keeps_the_gradient():
    policy = torch.tensor([[-0.5, -0.5]], requires_grad=True)
    losses, bounded = Cispo(5.0)(policy, torch.tensor([[7.0, 2.0]]).log(), torch.tensor([[1.0]]))
    assert losses.tolist() == [pytest.approx([2.5, 1.0])]
    assert bounded.tolist() == [[True, False]]
    losses.sum().backward()
    assert policy.grad is not None and policy.grad.tolist() == [pytest.approx([-5, -2])]


def test_sapo_gate():
    losses, _ = token_losses(Sapo(), [0.5, 1.0, 1.5], 1.0)
    assert losses == pytest.approx([-1.5102, -2.0, -2.4898], abs=1e-4)
    negative, _ = token_losses(Sapo(), [0.5, 1.0, 1.5], -1.0)
    # τ 1.05: 4/τ σ(±.525) = 3.80952 · (.371683, .5, .628317)
    assert negative == pytest.approx([1.41593, 1.90476, 2.39359], abs=1e-4)
    policy = torch.zeros(1, 1, requires_grad=True)
    Sapo()(policy, policy, torch.tensor([[1.0]]))[0].sum().backward()
    assert policy.grad is not None and policy.grad.item() == pytest.approx(-1)  # slope 1 at ratio 1


@pytest.mark.parametrize(("advantage", "expected"), [(1.0, [1.1204, 1, 0.1991]), (-1.0, [0.3398, 1, 1.0827])])
def test_vespo_weight(advantage, expected):
    log_w = torch.tensor([[0.5, 1.0, 2.0]]).log()
    losses, _ = Vespo()(torch.ones(1, 3), log_w, torch.tensor([[advantage]]))
    assert (-advantage * losses)[0].tolist() == pytest.approx(expected, abs=1e-4)
    extreme, _ = Vespo()(torch.ones(1, 2), torch.tensor([[math.inf, -math.inf]]), torch.tensor([[advantage]]))
    assert extreme[0].tolist() == pytest.approx([0, 0], abs=1e-6)


def test_kimi_coefficients():
    # r = [1, 0, 1, 0], mean .5, Δ = [.2, −.1, 0, .4], τ .5
    advantages, delta = torch.tensor([[0.5], [-0.5], [0.5], [-0.5]]), torch.tensor([[0.2], [-0.1], [0.0], [0.4]])
    losses, _ = MirrorDescent(0.5)(torch.ones(4, 1), delta, advantages)
    assert (-losses[:, 0]).tolist() == pytest.approx([0.4, -0.45, 0.5, -0.7])
    assert losses.square().mean().item() == pytest.approx(0.275625)


def test_kimi_gradient_is_the_papers():
    """−(1/N) Σ_j [(r_j − r̄) ∇log π(y_j) − (τ/2) ∇Δ_j²] by autograd, and 1/(2τ) of the literal squared loss's."""
    inputs, tau = make_inputs(), 0.3
    _, got, _ = loss_and_gradient(kimi(tau), inputs, denominator=4.0)
    policy = inputs.policy_logprobs.clone().requires_grad_()
    logprobs = torch.where(inputs.mask > 0, policy, 0).sum(-1)
    delta = torch.where(inputs.mask > 0, policy - inputs.old_logprobs, 0).sum(-1)
    paper = -(inputs.advantages * logprobs - tau / 2 * delta.square()).sum() / 4
    assert torch.allclose(got, torch.autograd.grad(paper, policy, retain_graph=True)[0], atol=1e-12)
    squared = (inputs.advantages - tau * delta).square().sum() / 4
    assert torch.allclose(2 * tau * got, torch.autograd.grad(squared, policy)[0], atol=1e-12)


def test_ratio_levels():
    inputs = ratios([1.1, 0.95, 1.3, 0.9])
    assert token_log_ratio(inputs).exp()[0].tolist() == pytest.approx([1.1, 0.95, 1.3, 0.9])
    assert sequence_log_ratio(inputs).exp()[0].tolist() == pytest.approx([1.1 * 0.95 * 1.3 * 0.9] * 4)
    assert sequence_mean_log_ratio(inputs).exp()[0].tolist() == pytest.approx([1.0515394] * 4)


def test_r1_is_one_term_per_completion():
    """(1/N) Σ_i min(ρ_i A_i, clip(ρ_i) A_i) with the product ρ_i, value and gradient, written out."""
    inputs = make_inputs(seed=5)
    objective = replace(r1(), rule=Clip(0.2, 0.2), kl=None)
    loss, gradient, sums = loss_and_gradient(objective, inputs, denominator=4.0)
    policy = inputs.policy_logprobs.clone().requires_grad_()
    ratio = torch.where(inputs.mask > 0, policy - inputs.old_logprobs, 0).sum(-1).exp()
    terms = torch.minimum(ratio * inputs.advantages, ratio.clamp(0.8, 1.2) * inputs.advantages)[[0, 1, 3]]
    expected = -terms.sum() / 4  # the completion without tokens adds nothing
    expected.backward()
    assert policy.grad is not None
    assert loss.item() == pytest.approx(expected.item())
    assert torch.allclose(gradient, policy.grad, atol=1e-12)
    assert 0 < sums["clip_share"].item() < inputs.mask.sum().item()  # both kinds are in the case


def test_gspo_gradient_is_that_of_the_geometric_mean():
    inputs = make_inputs()
    _, gradient, _ = loss_and_gradient(replace(gspo(), rule=Clip(0.2, 0.2)), inputs, denominator=4.0)
    policy = inputs.policy_logprobs.clone().requires_grad_()
    sums = torch.where(inputs.mask > 0, policy - inputs.old_logprobs, 0).sum(-1)
    ratio = (sums / inputs.mask.sum(-1).clamp(min=1)).exp()
    terms = torch.minimum(ratio * inputs.advantages, ratio.clamp(0.8, 1.2) * inputs.advantages)
    (-terms.sum() / 4).backward()
    assert policy.grad is not None and gradient.abs().max() > 0
    assert torch.allclose(gradient, policy.grad, atol=1e-12)


@pytest.mark.parametrize(
    ("aggregation", "denominator", "short", "long"),
    [
        (SequenceMean(), 2, 1 / 4, 1 / 16),
        (TokenMean(), 10, 1 / 10, 1 / 10),
        (SequenceSum(), 2, 1 / 2, 1 / 2),
        (Constant(16), 32, 1 / 32, 1 / 32),
    ],
)
def test_aggregations_weigh_tokens(aggregation, denominator, short, long):
    """A = +1 on 2 tokens, A = −1 on 8 tokens."""
    assert aggregation.denominator([2, 8]) == denominator
    policy = torch.zeros(2, 8)
    mask = torch.tensor([[1] * 2 + [0] * 6, [1] * 8])
    inputs = LossInputs(policy, policy, policy, torch.tensor([1.0, -1.0]), mask)
    loss, gradient, _ = loss_and_gradient(Objective(token_log_ratio, Clip(0.2, 0.2), aggregation), inputs, denominator)
    assert gradient[0].tolist() == pytest.approx([-short] * 2 + [0] * 6)
    assert gradient[1].tolist() == pytest.approx([long] * 8)
    assert loss.item() == pytest.approx(8 * long - 2 * short)


def test_denominators_count_completions_without_rows_and_are_never_zero():
    for aggregation, expected in [(TokenMean(), 10), (SequenceMean(), 3), (SequenceSum(), 3), (Constant(16), 48)]:
        assert aggregation.denominator([2, 8, 0]) == expected
        assert aggregation.denominator([]) > 0
        assert aggregation.denominator([0]) > 0


def test_off_policy_mask_drops_only_negatives_that_drifted():
    policy = torch.zeros(5, 2)
    # means .25, .125, .25, .25, .25 (one token)
    sampler = torch.tensor([[0.375, 0.125], [0.25, 0.0], [0.375, 0.125], [0.375, 0.125], [0.25, 9.0]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 1], [1, 0]])
    inputs = LossInputs(policy, policy, sampler, torch.tensor([-1.0, -1.0, 1.0, 0.0, -1.0]), mask)
    kept = OffPolicyMask(0.125)(inputs.without_padding())
    assert kept[:, 0].tolist() == [False, True, True, True, False]
    objective = replace(dapo(), mask=OffPolicyMask(0.125))
    _, gradient, sums = loss_and_gradient(objective, inputs, denominator=9.0)
    # what is dropped has no gradient; what stays still has 1/9 a token
    assert gradient[[0, 3, 4]].abs().max() == 0
    assert gradient[[1, 2]].tolist() == [pytest.approx([1 / 9, 1 / 9]), pytest.approx([-1 / 9, -1 / 9])]
    assert sums["off_policy_share"].item() == 3


def test_correction_multiplies_the_surrogate_and_not_the_kl():
    inputs = make_inputs()
    plain, kl = replace(EVERYTHING, mask=None, correction=None, kl=None), EVERYTHING.kl
    weights = TruncatedIS(1.05)(inputs.old_logprobs, inputs.sampler_logprobs)
    _, surrogate, _ = loss_and_gradient(plain, inputs)
    _, both, sums = loss_and_gradient(replace(plain, correction=TruncatedIS(1.05), kl=kl), inputs)
    _, only_kl, _ = loss_and_gradient(replace(plain, kl=kl), replace(inputs, advantages=torch.zeros(4).double()))
    assert torch.allclose(both, weights * surrogate + only_kl, atol=1e-12)
    assert sums["correction_weight"].item() == pytest.approx(weights[inputs.mask > 0].sum().item())


def test_sums_that_are_reported():
    inputs = replace(ratios([1.5, 0.9, 1.0]), ref_logprobs=torch.zeros(1, 3, dtype=torch.double))
    correction, kl = IcePop(0.5, 5.0), KLTerm(k2, 0.01)
    sampler = torch.tensor([[0.3, 0.9, 6.0]], dtype=torch.double).log().neg()  # π_old/π_sampler = .3, .9, 6
    objective = replace(dapo(), correction=correction, kl=kl)
    loss, sums = policy_loss(objective, replace(inputs, sampler_logprobs=sampler), 3.0)
    divergence = 0.5 * (math.log(1.5) ** 2 + math.log(0.9) ** 2)
    assert {name: value.item() for name, value in sums.items()} == {
        "clip_share": 1, "ratio_error": pytest.approx(0.6), "correction_weight": pytest.approx(0.9),
        "correction_masked": 2, "kl": pytest.approx(divergence),
    }  # fmt: skip
    assert loss.item() == pytest.approx((-0.9 * 0.9 + 0.01 * divergence) / 3)


@pytest.mark.parametrize("name", NAMED)
def test_padding_never_reaches_the_loss_or_the_gradient(name):
    """Rows of length 5, 2, 0 and 7 with garbage behind them, one row without any trained token, wider padding."""
    inputs = make_inputs()
    loss, gradient, sums = loss_and_gradient(NAMED[name], inputs)
    assert gradient.abs().max() > 0
    wide = torch.cat([inputs.mask, torch.zeros(4, 2, dtype=torch.long)], dim=1)
    for garbage in (float("nan"), float("inf"), -float("inf"), 1e30):

        def dirty(values, garbage=garbage):
            padded = torch.cat([values, torch.zeros(4, 2, dtype=torch.double)], dim=1)
            return torch.where(wide > 0, padded, garbage)

        other = LossInputs(
            dirty(inputs.policy_logprobs), dirty(inputs.old_logprobs), dirty(inputs.sampler_logprobs),
            inputs.advantages, wide, dirty(inputs.ref_logprobs),
        )  # fmt: skip
        dirty_loss, dirty_gradient, dirty_sums = loss_and_gradient(NAMED[name], other)
        assert dirty_loss.item() == pytest.approx(loss.item(), rel=1e-12)
        assert torch.allclose(dirty_gradient[:, :7], gradient, rtol=1e-12, atol=0)
        assert (dirty_gradient[wide == 0] == 0).all()
        assert dirty_sums == {key: pytest.approx(value) for key, value in sums.items()}


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(sorted(NAMED)),
    lengths=st.lists(st.integers(0, 6), min_size=2, max_size=6),
    cut=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_micro_batches_and_order_do_not_matter(name, lengths, cut, seed):
    objective = NAMED[name]
    inputs = make_inputs(lengths, width=6, seed=seed)
    denominator = objective.aggregation.denominator(lengths)
    loss, gradient, sums = loss_and_gradient(objective, inputs, denominator)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    parts = [part for part in (order[:cut], order[cut:]) if len(part)]
    results = [loss_and_gradient(objective, rows(inputs, part), denominator) for part in parts]
    assert sum(result[0] for result in results) == pytest.approx(loss.item(), rel=1e-9, abs=1e-12)
    for part, result in zip(parts, results, strict=True):
        assert torch.allclose(result[1], gradient[part], rtol=1e-12, atol=0)
    for key, value in sums.items():
        assert sum(result[2][key] for result in results) == pytest.approx(value.item(), rel=1e-9, abs=1e-12)


def rows(inputs: LossInputs, index) -> LossInputs:
    ref = None if inputs.ref_logprobs is None else inputs.ref_logprobs[index]
    return LossInputs(
        inputs.policy_logprobs[index], inputs.old_logprobs[index], inputs.sampler_logprobs[index],
        inputs.advantages[index], inputs.mask[index], ref,
    )  # fmt: skip


ON_POLICY = ["grpo", "r1", "dapo", "dr_grpo", "gspo", "luspo", "cispo", "sapo", "vespo", "kimi"]


@pytest.mark.parametrize("name", ON_POLICY)
def test_on_policy_every_method_is_the_policy_gradient_with_its_aggregation(name):
    """At ratio 1 all rules have the slope A: gradients differ by the aggregation alone."""
    objective = replace(NAMED[name], kl=None)
    inputs = make_inputs()
    inputs = replace(inputs, old_logprobs=inputs.policy_logprobs, sampler_logprobs=inputs.policy_logprobs)
    _, gradient, sums = loss_and_gradient(objective, inputs, denominator=1.0)
    share = torch.ones(4, 1).double()
    if isinstance(objective.aggregation, SequenceMean) and objective.ratio is not sequence_log_ratio:
        share = 1 / inputs.mask.sum(-1, keepdim=True).clamp(min=1).double()
    assert torch.allclose(gradient, -share * inputs.advantages.unsqueeze(-1) * inputs.mask, atol=1e-12)
    assert sums["ratio_error"].item() == 0


def test_extreme_log_ratios_stay_finite():
    policy, zeros = torch.tensor([[-900.0, 0.0]]), torch.zeros(1, 2)
    for name in ON_POLICY:
        for old in (zeros, torch.full((1, 2), -900.0)):
            inputs = LossInputs(policy, old, old, torch.tensor([-1.0]), torch.ones(1, 2), zeros)
            loss, gradient, _ = loss_and_gradient(NAMED[name], inputs)
            assert loss.isfinite() and gradient.isfinite().all(), name


@pytest.mark.parametrize("name", NAMED)
def test_a_nan_on_a_trained_token_is_not_hidden(name):
    inputs = make_inputs()
    spoiled = inputs.policy_logprobs.clone()
    spoiled[0, 1] = float("nan")
    for sign in (1, -1):
        advantages = sign * inputs.advantages.abs()
        loss, _ = policy_loss(NAMED[name], replace(inputs, policy_logprobs=spoiled, advantages=advantages), 1.0)
        assert loss.isnan()


@pytest.mark.parametrize("name", NAMED)
def test_rows_without_advantage_have_no_gradient_unless_the_objective_says_so(name):
    inputs = replace(make_inputs(), advantages=torch.zeros(4, dtype=torch.double))
    _, gradient, _ = loss_and_gradient(NAMED[name], inputs)
    assert NAMED[name].needs_all_rows == bool(gradient.abs().max() > 0)
    assert NAMED[name].needs_all_rows == (name in ("grpo+kl", "r1", "kimi", "everything"))


@pytest.mark.parametrize("name", NAMED)
def test_objectives_are_picklable_values(name):
    assert pickle.dumps(NAMED[name])
    assert copy.deepcopy(NAMED[name]) == NAMED[name]


def test_named_objectives_have_their_papers_numbers():
    assert dapo().rule == Clip(0.2, 0.28)
    assert r1().rule == Clip(10, 10) and r1().kl == KLTerm(k3, 0.001)
    assert gspo().rule == Clip(3e-4, 4e-4)
    assert luspo().rule == Clip(2e-3, 2.5e-3)
    assert cispo().rule == Cispo(5.0)
    assert dr_grpo(3000).aggregation.denominator([7, 9]) == 6000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Objective(token_log_ratio, MirrorDescent(0.1), SequenceSum()), "needs ratio=sequence_log_ratio"),
        (lambda: Objective(sequence_mean_log_ratio, Vespo(), TokenMean()), "needs ratio=sequence_log_ratio"),
        (lambda: Objective(sequence_log_ratio, Clip(10, 10), TokenMean()), r"needs SequenceMean\(\)"),
        (lambda: Clip(0.0, 0.2), "above 0; got 0.0 and 0.2"),
        (lambda: Clip(0.2, 0.2, dual=3.0, delta=4.0), "one of them"),
        (lambda: Clip(0.2, 0.2, dual=1.0), "dual must be above 1"),
        (lambda: Clip(0.2, 0.28, delta=1.2), "above 1 [+] high = 1.28"),
        (lambda: Cispo(0.28), "bounds the ratio"),
        (lambda: Sapo(0.0), "above 0"),
        (lambda: MirrorDescent(-0.1), "at least 0"),
        (lambda: Constant(0), "at least 1 token"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_kl_term_without_reference_is_refused():
    with pytest.raises(ValueError, match="needs ref_logprobs"):
        policy_loss(r1(), replace(make_inputs(), ref_logprobs=None), 1.0)
