"""Merging: exact arithmetic, parents at the ends, and refusals that name what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from long2short.merge import average, merge, read_layout
from rl.faults import FaultRaised, reset_faults
from rl.policy import load_model, load_tokenizer, save_model
from rl.runs import folder_hash
from rl.tasks.tiny_models import make_model, make_tokenizer


def write_parent(folder: Path, seed: int, dtype: torch.dtype = torch.float32, shards: str | None = None) -> Path:
    tokenizer = make_tokenizer()
    model = make_model(32, 2, 2, tokenizer, seed)
    torch.nn.Module.to(model, dtype=dtype)
    if shards is None:
        save_model(model, tokenizer, folder)
    else:
        folder.mkdir()
        model.save_pretrained(folder, max_shard_size=shards)
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def parents(tmp_path) -> tuple[Path, Path]:
    return write_parent(tmp_path / "long", 1), write_parent(tmp_path / "short", 2)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8)), name  # bits: -0.0 is not 0.0


def test_the_docstrings_example():
    merged = average("w", torch.tensor([2.0, 1.0]), torch.tensor([-1.0, 1.0]), 0.75)
    assert merged.tolist() == [1.25, 1.0]


@pytest.mark.parametrize("weight", [0.5, 0.3])
def test_it_is_the_weighted_average_and_loads(parents, tmp_path, weight):
    long, short = parents
    seen: list[tuple[int, int]] = []
    summary = merge(
        tmp_path / "model", long=long, short=short, weight=weight, report=lambda done, total: seen.append((done, total))
    )
    ours, left, right = tensors(tmp_path / "model"), tensors(long), tensors(short)
    assert ours.keys() == left.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, weight * left[name] + (1 - weight) * right[name], rtol=1e-6, atol=1e-8)
    model = load_model(tmp_path / "model")
    assert torch.equal(model.lm_head.weight, ours["model.embed_tokens.weight"])  # still tied
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert seen == [(i + 1, len(ours)) for i in range(len(ours))]
    # Everything but the weights is the long parent's, byte for byte.
    hashes, expected = folder_hash(tmp_path / "model"), folder_hash(long)
    assert {k: v for k, v in hashes.items() if k != "model.safetensors"} == {
        k: v for k, v in expected.items() if k != "model.safetensors"
    }
    assert load_tokenizer(tmp_path / "model").chat_template == load_tokenizer(long).chat_template


def test_the_ends_are_the_parents_bit_for_bit(parents, tmp_path):
    long, short = parents
    content = tensors(long)
    content["model.norm.weight"][:2] = torch.tensor([-0.0, 1e-45])  # what multiplying by 1 and adding 0 would change
    save_file(content, long / "model.safetensors", {"format": "pt"})
    for weight, parent in ((1.0, long), (0.0, short), (1, long), (0, short)):
        merge(tmp_path / "model", long=long, short=short, weight=weight)
        assert_same(tensors(tmp_path / "model"), tensors(parent))


def test_the_order_of_parents_and_the_complement_of_the_weight_agree(parents, tmp_path):
    long, short = parents
    merge(tmp_path / "a", long=long, short=short, weight=0.25)
    merge(tmp_path / "b", long=short, short=long, weight=0.75)
    assert_same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))


def test_shards_stay_shards(tmp_path):
    long = write_parent(tmp_path / "long", 1, shards="20KB")
    short = write_parent(tmp_path / "short", 2)  # one file: the long model's layout decides
    merge(tmp_path / "model", long=long, short=short, weight=0.5)
    files = sorted(path.name for path in long.glob("*.safetensors*"))
    assert len(files) > 3
    assert sorted(path.name for path in (tmp_path / "model").glob("*.safetensors*")) == files
    ours, left, right = tensors(tmp_path / "model"), tensors(long), tensors(short)
    for name in left:
        assert torch.equal(ours[name], 0.5 * left[name] + 0.5 * right[name])
    load_model(tmp_path / "model")


def test_the_sum_is_in_fp32_and_the_result_in_the_long_models_dtype(tmp_path):
    long = write_parent(tmp_path / "long", 1, torch.bfloat16)
    short = write_parent(tmp_path / "short", 2)
    merge(tmp_path / "model", long=long, short=short, weight=0.6)
    ours, left, right = tensors(tmp_path / "model"), tensors(long), tensors(short)
    for name, tensor in ours.items():
        assert tensor.dtype == torch.bfloat16
        expected = 0.6 * left[name].float() + (1 - 0.6) * right[name]
        assert torch.equal(tensor, expected.bfloat16())
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == "bfloat16"


def edit(folder: Path, change) -> None:
    content = tensors(folder)
    change(content)
    save_file(content, folder / "model.safetensors", {"format": "pt"})


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(parents: tuple[Path, Path], output: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge(output, long=parents[0], short=parents[1], weight=0.5)
    assert not output.exists()


def test_parents_that_are_no_relatives_are_refused_by_name(parents, tmp_path):
    long, short = parents
    out, saved = tmp_path / "model", tmp_path / "saved"
    shutil.copytree(short, saved)

    def fresh() -> None:
        shutil.rmtree(short)
        shutil.copytree(saved, short)

    edit(short, lambda c: c.pop("model.layers.1.mlp.up_proj.weight"))
    refused(parents, out, "tensor model.layers.1.mlp.up_proj.weight of .*long is not in .*short")
    fresh()
    edit(short, lambda c: c.update({"lm_head.weight": c["model.embed_tokens.weight"].clone()}))
    refused(parents, out, "tensor lm_head.weight of .*short is not in .*long")
    fresh()
    edit(short, lambda c: c.update({"model.norm.weight": c["model.norm.weight"][:16].clone()}))
    refused(parents, out, r"tensor model.norm.weight has shape \(32,\) in .*long and \(16,\)")
    fresh()
    edit(short, lambda c: c.update({"model.norm.weight": c["model.norm.weight"].to(torch.int8)}))
    refused(parents, out, "tensor model.norm.weight of .*short has dtype I8: only the float types")
    fresh()
    for key, value in (
        ("rope_parameters", {"rope_theta": 1e6, "rope_type": "default"}),
        ("max_position_embeddings", 4096),
        ("tie_word_embeddings", False),
        ("vocab_size", 64),
        ("num_hidden_layers", 3),
    ):
        edit_json(short / "config.json", **{key: value})
        refused(parents, out, f"config key {key} is ")
        fresh()
    (short / "tokenizer.json").write_text((short / "tokenizer.json").read_text().replace('" wait "', '" hmm "'))
    refused(parents, out, r"token id \d+ is ' wait ' in .*long and ' hmm ' in .*short")
    fresh()
    edit_json(short / "tokenizer_config.json", eos_token="<|user|>")
    refused(parents, out, "eos_token_id is 1 in .*long and 3 in .*short")
    fresh()
    edit_json(short / "config.json", use_cache=False, transformers_version="4.0")  # what may differ
    merge(out, long=long, short=short, weight=0.5)


def test_values_that_are_not_finite_and_overflow_are_refused(parents, tmp_path):
    long, short = parents

    def spoil(content: dict[str, torch.Tensor]) -> None:
        content["model.norm.weight"][3] = torch.nan

    edit(short, spoil)
    for weight in (0.5, 1.0):
        with pytest.raises(
            ValueError, match=r"tensor model.norm.weight of the short model has values that are not finite"
        ):
            merge(tmp_path / "model", long=long, short=short, weight=weight)
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match=r"do not fit into torch\.float16"):
        average("w", torch.tensor([60000.0], dtype=torch.float16), torch.tensor([1e6]), 0.5)
    for weight in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="weight must be between 0"):
            merge(tmp_path / "model", long=long, short=short, weight=weight)


def test_damaged_and_unsafe_folders_are_refused(parents, tmp_path):
    long, short = parents
    content = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(content[:-10])
    with pytest.raises(Exception, match=r"(?i)incomplete|invalid"):
        merge(tmp_path / "model", long=long, short=short, weight=0.5)
    (short / "model.safetensors").unlink()
    (short / "pytorch_model.bin").write_bytes(b"x")
    refused(parents, tmp_path / "model", "only safetensors can be merged")
    (short / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    refused(parents, tmp_path / "model", "outside its folder")
    with pytest.raises(ValueError, match="is not a folder"):
        merge(tmp_path / "model", long="./nowhere", short=short, weight=0.5)


def test_an_index_that_does_not_match_its_files_is_refused(tmp_path):
    long = write_parent(tmp_path / "long", 1, shards="20KB")
    index = long / "model.safetensors.index.json"
    saved = json.loads(index.read_text())
    weight_map = saved["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"extra": weight_map["model.norm.weight"]}}))
    with pytest.raises(ValueError, match="tensor extra is in"):
        read_layout(long)
    other = next(file for file in weight_map.values() if file != weight_map["model.norm.weight"])
    index.write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": other}}))
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight of .* is not where"):
        read_layout(long)


@pytest.mark.parametrize("site", ["merge.tensor:1", "merge.tensor:7", "merge.model:1"])
def test_the_model_is_whole_or_absent(parents, tmp_path, monkeypatch, site):
    long, short = parents
    output = tmp_path / "stage" / "model"
    monkeypatch.setenv("REASON_FAULT", f"{site}:raise")
    reset_faults()
    with pytest.raises(FaultRaised):
        merge(output, long=long, short=short, weight=0.5)
    assert not output.exists()
    monkeypatch.delenv("REASON_FAULT")
    merge(output, long=long, short=short, weight=0.5)
    merge(tmp_path / "again", long=long, short=short, weight=0.5)
    assert folder_hash(output) == folder_hash(tmp_path / "again")
    assert [path.name for path in output.parent.iterdir()] == ["model"]
