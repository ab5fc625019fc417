"""A teacher's top-k logits: the tail, k = V, files that survive a kill, and a student that learns from them."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from distill import topk_distill
from distill.divergence import divergence
from distill.sft import Forward, LoraSettings, SftSettings, tokenize_traces
from distill.topk_distill import LogitLoss, require_same_vocabulary
from distill.topk_logits import (
    LogitFacts,
    TeacherLogits,
    TeacherTopK,
    TopK,
    join,
    top_k,
    top_k_divergence,
    used_vocabulary,
    write_logits,
)
from distill.traces import Trace
from recipes.console import PlainReport
from recipes.loader import RecipeError
from recipes.runner import StageFailed, run_recipe
from recipes.schema import load_recipe
from recipes.stages import METHODS
from rl.faults import FaultRaised, reset_faults
from rl.policy import PolicyModel, eos_token_id, load_model, load_tokenizer, save_model
from rl.rows import TrainingRow
from rl.runs import folder_hash, read_lines
from rl.tasks import tiny
from rl.tasks.tiny_models import make_model, make_tokenizer
from tests.engine_world import MODEL

SETTINGS = SftSettings(epochs=3, learning_rate=3e-3, batch_size=4, max_length=128, seed=5, save_every=3)


# --- the divergence over k tokens and a tail --------------------------------------------------------------------------


def logprobs(*probabilities):
    return torch.tensor([probabilities]).log()


def test_the_example_of_the_docstring():
    teacher, student = logprobs(0.5, 0.3, 0.15, 0.05), logprobs(0.25, 0.25, 0.25, 0.25)
    best = top_k(teacher, 2)
    assert best.ids.tolist() == [[0, 1]]
    assert best.logprobs.exp()[0].tolist() == pytest.approx([0.5, 0.3])
    assert best.tail.exp().item() == pytest.approx(0.2)
    by_hand = 0.5 * math.log(2) + 0.3 * math.log(1.2) + 0.2 * math.log(0.4)
    assert top_k_divergence(best, student).item() == pytest.approx(by_hand, abs=1e-6)
    assert by_hand == pytest.approx(0.218012, abs=1e-6)
    assert divergence(teacher, student).item() == pytest.approx(0.244174, abs=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_with_every_token_it_is_the_full_divergence(beta):
    torch.manual_seed(0)
    teacher, raw = torch.randn(7, 50).mul(3).log_softmax(-1), torch.randn(7, 50, requires_grad=True)
    student = raw.log_softmax(-1)
    best = top_k(teacher, 50)
    assert best.tail.tolist() == [-math.inf] * 7
    found, full = top_k_divergence(best, student, beta), divergence(teacher, student, beta)
    assert torch.allclose(found, full, atol=1e-5)
    own, other = (torch.autograd.grad(x.sum(), raw, retain_graph=True)[0] for x in (found, full))
    assert torch.allclose(own, other, atol=1e-5)


@given(st.integers(0, 10_000), st.integers(1, 11), st.sampled_from([0.0, 0.3, 1.0]))
def test_merging_tokens_only_lowers_it(seed, k, beta):
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (torch.randn(3, 12, generator=generator).mul(2).log_softmax(-1) for _ in range(2))
    found = top_k_divergence(top_k(teacher, k), student, beta)
    assert (found >= -1e-5).all()
    assert (found <= divergence(teacher, student, beta) + 1e-5).all()


def test_reverse_kl_makes_a_student_pay_for_leaving_the_k_tokens():
    """Over the k tokens alone it would not: there its mass goes down with the student's."""
    best = top_k(logprobs(0.6, 0.3, 0.05, 0.05), 2)
    stays, leaves = logprobs(0.6, 0.3, 0.05, 0.05), logprobs(0.06, 0.03, 0.455, 0.455)
    assert top_k_divergence(best, stays, 1.0).item() == pytest.approx(0, abs=1e-6)
    assert top_k_divergence(best, leaves, 1.0).item() > 1.5


def test_gradients_where_the_teacher_is_sure():
    """A tail of e^-60, far below fp32's rounding of 1, is neither lost nor a source of NaN."""
    raw = torch.tensor([[0.0, 1.0, 2.0, 3.0]], requires_grad=True)
    teacher = torch.tensor([[60.0, 0.0, -1.0, -2.0]]).log_softmax(-1)
    for beta in (0.0, 0.5, 1.0):
        best = top_k(teacher, 1)
        assert best.tail.item() == pytest.approx(-60 + math.log(1 + math.exp(-1) + math.exp(-2)), abs=1e-4)
        (gradient,) = torch.autograd.grad(top_k_divergence(best, raw.log_softmax(-1), beta).sum(), raw)
        assert torch.isfinite(gradient).all() and gradient[0, 0] < 0  # more of the teacher's token


