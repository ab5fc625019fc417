"""KL estimators: hand-worked values, and the gradients that decide where each of them may be used."""

import math

import pytest
import torch

from rl.kl import KLTerm, bounded_exp, k2, k3, k3_corrected, kl_in_reward

LOGITS = torch.tensor([0.3, -0.2, 0.5], dtype=torch.double)
REF = torch.log_softmax(torch.tensor([0.0, 0.4, -0.1], dtype=torch.double), 0)
OLD = torch.log_softmax(torch.tensor([0.6, 0.1, 0.2], dtype=torch.double), 0)


def gradient(value_of):
    """d value/d logits of a three-way choice; `value_of` takes the policy's log-probs."""
    logits = LOGITS.clone().requires_grad_()
    return torch.autograd.grad(value_of(torch.log_softmax(logits, 0)), logits)[0]


def reverse_kl(policy):
    return (policy.exp() * (policy - REF)).sum()


def forward_kl(policy):
    return (REF.exp() * (REF - policy)).sum()


@pytest.mark.parametrize(
    ("policy", "ref", "expected_k1", "expected_k2", "expected_k3"),
    [(0.5, 0.4, 0.22314, 0.024897, 0.023144), (0.4, 0.5, -0.22314, 0.024897, 0.026856)],
)
def test_values(policy, ref, expected_k1, expected_k2, expected_k3):
    assert kl_in_reward([math.log(policy)], [math.log(ref)], 1.0) == pytest.approx(-expected_k1, abs=1e-5)
    policy, ref = torch.tensor([[math.log(policy)]]), torch.tensor([[math.log(ref)]])
    assert k2(policy, ref, policy).item() == pytest.approx(expected_k2, abs=1e-6)
    assert k3(policy, ref, policy).item() == pytest.approx(expected_k3, abs=1e-6)
    assert k3_corrected(policy, ref, policy).item() == pytest.approx(expected_k3, abs=1e-6)
    # off-policy, the corrected one is weighted by π/π_old = 2
    assert k3_corrected(policy, ref, policy - math.log(2)).item() == pytest.approx(2 * expected_k3, abs=1e-6)


def test_on_policy_gradients_are_those_of_the_divergence_each_claims():
    """Over all outcomes: k2 and corrected k3 have the gradient of KL(π‖ref), k3 that of KL(ref‖π)."""
    for estimator, divergence in [(k2, reverse_kl), (k3_corrected, reverse_kl), (k3, forward_kl)]:
        got = gradient(lambda p, e=estimator: (p.detach().exp() * e(p, REF, p.detach())).sum())
        assert torch.allclose(got, gradient(divergence), atol=1e-12), estimator.__name__
    assert not torch.allclose(gradient(reverse_kl), gradient(forward_kl), atol=1e-2)


def test_off_policy_only_the_corrected_one_is_unbiased():
    """Tokens drawn from another policy: value and gradient of KL(π‖ref) for k3_corrected, not for the others."""
    policy = torch.log_softmax(LOGITS, 0)
    value = (OLD.exp() * k3_corrected(policy, REF, OLD)).sum()
    assert value.item() == pytest.approx(reverse_kl(policy).item())
    for estimator, right in [(k3_corrected, True), (k2, False), (k3, False)]:
        got = gradient(lambda p, e=estimator: (OLD.exp() * e(p, REF, OLD)).sum())
        assert torch.allclose(got, gradient(reverse_kl), atol=1e-3) == right, estimator.__name__


def test_k1_under_a_gradient_would_average_to_nothing():
    """Why there is no k1 among the estimators: E[∇k1] is zero, whatever the distance."""
    got = gradient(lambda p: (p.detach().exp() * (p - REF)).sum())
    assert got.abs().max() < 1e-15
    assert gradient(reverse_kl).abs().max() > 0.05


def test_k1_in_the_reward_has_the_gradient_of_the_reverse_kl():
    """REINFORCE on the detached −k1 descends KL(π‖ref)."""
    got = gradient(lambda p: (p.detach().exp() * -(p.detach() - REF) * p).sum())
    assert torch.allclose(got, -gradient(reverse_kl), atol=1e-12)


def test_kl_in_reward_sums_over_the_completion():
    # TULU 3: reward 10, β .05, a KL sum of 20
    assert 10 + kl_in_reward([-1.0, -2.0, -0.5], [-11.0, -8.0, -4.5], 0.05) == pytest.approx(9.0)
    assert kl_in_reward([], [], 0.05) == 0
    with pytest.raises(ValueError):
        kl_in_reward([-1.0], [], 0.05)


def test_ratios_are_clamped_before_exp():
    far, zero = torch.tensor([-1000.0]), torch.tensor([0.0])
    assert bounded_exp(-far).item() == pytest.approx(math.exp(20), rel=1e-6)
    assert k3(far, zero, far).isfinite().all()
    assert k3_corrected(zero, far, far).isfinite().all()


@pytest.mark.parametrize("coefficient", [0.0, -0.1, float("nan")])
def test_a_term_needs_a_weight(coefficient):
    with pytest.raises(ValueError, match="coefficient must be above 0"):
        KLTerm(k3, coefficient)
