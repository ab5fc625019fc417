"""Presets fill in keys, written keys win, and each preset becomes the objective of its paper."""

import shutil
from pathlib import Path

import pytest

from recipes.console import PlainReport
from recipes.loader import RecipeError
from recipes.presets import PRESETS
from recipes.runner import run_recipe
from recipes.schema import load_recipe
from recipes.stages import METHODS
from rl.policy import load_tokenizer
from rl.prompts import R1_ZERO_TEMPLATE, give_template, prefills_think, render_text
from rl.runs import read_lines
from rl.types import Problem, TextPart

BASE = """name: small
problems: {source: tiny, train: 8, dev: 4, test: 4}
sampling: {max_tokens: 16}
stages:
  base: {method: pretrain, hidden: 32, layers: 1, heads: 2, steps: 1, styles: {plain: 1}}
  rl:
    method: grpo
    model: base
    steps: 2
"""


def stage(tmp_path: Path, keys: str):
    path = tmp_path / "small.yaml"
    path.write_text(BASE + "".join(f"    {line}\n" for line in keys.splitlines()))
    return load_recipe(path).stages["rl"].config


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_fills_in_its_keys(tmp_path, name):
    config = stage(tmp_path, f"preset: {name}").model_dump(mode="json")
    for key, value in PRESETS[name].items():
        if isinstance(value, dict):
            assert value.items() <= config[key].items()
        else:
            assert config[key] == (list(value) if isinstance(value, tuple) else value)


def test_a_written_key_wins(tmp_path):
    config = stage(tmp_path, "preset: dapo\nepsilon_high: 0.4\ngroup_size: 8")
    assert (config.epsilon_high, config.epsilon_low, config.group_size, config.advantage) == (0.4, 0.2, 8, "std")


def test_presets_are_the_papers_numbers(tmp_path):
    zero = stage(tmp_path, "preset: r1-zero")
    assert (zero.learning_rate, zero.kl.coefficient, zero.kl.estimator, zero.group_size) == (3e-6, 0.001, "k3", 16)
    assert (zero.ratio, zero.aggregation, zero.epsilon_high, zero.advantage) == ("sequence", "sequences", 10, "std")
    assert zero.reward_accuracy == zero.reward_format  # accuracy and format with equal weights
    gspo = stage(tmp_path, "preset: gspo")
    assert (gspo.ratio, gspo.epsilon_low, gspo.epsilon_high) == ("sequence-mean", 3e-4, 4e-4)
    cispo = stage(tmp_path, "preset: cispo")
    assert (cispo.loss, cispo.ratio_cap, cispo.adam_epsilon, cispo.fp32_head) == ("cispo", 5.0, 1e-15, True)
    kimi = stage(tmp_path, "preset: kimi-k1.5")
    assert (kimi.loss, kimi.aggregation, kimi.reset_optimizer, kimi.draw.order) == (
        "mirror-descent", "sequence-sums", True, "prioritized"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("preset: dappo", "did you mean dapo?"),
        ("preset: cispo\nepsilon_high: 0.3", "has no effect with loss: cispo"),
        ("loss: cispo\ndual_clip: 3.0", "dual_clip: has no effect with loss: cispo; remove it"),
        ("loss: mirror-descent\naggregation: sequence-sums", "tau: required key is missing"),
        ("loss: mirror-descent\ntau: 0.1", "give aggregation: sequence-sums"),
        ("advantage: log-partition", "takes its tau, above 0, from loss: mirror-descent"),
        ("delta: 1.2", "delta: must be above 1 + epsilon_high = 1.28, not 1.2"),
        ("ratio: sequence", "each completion is one term: aggregation: sequences"),
        ("loss: mirror-descent\nratio: sequence-mean", "ratio: has no effect with loss: mirror-descent"),
        ("dual_clip: 3.0\ndelta: 4.0", "give one of them"),
        ("advantage: gdpo\nkl: {coefficient: 0.1, estimator: k1}", "whose scale gdpo takes away"),
        ("lora: {rank: 4}\nkl: {coefficient: 0.1, refresh_every: 2}", "cannot be used with lora"),
        ("draw: {order: curriculum, switch_step: 1}", "step 1 is before the switch"),
        ("max_tokens_steps: [[2, 16]]", "must start at 1 and rise, not [2]"),
        ("max_tokens_steps: [[1, 8], [1, 16]]", "must start at 1 and rise, not [1, 1]"),
        ("max_tokens_steps: [[1, 8], [2, 12]]", "its largest must be max_tokens (16)"),
        ("partial: {budget: 4}\ndynamic_rounds: 2", "cannot be used with partial"),
        ("draw: {order: curriculum}", "goes with order: curriculum, and that needs it"),
        ("draw: {order: curriculum, switch_step: 9}", "9 is after the last step (2)"),
        ("draw: {floor: 0.1}", "has no effect with order: shuffled"),
        ("correction: {kind: truncated, low: 0.2}", "has no effect with kind: truncated"),
        ("partial: {budget: 16}", "16 is not below max_tokens (16)"),
        ("soft_overlong: 16", "16 is not below max_tokens (16)"),
        ("reward_format: 1.0\nlength: {weight: 0.1}", "not below reward_accuracy"),
        ("kl: {coefficient: 0}", "must be above 0"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(tmp_path, keys, message):
    with pytest.raises(RecipeError) as caught:
        stage(tmp_path, keys)
    assert message in str(caught.value)


RUN = """name: presets
problems: {source: tiny, levels: [2], train: 16, dev: 4, test: 4}
sampling: {max_tokens: 12}
stages:
  rl:
    method: grpo
    preset: %s
    model: %s
    steps: 2
    problems_per_step: 4
    group_size: 4
    updates_per_step: 2
    learning_rate: 1.0e-3
"""


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_trains(tmp_path, tiny_model_folder, name):
    """Two steps from a model without a chat template; r1-zero gives it one, which the trained model keeps."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "chat_template.jinja").unlink()
    (tmp_path / "presets.yaml").write_text(RUN % (name, folder))
    (result,) = run_recipe(
        load_recipe(tmp_path / "presets.yaml"), root=tmp_path / "runs", methods=METHODS, report=PlainReport()
    )
    lines = read_lines(result.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["tokens_mean"] > 0 for line in lines if "tokens_mean" in line)
    template = load_tokenizer(result.folder / "model").chat_template
    assert template == (R1_ZERO_TEMPLATE if name == "r1-zero" else None)


def test_the_template_of_r1_zero(tiny_model_folder):
    tokenizer = load_tokenizer(tiny_model_folder)
    own = tokenizer.chat_template
    assert not give_template(tokenizer, "r1-zero")
    assert tokenizer.chat_template == own
    tokenizer.chat_template = None
    assert give_template(tokenizer, "r1-zero")
    text = render_text(tokenizer, Problem("p", (TextPart("1+1"),), "2"))
    assert text.endswith("User: 1+1\nAssistant:")
    assert "<think> the reasoning </think> <answer> the answer </answer>" in text
    assert not prefills_think(tokenizer)