def test_a_k_that_the_vocabulary_has_not():
    with pytest.raises(ValueError, match="top_k = 5, but the vocabulary has 4 tokens: take 1 to so many"):
        top_k(torch.zeros(1, 4), 5)


def test_a_loss_of_both():
    loss = LogitLoss(0.0, 0.25)
    assert loss.weigh(torch.tensor([0.4, 2.0])).item() == pytest.approx(0.8)
    figures = loss.figures(
        top_k(logprobs(0.7, 0.3), 2), logprobs(0.5, 0.5), torch.tensor([1])
    )  # the golden vector, and log 2
    assert figures[0].tolist() == pytest.approx([0.0822829, math.log(2)], abs=1e-6)
    with pytest.raises(ValueError, match=r"ce_weight = 2 is not within"):
        LogitLoss(ce_weight=2)
    with pytest.raises(ValueError, match="beta = -1 is not within"):
        LogitLoss(-1)


# --- scoring and files ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(student, teacher): the teacher is another random model that is surer of what it says, with a padded output
    layer as Qwen2.5 has one."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), make_tokenizer()
    save_model(make_model(32, 1, 2, tokenizer, seed=0), tokenizer, folder / "student")
    teacher = make_model(48, 2, 2, tokenizer, seed=7)
    teacher.resize_token_embeddings(len(tokenizer) + 5, mean_resizing=False)
    with torch.no_grad():
        head = teacher.get_output_embeddings()
        assert head is not None
        for parameter in head.parameters():
            parameter.mul_(6.0)
    save_model(teacher, tokenizer, folder / "teacher")
    return folder / "student", folder / "teacher"


def make_traces(count=24, split="train"):
    rng = random.Random(0)
    found = tiny.problems(split, count, (2, 3))
    return [Trace(p.id, p.text, tiny.demonstrate(p, "careful", rng), 1, "t") for p in found]


def scored(folder, models, traces, k=8, temperature=1.0, score=None, **options):
    """The stored logits of traces, as the stage makes them."""
    tokenizer, model = load_tokenizer(models[1]), load_model(models[1])
    facts = LogitFacts("teacher", k, used_vocabulary(tokenizer), temperature, (eos_token_id(tokenizer),))
    teacher = TeacherTopK(PolicyModel(model), k, facts.vocab, temperature, micro_batch_tokens=256, chunk_tokens=50)
    write_logits(folder, rows_of(tokenizer, traces), score(teacher) if score else teacher, facts, **options)
    return TeacherLogits(folder)


def rows_of(tokenizer, traces):
    return [
        TrainingRow(row.prompt_ids, row.completion_ids, (0.0,) * len(row.completion_ids), 0.0, "trace", place)
        for place, row in enumerate(tokenize_traces(tokenizer, traces))
    ]


