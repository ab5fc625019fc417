"""Every family of objectives learns: a table of logits as the policy, rewards with a known optimum, seconds.

A *problem* is a (T, V) table; a completion draws token t from softmax(table[t]). Each batch serves several updates, so
that ratios leave 1 and the rules have something to do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from rl.advantages import LogPartition, StdNormalized, centred
from rl.objectives import LossInputs, Objective, cispo, dapo, gspo, kimi, luspo, policy_loss, r1, sapo, vespo
from rl.rules import Clip

PROBLEMS, GROUP, T, V = 4, 8, 4, 4
EOS = 0
UPDATES = 4  # a batch

Reward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # tokens (..., T), lengths (...) -> rewards (...)
MakeOptimizer = Callable[[list[torch.Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True, slots=True)
class Batch:
    tokens: torch.Tensor  # (PROBLEMS * GROUP, T)
    logprobs: torch.Tensor  # of the sampler
    mask: torch.Tensor
    rewards: torch.Tensor  # (PROBLEMS, GROUP)


def logprobs_of(tables: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(PROBLEMS, T, V) and (PROBLEMS * GROUP, T) -> (PROBLEMS * GROUP, T)."""
    rows = torch.log_softmax(tables, -1).repeat_interleave(GROUP, 0)
    return rows.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def sample(tables: torch.Tensor, reward: Reward, generator: torch.Generator, stops: bool) -> Batch:
    """With `stops`, a completion ends with its first EOS; without, it always has T tokens."""
    probabilities = torch.softmax(tables, -1).repeat_interleave(GROUP, 0)
    tokens = torch.multinomial(probabilities.view(-1, V), 1, generator=generator).view(-1, T)
    mask = torch.ones_like(tokens)
    if stops:
        ended = (tokens == EOS).long().cumsum(-1)
        mask = ((ended - (tokens == EOS).long()) == 0).long()  # the EOS itself is trained, nothing behind it
    rewards = reward(tokens.view(PROBLEMS, GROUP, T), mask.sum(-1).view(PROBLEMS, GROUP))
    return Batch(tokens, logprobs_of(tables, tokens), mask, rewards)


