"""Two processes give what one gives: losses, weights, samples, checkpoints, refusals, and runs of a recipe.

The file is also the program of the two processes. They are started once, go through all scenarios and write down what
they found; the tests compare it with one process.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from rl.checkpoint import collect, load_training_state, write_training_state
from rl.distributed import gathered, shard
from rl.export import export_model
from rl.kl import KLTerm, k3
from rl.learner import Learner, OptimSettings
from rl.lora import WithoutAdapters, add_lora
from rl.objectives import dapo
from rl.packing import PackedBatch
from rl.policy import PolicyModel, load_model
from rl.ranks import ALONE, Ranks, start
from rl.refusal import StepRefused
from rl.rows import TrainingRow
from rl.samplers.base import SampleRequest, SamplingSettings
from rl.samplers.shared import SharedSampler
from rl.samplers.transformers import TransformersSampler
from rl.tasks.tiny_models import make_model, make_tokenizer
from rl.train_metrics import UpdateMetrics

OPTIM = OptimSettings(learning_rate=1e-3, weight_decay=0.1, micro_batch_tokens=40)
UPDATES = 3


# --- what is computed, by one process or by two -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """What is trained: how many rows an update has, and which policy."""

    count: int = 8
    tied: bool = True
    lora: bool = False
    gradient_checkpointing: bool = False
    refreshed: bool = False  # a reference of its own, which becomes the policy after every update


def model_of(tied: bool = True):
    """Two layers, hidden 32, grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=53, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=128, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def recorded(count: int, seed: int = 0) -> list[TrainingRow]:
    """Rows as rollouts leave them, of 2 to 19 tokens, two per prompt."""
    random = torch.Generator().manual_seed(seed)

    def draw(size: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 52, (size,), generator=random).tolist())

    rows = []
    for i in range(count):
        prompt = draw(4) if i % 2 == 0 else rows[-1].prompt_ids
        ids = draw(int(torch.randint(2, 20, (1,), generator=random)))
        logprobs = tuple((-4 + torch.randn(len(ids), generator=random) * 0.1).tolist())
        rows.append(TrainingRow(prompt, ids, logprobs, 1.0 - i % 2 * 1.5, f"p{i // 2}", i % 2))
    return rows


def learner_of(ranks: Ranks, sharded: bool, case: Case | None = None) -> Learner:
    case = case or Case()
    model = model_of(case.tied)
    policy = PolicyModel(
        add_lora(model, 4, 8.0) if case.lora else model, gradient_checkpointing=case.gradient_checkpointing
    )
    if sharded:
        shard(policy)
        assert all(isinstance(parameter, DTensor) for parameter in policy.parameters())
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=OPTIM.learning_rate, betas=OPTIM.betas, weight_decay=OPTIM.weight_decay)
    reference = WithoutAdapters(policy) if case.lora else PolicyModel(model_of(case.tied)) if case.refreshed else None
    if sharded and isinstance(reference, PolicyModel):
        shard(reference)
    objective = dapo() if reference is None else replace(dapo(), kl=KLTerm(k3, 0.1))
    return Learner(policy, optimizer, objective, OPTIM, 1.0, reference=reference, ranks=ranks)


def updates(learner: Learner, count: int, seeds: range) -> list[dict[str, float]]:
    """One update a seed on `count` rows; what each reports."""
    found = []
    for seed in seeds:
        rows, metrics = recorded(count, seed), UpdateMetrics()
        learner.update(rows, [row.num_tokens for row in rows], metrics)
        found.append(metrics.means(learner.ranks))
        if isinstance(learner.reference, PolicyModel):
            learner.refresh_reference()
    return found


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in collect(learner.policy, learner.optimizer).weights.items()}


CASES = {
    "even": Case(),
    "untied": Case(tied=False),
    "uneven": Case(count=7),
    "a rank without rows": Case(count=1),
    "checkpointing": Case(gradient_checkpointing=True),
    "lora with a reference": Case(count=7, lora=True, gradient_checkpointing=True),
    "a refreshed reference": Case(count=7, refreshed=True),
}


def train_case(ranks: Ranks, sharded: bool, name: str) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    learner = learner_of(ranks, sharded, CASES[name])
    return updates(learner, CASES[name].count, range(UPDATES)), weights_of(learner)


def logprob_refusal(ranks: Ranks, sharded: bool) -> dict[str, object]:
    """What an update says of a row that is not finite and lies on one rank only."""
    rows = recorded(6)
    rows[3] = replace(rows[3], sampler_logprobs=(float("nan"),) * rows[3].num_tokens)
    return refused(learner_of(ranks, sharded), rows)