def full_logprobs(folder, row, temperature=1.0, vocab=None):
    """The log-probs at a row's completion tokens by one plain call of a model."""
    ids = torch.tensor([[*row.prompt_ids, *row.token_ids]])
    with torch.no_grad():
        logits = load_model(folder)(ids).logits[0, len(row.prompt_ids) - 1 : -1, :vocab]
    return (logits / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_is_stored_is_what_the_teacher_says_token_by_token(models, tmp_path, temperature):
    traces = make_traces(9)
    found = scored(tmp_path, models, traces, temperature=temperature, dtype=torch.float32, shard_rows=4)
    tokenizer = load_tokenizer(models[1])
    vocab = len(tokenizer)
    assert load_model(models[1]).get_output_embeddings().weight.shape[0] == vocab + 5  # pyright: ignore[reportOptionalMemberAccess]
    assert len(found) == 9 and sorted(path.name for path in tmp_path.iterdir()) == [
        "logits-00000.safetensors", "logits-00001.safetensors", "logits-00002.safetensors", "logits.json",
    ]  # fmt: skip
    for place, row in enumerate(rows_of(tokenizer, traces)):
        assert found.token_ids(place) == row.token_ids and row.token_ids[-1] == tokenizer.eos_token_id
        own = top_k(full_logprobs(models[1], row, temperature, vocab), 8)
        assert torch.allclose(found[place].logprobs, own.logprobs, atol=1e-5)
        assert torch.allclose(found[place].tail, own.tail, atol=1e-5)
        assert found[place].ids.max() < vocab
        if not torch.equal(found[place].ids.long(), own.ids):  # two tokens of one probability
            given = full_logprobs(models[1], row, temperature, vocab).gather(-1, found[place].ids.long())
            assert torch.allclose(given, own.logprobs, atol=1e-5)


def test_half_precision_costs_little(models, tmp_path):
    traces = make_traces(4)
    half, full = (
        scored(tmp_path / name, models, traces, dtype=dtype)
        for name, dtype in (("half", torch.float16), ("full", torch.float32))
    )
    stored = load_file(tmp_path / "half/logits-00000.safetensors")
    tokens = sum(len(half.token_ids(place)) for place in range(4))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == {
        "ids": (torch.int32, (tokens, 8)), "logprobs": (torch.float16, (tokens, 8)),
        "tail": (torch.float32, (tokens,)), "token_ids": (torch.int32, (tokens,)),
    }  # fmt: skip
    student = torch.zeros(1, used_vocabulary(make_tokenizer())).log_softmax(-1)
    for place in range(4):
        left, right = (
            top_k_divergence(x[place].to(torch.device("cpu")), student.expand(len(x[place]), -1)) for x in (half, full)
        )
        assert torch.allclose(left, right, atol=2e-3)


def test_a_killed_run_goes_on_to_the_same_bytes(models, tmp_path, monkeypatch):
    traces, calls = make_traces(10), []

    def counting(teacher):
        def score(rows):
            calls.append(len(rows))
            return teacher(rows)

        return score

    scored(tmp_path / "whole", models, traces, shard_rows=4)
    for number, site in enumerate(("logits.shard:2", "logits.manifest:1")):
        folder = tmp_path / f"cut{number}"
        monkeypatch.setenv("REASON_FAULT", f"{site}:raise")
        reset_faults()
        with pytest.raises(FaultRaised):
            scored(folder, models, traces, shard_rows=4, score=counting)
        monkeypatch.delenv("REASON_FAULT")
        with pytest.raises(ValueError, match=r"has no logits\.json"):
            TeacherLogits(folder)
        calls.clear()
        scored(folder, models, traces, shard_rows=4, score=counting)
        assert calls == ([4, 2] if number == 0 else [])  # the shards that are there are not scored again
        whole, cut = folder_hash(tmp_path / "whole"), folder_hash(folder)
        assert cut == whole
    scored(tmp_path / "cut1", models, list(reversed(traces)), shard_rows=4, score=counting)  # other rows: none is kept
    assert calls == [4, 4, 2]


def test_a_teacher_that_has_lost_its_mind_is_named(models, tmp_path):
    tokenizer, model = make_tokenizer(), load_model(models[1])
    with torch.no_grad():
        next(model.parameters())[:] = math.nan
    # PolicyModel would refuse it first, so the model breaks behind it.
    policy = PolicyModel(load_model(models[1]))
    policy.model.load_state_dict(model.state_dict())
    with pytest.raises(FloatingPointError, match=r"row trace\[0\]: the teacher's log-probs are not finite"):
        TeacherTopK(policy, 4, len(tokenizer))(rows_of(tokenizer, make_traces(1)))
    with pytest.raises(ValueError, match="there are no rows to score"):
        write_logits(tmp_path, [], lambda rows: [], LogitFacts("t", 1, 1, 1.0, ()))


def test_a_shard_that_is_cut_short_is_named(models, tmp_path):
    found = scored(tmp_path, models, make_traces(2))
    manifest = json.loads((tmp_path / "logits.json").read_text())
    manifest["shards"][0]["tokens"][1] += 1
    (tmp_path / "logits.json").write_text(json.dumps(manifest))
    assert found[1] is not None
    with pytest.raises(ValueError, match=r"logits-00000\.safetensors has not the \d+ tokens that logits\.json names"):
        TeacherLogits(tmp_path)[1]


# --- training ---------------------------------------------------------------------------------------------------------


def held_out_kl(models, student, count=8):
    """Mean full forward KL per token to the teacher on problems that nobody trained on."""
    tokenizer, total, tokens = load_tokenizer(models[1]), 0.0, 0
    for row in rows_of(tokenizer, make_traces(count, "dev")):
        teacher = full_logprobs(models[1], row, vocab=len(tokenizer))
        values = divergence(teacher, full_logprobs(student, row, vocab=len(tokenizer)))
        total, tokens = total + values.sum().item(), tokens + len(values)
    return total / tokens


@pytest.fixture(scope="module")
def stored(models, tmp_path_factory):
    return scored(tmp_path_factory.mktemp("logits"), models, make_traces())


def distil(folder, models, logits, loss=LogitLoss(), traces=None, **changes):  # noqa: B008
    return topk_distill.train(
        folder, model=models[0], traces=make_traces() if traces is None else traces, logits=logits,
        teacher_tokenizer=load_tokenizer(models[1]), loss=loss, settings=replace(SETTINGS, **changes),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(models, stored, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    distil(folder, models, stored)
    return folder


def weights(folder):
    return load_file(folder / "model/model.safetensors")


def test_it_learns_what_the_teacher_says_of_problems_it_has_not_seen(models, stored, tmp_path):
    before = held_out_kl(models, models[0])
    summary = distil(tmp_path, models, stored, epochs=12, save_every=0)
    assert held_out_kl(models, tmp_path / "model") < 0.6 * before
    assert summary["last_loss"] < 0.7 * summary["first_loss"]
    assert (summary["teacher"], summary["top_k"], summary["rows"], summary["steps"]) == ("teacher", 8, 24, 72)


def test_the_first_loss_is_the_token_mean_over_the_batch(models, stored, whole):
    """Against a plain loop: full log-probs of the student, the stored top-k, mean over all completion tokens."""
    from distill.training import row_order

    rows = rows_of(load_tokenizer(models[0]), make_traces())
    values, nll = [], []
    for place in row_order(24, 3, SETTINGS.seed)[:4]:
        student = full_logprobs(models[0], rows[place])
        values.append(top_k_divergence(stored[place].to(torch.device("cpu")), student))
        nll.append(-student.gather(-1, torch.tensor(rows[place].token_ids).unsqueeze(-1)).squeeze(-1))
    first = read_lines(whole / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(torch.cat(values).mean().item(), abs=1e-5)
    assert first["divergence"] == pytest.approx(first["loss"], abs=1e-5)
    assert first["cross_entropy"] == pytest.approx(torch.cat(nll).mean().item(), abs=1e-5)


@pytest.mark.parametrize("site", ["logit_distill.checkpoint:2", "checkpoint.commit:2", "logit_distill.model:1"])
def test_a_failed_run_goes_on_to_the_same_bytes(models, stored, whole, tmp_path, monkeypatch, site):
    monkeypatch.setenv("REASON_FAULT", f"{site}:raise")
    reset_faults()
    with pytest.raises(FaultRaised):
        distil(tmp_path, models, stored)
    monkeypatch.delenv("REASON_FAULT")
    distil(tmp_path, models, stored)
    names = ("model/model.safetensors", "metrics.jsonl", "summary.json")
    left, right = folder_hash(tmp_path), folder_hash(whole)
    assert [left[name] for name in names] == [right[name] for name in names]
    with pytest.raises(ValueError, match="belongs to a run with other rows or settings"):
        distil(tmp_path, models, stored, LogitLoss(0.5))


@pytest.mark.parametrize(
    "forward", [Forward(micro_batch_tokens=128), Forward(packing=True), Forward(gradient_checkpointing=True)]
)
def test_how_a_step_is_cut_changes_rounding_alone(models, stored, whole, tmp_path, forward):
    distil(tmp_path, models, stored, save_every=0, forward=forward)
    for name in ("loss", "divergence", "cross_entropy"):
        own, other = ([row[name] for row in read_lines(x / "metrics.jsonl")] for x in (tmp_path, whole))
        assert own == pytest.approx(other, abs=2e-5)


def test_adapters_jsd_and_cross_entropy(models, stored, tmp_path):
    summary = distil(tmp_path, models, stored, LogitLoss(0.5, 0.5), lora=LoraSettings(4), save_every=0)
    line = read_lines(tmp_path / "metrics.jsonl")[-1]
    assert line["loss"] == pytest.approx((line["divergence"] + line["cross_entropy"]) / 2, abs=1e-5)
    assert summary["last_loss"] < summary["first_loss"]
    assert set(weights(tmp_path)) == set(load_file(models[0] / "model.safetensors"))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_another_tokenizer_is_refused_by_name_and_id(models, stored, tmp_path):
    student, stops = make_tokenizer(), [eos_token_id(make_tokenizer())]
    require_same_vocabulary(student, make_tokenizer(), stops)
    more = make_tokenizer()
    more.add_tokens(["brief"])
    with pytest.raises(ValueError, match=rf"id {len(student)} is 'brief' for the teacher and nothing for the student"):
        require_same_vocabulary(student, more, stops)
    with pytest.raises(ValueError, match=rf"id {len(student)} is 'brief' for the student and nothing for the teacher"):
        require_same_vocabulary(more, student, stops)
    with pytest.raises(ValueError, match="never ends with the student's EOS"):
        require_same_vocabulary(student, make_tokenizer(), [len(student)])
    changed = TeacherLogits(stored.folder)
    changed.facts = LogitFacts("teacher", 8, 99, 1.0, tuple(stops))
    with pytest.raises(ValueError, match=r"they are of 99 ids, the tokenizers have \d+"):
        distil(tmp_path, models, changed)


def test_rows_that_the_teacher_did_not_score_are_refused(models, stored, tmp_path):
    with pytest.raises(ValueError, match="there are 23 traces, and 24 rows of logits"):
        distil(tmp_path, models, stored, traces=make_traces()[:23])
    traces = make_traces()
    traces[3], traces[4] = traces[4], traces[3]
    with pytest.raises(ValueError, match=r"trace 3 \(problem .*\): the student's tokens of this completion are not"):
        distil(tmp_path, models, stored, traces=traces)


def test_parts_of_top_k():
    best = top_k(torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).log_softmax(-1), 3)
    again = join([best[:2], best[2:]])
    assert len(best) == 5 and all(torch.equal(getattr(best, name), getattr(again, name)) for name in TopK.__slots__)


# --- in a recipe ------------------------------------------------------------------------------------------------------

RECIPE = """name: soft
problems: {source: tiny, levels: [2, 3], train: 24, dev: 4, test: 4}
sampling: {max_tokens: 64}
stages:
  pool: {method: sample, model: %s, samples: 2}
  kept: {method: traces, pool: pool}
  scores: {method: teacher_logits, model: %s, traces: kept, top_k: 6, shard_rows: 16%s}
  student: {method: logit_distill, model: %s, logits: scores, max_length: 96, epochs: 2, batch_size: 8,
            learning_rate: 3.0e-3%s}
"""


def recipe_of(tmp_path, student, of_scores="", of_student=""):
    path = tmp_path / "soft.yaml"
    path.write_text(RECIPE % (MODEL, MODEL, of_scores, student, of_student))
    return load_recipe(path)


def test_a_recipe_from_samples_to_a_student(models, tmp_path):
    recipe = recipe_of(tmp_path, models[0])
    assert recipe.part("distill") == ["kept", "scores", "student"]
    results = run_recipe(recipe, root=tmp_path / "runs", methods=METHODS, report=PlainReport())
    folder = {result.name: result.folder for result in results}
    manifest = json.loads((folder["scores"] / "logits.json").read_text())
    assert manifest["rows"] == len(read_lines(folder["scores"] / "traces.jsonl")) > 8
    assert (manifest["k"], manifest["dtype"], manifest["teacher"]) == (6, "float16", MODEL)
    summary = json.loads((folder["student"] / "summary.json").read_text())
    assert summary["last_loss"] < summary["first_loss"]


@pytest.mark.parametrize(
    ("of_scores", "of_student", "message"),
    [
        ("", ", ce_weight: 1.0", "ce_weight: 1 leaves nothing of the teacher's logits; take method: sft"),
        ("", ", micro_batch_tokens: 50", r"micro_batch_tokens: 50 is less than max_length \(96\)"),
        ("", ", beta: 2.0", "beta: must be at most 1"),
        (", dtype: int8", "", "dtype"),
    ],
)
def test_what_a_stage_may_not_be_told(models, tmp_path, of_scores, of_student, message):
    with pytest.raises(RecipeError, match=message):
        recipe_of(tmp_path, models[0], of_scores, of_student)


def test_a_student_must_read_logits(models, tmp_path):
    path = tmp_path / "soft.yaml"
    path.write_text((RECIPE % (MODEL, MODEL, "", models[0], "")).replace("logits: scores", "logits: kept"))
    with pytest.raises(RecipeError, match="which makes no logits; name a stage of method teacher_logits"):
        load_recipe(path)


def test_a_teacher_of_another_family_ends_the_stage_by_name(models, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["brief"])
    save_model(make_model(32, 1, 2, tokenizer, seed=0), tokenizer, tmp_path / "other")
    recipe = recipe_of(tmp_path, tmp_path / "other")
    with pytest.raises(StageFailed, match="is 'brief' for the student and nothing for the teacher"):
        run_recipe(recipe, root=tmp_path / "runs", methods=METHODS, report=PlainReport())
