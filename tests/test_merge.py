"""Merged folders: exact arithmetic, parents at the ends, memory, faults, refusals that name what does not fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from long2short import merge as merging
from long2short.merge import LINEAR, Parents, merge
from long2short.merge_files import read_layout
from long2short.merge_rules import Rule, dare, merge_tensor, slerp, task_arithmetic, ties
from long2short.merge_weights import Weights
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


def average(output: Path, long: Path, short: Path, weight: float, **options) -> dict:
    return merge(output, Parents(long, short), Weights(weight), **options)


@pytest.mark.parametrize("weight", [0.5, 0.3])
def test_it_is_the_weighted_average_and_loads(parents, tmp_path, weight):
    long, short = parents
    seen: list[tuple[int, int]] = []
    summary = average(tmp_path / "model", long, short, weight, report=lambda done, total: seen.append((done, total)))
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
        average(tmp_path / "model", long, short, weight)
        assert_same(tensors(tmp_path / "model"), tensors(parent))


@pytest.mark.parametrize("rule", [LINEAR, Rule(slerp)], ids=["linear", "slerp"])
def test_the_ends_are_the_parents_in_bf16_and_in_shards(tmp_path, rule):
    long = write_parent(tmp_path / "long", 1, torch.bfloat16, shards="20KB")
    short = write_parent(tmp_path / "short", 2, torch.bfloat16)
    for weight, parent in ((1.0, long), (0.0, short)):
        summary = average(tmp_path / "model", long, short, weight, rule=rule)
        assert_same(tensors(tmp_path / "model"), tensors(parent))
        assert summary["dtypes"] == {"long": ["BF16"], "short": ["BF16"]}


MEASURED = """
import sys, threading, time
from pathlib import Path
from long2short.merge import Parents, merge
from long2short.merge_rules import Rule, linear, slerp, ties
from long2short.merge_weights import Weights

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

folder, name = Path(sys.argv[1]), sys.argv[2]
rule = {"linear": Rule(linear), "slerp": Rule(slerp), "ties": ties(0.5)}[name]
small = Parents(folder / "small", folder / "small", folder / "small" if name == "ties" else None)
merge(folder / "first", small, Weights(0.5), rule)  # what is loaded and allocated once
before, most, over = held(), [0], threading.Event()

def watch():
    while not over.is_set():
        most[0] = max(most[0], held())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
parents = Parents(folder / "long", folder / "short", folder / "long" if name == "ties" else None)
try:
    merge(folder / "merged", parents, Weights(0.5), rule)
finally:
    over.set()
    watcher.join()