def gradient_refusal(ranks: Ranks, sharded: bool) -> dict[str, object]:
    """The same for a gradient that becomes infinite on the way back from the rows of p1, which all end in token 52."""
    learner = learner_of(ranks, sharded)
    rows = [replace(row, token_ids=(*row.token_ids[:-1], 52)) if row.group == "p1" else row for row in recorded(6)]
    plain = learner.policy.hidden

    def hidden(batch: PackedBatch) -> torch.Tensor:
        found = plain(batch)
        if found.requires_grad and bool((batch.targets == 52).any()):
            found.register_hook(lambda gradient: gradient * float("inf"))
        return found

    learner.policy.hidden = hidden
    return refused(learner, rows)


def refused(learner: Learner, rows: list[TrainingRow]) -> dict[str, object]:
    before = weights_of(learner)
    try:
        learner.update(rows, [row.num_tokens for row in rows], UpdateMetrics())
    except StepRefused as error:
        same = all(map(torch.equal, before.values(), weights_of(learner).values()))
        return {"groups": list(error.groups), "what": error.what, "weights_unchanged": same}
    return {}


def samples(ranks: Ranks, sharded: bool, folder: Path) -> list[dict]:
    """Completions of very different lengths, drawn before and after an update."""
    torch.manual_seed(1)
    tokenizer = make_tokenizer()
    policy = PolicyModel(make_model(hidden=32, layers=2, heads=2, tokenizer=tokenizer, seed=1))
    if sharded:
        shard(policy)
    sampler = SharedSampler(TransformersSampler(policy.model, tokenizer), ranks, policy)
    requests = [SampleRequest((3, 4, 5), seed, max_tokens=1 + seed * 5) for seed in range(5)]
    drawn = sampler.sample(requests, SamplingSettings(max_tokens=40))
    assert sampler.sample(requests[:1], SamplingSettings(max_tokens=40)) == drawn[:1]  # a rank without a request
    if sharded:
        assert all(isinstance(parameter, DTensor) for parameter in policy.parameters())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    learner = Learner(policy, optimizer, dapo(), OPTIM, 1.0, ranks=ranks)
    rows = [
        TrainingRow(request.prompt_ids, completion.token_ids, completion.sampler_logprobs, 1.0, str(request.seed))
        for request, completion in zip(requests, drawn, strict=True)
    ]
    learner.update(rows, [row.num_tokens for row in rows], UpdateMetrics())
    drawn += sampler.sample(requests, SamplingSettings(max_tokens=40))
    export_model(policy, tokenizer, folder, ranks)
    return [json.loads(json.dumps(asdict(completion))) for completion in drawn]


def decode_apart(ranks: Ranks) -> float:
    """The ranks take different numbers of decoding steps; the largest difference from the unsharded model's logits."""
    policy = PolicyModel(model_of())
    ids = torch.arange(3, 13).unsqueeze(0)
    with torch.no_grad():
        wanted = policy.model(ids).logits
        shard(policy)
        with gathered(policy):
            found = [policy.model(ids).logits for _ in range(1 + 4 * ranks.rank)]
    return max(float((logits - wanted).abs().max()) for logits in found)


def write_checkpoint(learner: Learner, folder: Path) -> None:
    tensors = collect(learner.policy, learner.optimizer, keep=learner.ranks.first)
    if learner.ranks.first:
        folder.mkdir()
        write_training_state(folder, tensors, {"step": 2})
    learner.ranks.wait()


def resumed(learner: Learner, folder: Path) -> dict[str, torch.Tensor]:
    """The weights after one more update."""
    assert load_training_state(folder, learner.policy, learner.optimizer) == {"step": 2}
    updates(learner, 7, range(2, 3))
    return weights_of(learner)


# --- the program of the two processes ---------------------------------------------------------------------------------


def program(folder: Path) -> None:
    with start() as ranks:
        found: dict[str, object] = {"backend": torch.distributed.get_backend(), "sum": ranks.sum([1.0, ranks.rank])}
        found["shares"] = list(ranks.share("abcde"))
        found["unshared"] = ranks.unshare([letter.upper() for letter in ranks.share("abcde")])
        found["merged"] = ranks.merge([(0.5,), ()] if ranks.first else [(), (float("nan"), 0.1)])
        found["told"] = ranks.from_first("a" if ranks.first else "b")
        for way in ("replicated", "sharded"):
            sharded = way == "sharded"
            for name in CASES:
                found[f"{way} {name}"], weights = train_case(ranks, sharded, name)
                save_file(weights, folder / f"{way} {name} {ranks.rank}.safetensors")
            found[f"{way} log-prob"] = logprob_refusal(ranks, sharded)
            found[f"{way} gradient"] = gradient_refusal(ranks, sharded)
            found[f"{way} samples"] = samples(ranks, sharded, folder / f"{way} model")
            learner = learner_of(ranks, sharded)
            updates(learner, 7, range(2))
            write_checkpoint(learner, folder / f"{way} checkpoint")
            updates(learner, 7, range(2, 3))
            weights, after = weights_of(learner), resumed(learner_of(ranks, sharded), folder / "alone checkpoint")
            if ranks.first:
                save_file(weights, folder / f"{way} went on.safetensors")
                save_file(after, folder / f"{way} resumed.safetensors")
        found["decode apart"] = decode_apart(ranks)
        (folder / f"rank {ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    program(Path(sys.argv[1]))


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, launch_two) -> Path:
    """What two processes wrote down, and the checkpoint of a single one that they went on from."""
    path = tmp_path_factory.mktemp("distributed")
    learner = learner_of(ALONE, False)
    updates(learner, 7, range(2))
    write_checkpoint(learner, path / "alone checkpoint")
    updates(learner, 7, range(2, 3))
    save_file(weights_of(learner), path / "alone went on.safetensors")
    codes, errors = launch_two(__file__, path, flags=("-W", "error"))
    assert codes == [0, 0], "\n".join(errors)
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict]:
    return [json.loads((folder / f"rank {rank}.json").read_text()) for rank in range(2)]


