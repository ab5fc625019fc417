"""Shares per module and layer: what a pattern matches, which one decides, what is refused."""

import pytest

from long2short.merge_weights import Weights

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in (0, 1, 11, 12) for part in ("mlp.up_proj", "self_attn.q_proj")),
    "model.norm.weight",
]


def shares(default: float, **patterns: float) -> dict[str, float]:
    return Weights(default, patterns).for_tensors(NAMES)


def test_the_examples_of_the_docstring():
    found = Weights(0.5, {"mlp": 0.3}).for_tensors(["layers.0.mlp.up.weight", "norm.weight"])
    assert found == {"layers.0.mlp.up.weight": 0.3, "norm.weight": 0.5}
    found = Weights(0.5, {"mlp": 0.3, "layers.0-11": 0.7, "layers.0-11.mlp": 0.4}).for_tensors(NAMES)
    assert found["model.layers.11.mlp.up_proj.weight"] == 0.4
    assert found["model.layers.11.self_attn.q_proj.weight"] == 0.7
    assert found["model.layers.12.mlp.up_proj.weight"] == 0.3
    assert found["model.layers.12.self_attn.q_proj.weight"] == found["model.norm.weight"] == 0.5


def test_whole_parts_of_a_name_match_and_ranges_are_numbers():
    assert set(shares(0.5, norm=0.1).values()) == {0.5, 0.1}
    found = Weights(0.5, {"layers.1": 0.1}).for_tensors(NAMES)
    assert [name for name, share in found.items() if share == 0.1] == [n for n in NAMES if ".1." in n]
    found = Weights(0.5, {"layers.2-11": 0.1}).for_tensors(NAMES)
    assert [name for name, share in found.items() if share == 0.1] == [n for n in NAMES if ".11." in n]


def test_the_order_of_patterns_does_not_matter():
    patterns = {"mlp": 0.3, "layers.0-11": 0.7, "up_proj": 0.3}
    one = Weights(0.5, patterns).for_tensors(NAMES)
    assert one == Weights(0.5, dict(reversed(patterns.items()))).for_tensors(NAMES)


def test_a_pattern_that_decides_nothing_is_refused():
    for pattern in ("lm_head", "layers.13-20", "layer", "mlp.q_proj", "0-11.layers"):
        with pytest.raises(ValueError, match=rf"weights: {pattern} matches no tensor; a tensor is named like model\."):
            Weights(0.5, {pattern: 0.3}).for_tensors(NAMES)
    with pytest.raises(ValueError, match="weights: up_proj is overruled by longer patterns everywhere"):
        Weights(0.5, {"up_proj": 0.3, "mlp.up_proj": 0.4}).for_tensors(NAMES)


def test_two_that_disagree_are_refused_unless_a_longer_one_decides():
    patterns = {"layers.0-11": 0.3, "layers.11-12": 0.4}
    with pytest.raises(ValueError, match=r"layers\.0-11 and layers\.11-12 say different things of tensor"):
        Weights(0.5, patterns).for_tensors(NAMES)
    found = Weights(0.5, {**patterns, "model.layers.11": 0.9}).for_tensors(NAMES)
    assert found["model.layers.11.mlp.up_proj.weight"] == 0.9


def test_shares_outside_their_range_and_names():
    for weight in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="weight must be between 0"):
            Weights(weight)
        with pytest.raises(ValueError, match="weight of mlp must be between 0"):
            Weights(0.5, {"mlp": weight})
    assert str(Weights(0.5)) == "0.5"
    assert str(Weights(0.5, {"mlp": 0.25, "layers.0-11": 1})) == "0.5 layers.0-11 1 mlp 0.25"