print(most[0] - before)
"""


@pytest.mark.parametrize("rule", ["linear", "slerp", "ties"])
def test_memory_does_not_grow_with_the_model(tmp_path, rule):
    """Two models of 50 MB: their merge takes less memory than one of them."""
    tokenizer = make_tokenizer()
    for name, seed, hidden in (("small", 0, 32), ("long", 1, 512), ("short", 2, 512)):
        save_model(make_model(hidden, 4, 8, tokenizer, seed), tokenizer, tmp_path / name)
    layout = read_layout(tmp_path / "long")
    whole = sum(info.num_bytes for info in layout.values())
    command = [sys.executable, "-c", MEASURED, str(tmp_path), rule]
    taken = int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout)
    assert whole > 40_000_000
    assert taken < whole, f"{taken / 1e6:.0f} MB for a model of {whole / 1e6:.0f} MB"


def test_a_parent_is_never_replaced(parents):
    long, short = parents
    before = folder_hash(short)
    with pytest.raises(ValueError, match="is one of the parents, which the result would replace"):
        average(short, long, short, 0.5)
    assert folder_hash(short) == before


def test_the_order_of_parents_and_the_complement_of_the_weight_agree(parents, tmp_path):
    long, short = parents
    average(tmp_path / "a", long, short, 0.25)
    average(tmp_path / "b", short, long, 0.75)
    ours, theirs = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    for name, tensor in ours.items():  # up to the rounding of one product, which may be fused with the sum
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-7)


def test_shards_stay_shards(tmp_path):
    long = write_parent(tmp_path / "long", 1, shards="20KB")
    short = write_parent(tmp_path / "short", 2)  # one file: the long model's layout decides
    average(tmp_path / "model", long, short, 0.5)
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
    average(tmp_path / "model", long, short, 0.6)
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
        average(output, parents[0], parents[1], 0.5)
    assert not list(output.parent.glob(f"*{output.name}*"))  # no partial folder either


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
    average(out, long, short, 0.5)


def test_values_that_are_not_finite_and_overflow_are_refused(parents, tmp_path):
    long, short = parents

    def spoil(content: dict[str, torch.Tensor]) -> None:
        content["model.norm.weight"][3] = torch.nan

    edit(short, spoil)
    for weight in (0.5, 1.0):
        with pytest.raises(
            ValueError, match=r"tensor model.norm.weight of the short model has values that are not finite"
        ):
            average(tmp_path / "model", long, short, weight)
    assert not (tmp_path / "model").exists()
    shutil.rmtree(short)
    write_parent(short, 2)
    edit(short, lambda content: content["model.norm.weight"].fill_(1e6))
    edit(long, lambda content: content.update({name: tensor.half() for name, tensor in content.items()}))
    with pytest.raises(ValueError, match=r"tensor model.norm.weight: .* do not fit into torch\.float16"):
        average(tmp_path / "model", long, short, 0.5)
    assert not list(tmp_path.glob("*model*"))
    for weight in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="weight must be between 0"):
            average(tmp_path / "model", long, short, weight)


def test_damaged_and_unsafe_folders_are_refused(parents, tmp_path):
    long, short = parents
    content = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(content[:-10])
    with pytest.raises(Exception, match=r"(?i)incomplete|invalid"):
        average(tmp_path / "model", long, short, 0.5)
    (short / "model.safetensors").unlink()
    (short / "pytorch_model.bin").write_bytes(b"x")
    refused(parents, tmp_path / "model", "only safetensors can be merged")
    (short / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    refused(parents, tmp_path / "model", "outside its folder")
    with pytest.raises(ValueError, match="is not a folder"):
        average(tmp_path / "model", Path("./nowhere"), short, 0.5)


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


# --- rules, weights, and whose files ----------------------------------------------------------------------------------

RULES = {
    "linear": LINEAR,
    "slerp": Rule(slerp),
    "task_arithmetic": task_arithmetic(0.7),
    "ties": ties(0.6, 0.9),
    "dare": dare(0.5, seed=3),
}


def with_base(rule: Rule, parents: tuple[Path, Path], folder: Path) -> Parents:
    return Parents(*parents, write_parent(folder / "base", 3) if rule.takes_base else None)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_folder_is_merged_as_its_tensors_are(parents, tmp_path, monkeypatch, name, threads):
    rule = RULES[name]
    chosen = with_base(rule, parents, tmp_path)
    for module in (merging, sys.modules["long2short.merge_rules"]):
        monkeypatch.setattr(module, "PIECE", 301)  # a few pieces a tensor, the last one shorter
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        merge(tmp_path / "model", chosen, Weights(0.4), rule)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    sources = [tensors(Path(parent)) for parent in (chosen.long, chosen.short, chosen.base) if parent]
    expected = {key: merge_tensor(rule, tuple(s[key] for s in sources), 0.4, key) for key in sources[0]}
    assert_same(tensors(tmp_path / "model"), expected)


def test_shares_per_module_and_layer(parents, tmp_path):
    long, short = parents
    weights = Weights(0.5, {"mlp": 1.0, "layers.1-7.self_attn": 0.0, "layers.0.self_attn": 0.25})
    summary = merge(tmp_path / "model", Parents(long, short), weights)
    ours, left, right = tensors(tmp_path / "model"), tensors(long), tensors(short)
    for name, tensor in ours.items():
        share = 0.5
        if "mlp" in name:
            share = 1.0
        elif "self_attn" in name:
            share = 0.25 if "layers.0." in name else 0.0
        expected = merge_tensor(LINEAR, (left[name], right[name]), share)
        assert torch.equal(tensor, expected), name
    assert summary["weights"] == dict(weights.patterns)
    with pytest.raises(ValueError, match=r"weights: layers\.2 matches no tensor"):
        merge(tmp_path / "other", Parents(long, short), Weights(0.5, {"layers.2": 0.1}))
    assert not list(tmp_path.glob("*other*"))


def test_files_and_dtype_of_the_named_parent(parents, tmp_path):
    long, short = parents
    shutil.rmtree(short)
    write_parent(short, 2, torch.bfloat16, shards="20KB")
    (short / "chat_template.jinja").write_text("{{ messages }} short")
    merge(tmp_path / "model", Parents(long, short, like_short=True), Weights(1.0))
    assert (tmp_path / "model/chat_template.jinja").read_text() == "{{ messages }} short"
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == "bfloat16"
    names = sorted(path.name for path in short.glob("model-*"))
    assert sorted(path.name for path in (tmp_path / "model").glob("model-*")) == names and len(names) > 1
    ours, left = tensors(tmp_path / "model"), tensors(long)
    assert all(torch.equal(tensor, left[name].bfloat16()) for name, tensor in ours.items())


def test_a_base_is_checked_and_asked_for(parents, tmp_path):
    long, short = parents
    base = write_parent(tmp_path / "base", 3)
    out = tmp_path / "model"
    for rule, given, message in ((ties(0.5), None, "needs a base"), (LINEAR, base, "takes no base")):
        with pytest.raises(ValueError, match=message):
            merge(out, Parents(long, short, given), Weights(0.5), rule)
    edit_json(base / "tokenizer_config.json", eos_token="<|user|>")  # it is never prompted
    merge(out, Parents(long, short, base), Weights(0.5), ties(0.5))
    shutil.rmtree(out)
    edit(base, lambda content: content["model.norm.weight"].fill_(torch.inf))
    with pytest.raises(ValueError, match=r"tensor model.norm.weight of the base model has values that are not finite"):
        merge(out, Parents(long, short, base), Weights(0.5), ties(0.5))
    edit_json(base / "config.json", rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    with pytest.raises(ValueError, match=r"config key rope_parameters is .*long and .*base"):
        merge(out, Parents(long, short, base), Weights(0.5), ties(0.5))
    assert not list(tmp_path.glob("*model*"))


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["merge.shard:1", "merge.tensor:1", "merge.tensor:7", "merge.model:1"])
def test_the_model_is_whole_or_absent(parents, tmp_path, monkeypatch, site):
    long, short = parents
    output = tmp_path / "stage" / "model"
    monkeypatch.setenv("REASON_FAULT", f"{site}:raise")
    reset_faults()
    with pytest.raises(FaultRaised):
        average(output, long, short, 0.5)
    assert not list(output.parent.iterdir())
    monkeypatch.delenv("REASON_FAULT")
    average(output, long, short, 0.5)
    average(tmp_path / "again", long, short, 0.5)
    assert folder_hash(output) == folder_hash(tmp_path / "again")
    assert [path.name for path in output.parent.iterdir()] == ["model"]


MERGE = """
import sys
from long2short.merge import Parents, merge
from long2short.merge_weights import Weights
merge(__import__("pathlib").Path(sys.argv[1]), Parents(sys.argv[2], sys.argv[3]), Weights(0.5))
"""


def test_a_kill_in_the_middle_leaves_nothing_that_counts_as_a_model(parents, tmp_path):
    output = tmp_path / "stage" / "model"
    code = [sys.executable, "-c", MERGE, str(output), *map(str, parents)]
    environment = os.environ | {"REASON_FAULT": "merge.tensor:5:kill", "PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run(code, env=environment, check=False).returncode == -9
    assert [path.name for path in output.parent.iterdir()] == [".model.partial"]
    assert folder_hash(output.parent) == {}  # what is hidden is in no manifest
    average(output, parents[0], parents[1], 0.5)
    assert [path.name for path in output.parent.iterdir()] == ["model"]


def test_a_full_disk_is_named(parents, tmp_path, monkeypatch):
    def full(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"No space left on device while a merged model was written.*model\.safetensors"):
        average(tmp_path / "model", parents[0], parents[1], 0.5)
    assert not list(tmp_path.glob("*model*"))
    monkeypatch.undo()
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: write(file, data[:1000], offset))  # a bit at a time
    average(tmp_path / "a", parents[0], parents[1], 0.5)
    monkeypatch.undo()
    average(tmp_path / "b", parents[0], parents[1], 0.5)
    assert_same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
