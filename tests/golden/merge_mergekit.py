"""Makes merge_mergekit.safetensors: what mergekit 0.1.5 makes of small random tensors, for tests/test_merge_rules.py.

    python3.11 -m venv VENV && VENV/bin/pip install mergekit==0.1.5 torch==2.13.0 transformers==5.19.0
    VENV/bin/python tests/golden/merge_mergekit.py

Two tensors, bf16 parents `<tensor>.long`, `.short`, `.base` and results `<tensor>.<case>`, by `mergekit-yaml` with
`dtype: float32, out_dtype: bfloat16`. No delta equals a trim threshold, so that no choice among equals is in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

# name of the case -> (method, weight of the long model, parameters)
CASES = {
    "linear-0.5": ("linear", 0.5, {}),
    "linear-0.3": ("linear", 0.3, {}),
    "slerp-0.5": ("slerp", 0.5, {}),
    "slerp-0.3": ("slerp", 0.3, {}),
    "ties-0.5": ("ties", 0.5, {"density": 0.5}),
    "ties-0.3": ("ties", 0.3, {"density": 0.8}),
    "ties-sum": ("ties", 0.5, {"density": 0.5, "normalize": False}),
    "task-0.3": ("task_arithmetic", 0.3, {}),
}
SIZE, VOCABULARY = 16, 40
SHAPES = {"model.embed_tokens.weight": (VOCABULARY, SIZE), "model.norm.weight": (SIZE,)}


def parents() -> dict[str, dict[str, torch.Tensor]]:
    """{long, short, base} -> tensors, of the first seed that has no equals at a threshold."""
    seed = 0
    while not at_no_threshold(made := draw(seed)):
        seed += 1
    return made


def draw(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, dict[str, torch.Tensor]] = {"long": {}, "short": {}, "base": {}}
    for name, shape in SHAPES.items():
        base = torch.randn(shape, generator=generator).mul(0.02)
        made["base"][name] = base.bfloat16()
        for parent in ("long", "short"):
            made[parent][name] = (base + torch.randn(shape, generator=generator).mul(0.05)).bfloat16()
    return made


def at_no_threshold(made: dict[str, dict[str, torch.Tensor]]) -> bool:
    """Whether the smallest delta that stays is larger than the largest that goes, for every parent and density."""
    for parent in ("long", "short"):
        for name, tensor in made[parent].items():
            magnitudes = (tensor.float() - made["base"][name].float()).abs().flatten().sort(descending=True).values
            kept = [int(density * magnitudes.numel()) for density in (0.5, 0.8)]
            if any(magnitudes[number - 1] == magnitudes[number] for number in kept):
                return False
    return True


def run(folder: Path, method: str, weight: float, parameters: dict[str, object]) -> dict[str, torch.Tensor]:
    shared = {key: parameters[key] for key in ("normalize",) if key in parameters}
    own = {key: value for key, value in parameters.items() if key not in shared}
    if method == "slerp":
        models = [{"model": str(folder / parent)} for parent in ("long", "short")]
        shared = {"t": 1 - weight}
    else:
        shares = {"long": weight, "short": 1 - weight}
        models = [{"model": str(folder / p), "parameters": {"weight": w, **own}} for p, w in shares.items()]
    config = {"merge_method": method, "models": models, "parameters": shared}
    config |= {"dtype": "float32", "out_dtype": "bfloat16"}
    if method != "linear":
        config["base_model"] = str(folder / ("long" if method == "slerp" else "base"))
    (folder / "config.yml").write_text(json.dumps(config))
    out = folder / "out"
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(folder / "config.yml"), str(out), "--quiet"]
    subprocess.run(command, check=True)
    return {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}


def main() -> None:
    golden: dict[str, torch.Tensor] = {}
    made = parents()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for parent, tensors in made.items():
            config = LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=SIZE, intermediate_size=SIZE, num_hidden_layers=0,
                num_attention_heads=2, tie_word_embeddings=True, dtype="bfloat16", architectures=["LlamaForCausalLM"],
            )  # fmt: skip
            config.save_pretrained(folder / parent)
            save_file(tensors, folder / parent / "model.safetensors", {"format": "pt"})
            golden |= {f"{key}.{parent}": tensor for key, tensor in tensors.items()}
        for case, (method, weight, parameters) in CASES.items():
            golden |= {f"{key}.{case}": tensor for key, tensor in run(folder, method, weight, parameters).items()}
    save_file(golden, Path(__file__).with_suffix(".safetensors"))


if __name__ == "__main__":
    main()