def train(
    objective: Objective,
    reward: Reward,
    seed: int,
    *,
    steps: int,
    make_optimizer: MakeOptimizer,
    reset_optimizer: bool = False,
    stops: bool = False,
    advantages_of: Callable[[list[float]], list[float]] = centred,
    tables: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The trained tables and the largest value that each sum of the objective took, per trained token."""
    generator = torch.Generator().manual_seed(seed)
    tables = torch.zeros(PROBLEMS, T, V) if tables is None else tables.clone()
    tables.requires_grad_()
    optimizer = make_optimizer([tables])
    largest: dict[str, float] = {}
    for _ in range(steps):
        if reset_optimizer:
            optimizer = make_optimizer([tables])
        with torch.no_grad():
            batch = sample(tables, reward, generator, stops)
        advantages = torch.tensor([value for group in batch.rewards.tolist() for value in advantages_of(group)])
        denominator = objective.aggregation.denominator(batch.mask.sum(-1).tolist())
        for _ in range(UPDATES):
            policy = logprobs_of(tables, batch.tokens)
            inputs = LossInputs(policy, batch.logprobs, batch.logprobs, advantages, batch.mask)
            loss, sums = policy_loss(objective, inputs, denominator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for name, value in sums.items():
                largest[name] = max(largest.get(name, 0.0), value.item() / batch.mask.sum().item())
    return tables.detach(), largest


def adam(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.1, betas=(0.9, 0.95))


def sgd(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=2.0)


def targets(seed: int) -> torch.Tensor:
    """The right token of each position, (PROBLEMS, T)."""
    return torch.randint(V, (PROBLEMS, T), generator=torch.Generator().manual_seed(1000 + seed))


def expected_reward(tables: torch.Tensor, right: torch.Tensor) -> float:
    """Exactly: the mean probability of the right tokens. Chance is 1/V, the optimum 1."""
    return torch.softmax(tables, -1).gather(-1, right.unsqueeze(-1)).mean().item()


def expected_length(tables: torch.Tensor) -> float:
    """Exactly: Σ_t P(no EOS before t); the optimum of a length reward is 1, immediate EOS."""
    goes_on = 1 - torch.softmax(tables, -1)[..., EOS]  # (PROBLEMS, T)
    reached = torch.cat([torch.ones(PROBLEMS, 1), goes_on[:, :-1].cumprod(-1)], dim=-1)
    return reached.sum(-1).mean().item()


# The sequence-level clips and CISPO's cap are sized for completions of four tokens and large steps.
FAMILIES = {
    "grpo clip": dapo(),
    "r1": replace(r1(), rule=Clip(0.5, 0.5), kl=None),
    "gspo": replace(gspo(), rule=Clip(0.1, 0.1)),
    "luspo": replace(luspo(), rule=Clip(0.1, 0.1)),
    "kimi": kimi(tau=0.02),
    "cispo": cispo(1.4),
    "sapo": sapo(),
    "vespo": vespo(),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_finds_the_known_optimum(name, seed):
    right = targets(seed)

    def reward(tokens, lengths):
        return (tokens == right.unsqueeze(1)).float().mean(-1)

    assert expected_reward(torch.zeros(PROBLEMS, T, V), right) == pytest.approx(1 / V)
    # Kimi: each iteration has a new reference (the policy that sampled) and a fresh optimizer.
    tables, largest = train(FAMILIES[name], reward, seed, steps=40, make_optimizer=adam, reset_optimizer=name == "kimi")
    assert expected_reward(tables, right) > 0.9
    assert largest["ratio_error"] > 0.1  # the updates were off-policy
    if name in ("grpo clip", "r1", "gspo", "luspo", "cispo"):
        assert largest["clip_share"] > 0


def test_kimis_iteration_converges_to_its_closed_form():
    """All four answers once, drawn from a uniform reference: many updates end at π* ∝ π_ref exp(r/τ), no further."""
    rewards, tau = torch.tensor([1.0, 0.5, 0.0, 0.0]), 0.5
    logits = torch.zeros(V, requires_grad=True)
    old = torch.log_softmax(logits.detach(), 0).unsqueeze(-1)
    objective = kimi(tau)
    advantages = torch.tensor(LogPartition(tau).centred(rewards.tolist()))
    for _ in range(200):
        policy = torch.log_softmax(logits, 0).unsqueeze(-1)
        inputs = LossInputs(policy, old, old, advantages, torch.ones(V, 1))
        loss, _ = policy_loss(objective, inputs, objective.aggregation.denominator([1] * V))
        (gradient,) = torch.autograd.grad(loss, logits)
        logits.data -= 2 * gradient
    assert torch.allclose(torch.softmax(logits, 0), torch.softmax(rewards / tau, 0), atol=1e-4)


def test_immediate_eos_is_the_optimum_of_a_pure_length_reward():
    tables, _ = train(dapo(), lambda tokens, lengths: -lengths / T, 0, steps=40, make_optimizer=adam, stops=True)
    assert expected_length(torch.zeros(PROBLEMS, T, V)) > 2.5
    assert expected_length(tables) < 1.1
    assert torch.softmax(tables, -1)[:, 0, EOS].min() > 0.9


def test_std_cancels_the_weight_of_a_length_reward():
    """All answers right, a length reward of weight w on top. Under the group's std w = .001 shortens like w = 1; under
    r − mean it shortens a thousandth as much. Plain SGD, since Adam would cancel the scale again."""
    shortened: dict[tuple[str, float], float] = {}
    start = expected_length(torch.zeros(PROBLEMS, T, V))
    rules = {"std": StdNormalized(epsilon=1e-6).normalized, "mean": centred}
    for weight in (0.001, 1.0):
        for name, rule in rules.items():

            def reward(tokens, lengths, weight=weight):
                return 1 + weight * (0.5 - lengths / T)

            tables, _ = train(
                dapo(), reward, 0, steps=3, make_optimizer=sgd, stops=True, advantages_of=rule,
            )  # fmt: skip
            shortened[name, weight] = start - expected_length(tables)
    assert shortened["std", 0.001] == pytest.approx(shortened["std", 1.0], rel=0.02)
    assert shortened["std", 1.0] > 0.1
    assert 0 < shortened["mean", 0.001] < shortened["mean", 1.0] / 100