WAYS = pytest.mark.parametrize("way", ["replicated", "sharded"])


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert (left[name] - right[name]).abs().max() <= tolerance, name


def test_messages(found: list[dict]):
    assert [rank["backend"] for rank in found] == ["gloo", "gloo"]
    assert [rank["sum"] for rank in found] == [[2.0, 1.0], [2.0, 1.0]]
    assert [rank["shares"] for rank in found] == [["a", "c", "e"], ["b", "d"]]
    assert [rank["unshared"] for rank in found] == [list("ABCDE")] * 2
    assert [str(rank["merged"]) for rank in found] == ["[[0.5], [nan, 0.1]]"] * 2
    assert [rank["told"] for rank in found] == ["a", "a"]


@WAYS
@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_weights_are_those_of_one_process(way: str, name: str, found: list[dict], folder: Path):
    wanted, weights = train_case(ALONE, False, name)
    assert len(wanted) == UPDATES and all(metrics["grad_norm"] > 0 for metrics in wanted)
    for rank in range(2):
        for own, other in zip(wanted, found[rank][f"{way} {name}"], strict=True):
            assert other == pytest.approx(own, abs=1e-5, rel=1e-5)
        assert_close(weights, load_file(folder / f"{way} {name} {rank}.safetensors"), 1e-5)


@WAYS
def test_what_is_not_finite_on_one_rank_is_refused_on_all_with_the_same_groups(way: str, found: list[dict]):
    for rank in found:
        assert rank[f"{way} log-prob"] == {"groups": ["p1"], "what": "a log-prob", "weights_unchanged": True}
        assert rank[f"{way} gradient"] == {"groups": ["p1"], "what": "the gradient", "weights_unchanged": True}


@WAYS
def test_samples_are_those_of_one_process_before_and_after_an_update(
    way: str, found: list[dict], folder: Path, tmp_path: Path
):
    wanted = samples(ALONE, False, tmp_path / "model")
    assert len({len(completion["token_ids"]) for completion in wanted}) > 3
    assert wanted[:5] != wanted[5:]
    for rank in found:
        for own, other in zip(wanted, rank[f"{way} samples"], strict=True):
            assert other.pop("sampler_logprobs") == pytest.approx(own["sampler_logprobs"], abs=1e-5)
            assert other == {key: value for key, value in own.items() if key != "sampler_logprobs"}
    exported, own = load_model(folder / f"{way} model"), load_model(tmp_path / "model")
    assert_close(dict(exported.state_dict()), dict(own.state_dict()), 1e-5)
    files = [sorted(path.name for path in place.iterdir()) for place in (folder / f"{way} model", tmp_path / "model")]
    assert files[0] == files[1] and "config.json" in files[0]


def test_ranks_may_decode_different_numbers_of_tokens_from_a_sharded_policy(found: list[dict]):
    assert [rank["decode apart"] <= 1e-6 for rank in found] == [True, True]


@WAYS
def test_a_checkpoint_does_not_depend_on_how_many_processes_wrote_it(way: str, folder: Path):
    went_on = load_file(folder / f"{way} went on.safetensors")
    assert_close(resumed(learner_of(ALONE, False), folder / f"{way} checkpoint"), went_on, 1e-6)
    alone = load_file(folder / "alone went on.safetensors")
    assert_close(load_file(folder / f"{way} resumed.safetensors"), alone, 1e-6)


def test_a_single_process_joins_nobody():
    assert start() is ALONE
    with ALONE as ranks:
        assert ranks.first and ranks.first_to_fail()
        assert ranks.from_first("a") == "a" and ranks.sum([1.5]) == [1.5] and ranks.merge([(1.0,)]) == [(1.0,)]
