"""What a planner must know of a model: its dimensions, read from the config alone, without a weight.

Decoders of the Llama family (Llama, Mistral, Qwen2, Qwen3, SmolLM2): grouped-query attention and a gated MLP.
`shape_of_config` builds the model on torch's meta device and compares the number of parameters with its own, so an
architecture that is something else is refused and never planned wrong. `KNOWN` holds the dimensions of models that are
often trained, from the `config.json` of each on the Hugging Face hub, for machines without a network.

Line: `reason plan RECIPE`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The dimensions of a decoder.

    Example: vocabulary 10, hidden 4, 1 layer, 2 heads, 1 of keys, head size 2, MLP 6, tied: embedding 40; attention
    16 + 8 + 8 + 16 = 48; MLP 3 × 24 = 72; two norms 8; last norm 4: 172 parameters.
    """

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    tied: bool  # the output layer is the embedding
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def query(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of all key heads, which is that of the values."""
        return self.kv_heads * self.head_dim

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the output layer."""
        return self.vocab * self.hidden

    @property
    def layer_matrices(self) -> int:
        """Parameters of the linear layers of one decoder layer."""
        return 2 * self.hidden * (self.query + self.key) + 3 * self.hidden * self.intermediate

    @property
    def layer(self) -> int:
        """Parameters of one decoder layer."""
        bias = self.query + 2 * self.key if self.qkv_bias else 0
        return self.layer_matrices + 2 * self.hidden + bias + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.embedding * (1 if self.tied else 2) + self.hidden

    @property
    def multiplied(self) -> int:
        """Parameters that every token is multiplied with: all matrices but the embedding, which is looked up."""
        return self.layers * self.layer_matrices + self.embedding

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA adapters on every linear layer but the output layer: rank × (inputs + outputs) of each."""
        h, q, k, i = self.hidden, self.query, self.key, self.intermediate
        return self.layers * rank * (2 * (h + q) + 2 * (h + k) + 3 * (h + i))

    def kv_bytes(self, width: int = 2) -> int:
        """Bytes of keys and values of one token: Qwen2.5-7B in bf16 28 × 2 × 4 × 128 × 2 = 57,344."""
        return self.layers * 2 * self.key * width


def _qwen25(vocab: int, hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, tied: bool) -> ModelShape:
    return ModelShape(vocab, hidden, layers, heads, kv_heads, hidden // heads, mlp, tied, qkv_bias=True)


def _llama(vocab: int, hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, tied: bool) -> ModelShape:
    return ModelShape(vocab, hidden, layers, heads, kv_heads, hidden // heads, mlp, tied)


def _qwen3(hidden: int, layers: int, heads: int, mlp: int, tied: bool) -> ModelShape:
    return ModelShape(151_936, hidden, layers, heads, 8, 128, mlp, tied, qk_norm=True)


_QWEN_HALF = _qwen25(151_936, 896, 24, 14, 2, 4864, True)
_QWEN_1_5 = _qwen25(151_936, 1536, 28, 12, 2, 8960, True)
_QWEN_3 = _qwen25(151_936, 2048, 36, 16, 2, 11_008, True)
_QWEN_7 = _qwen25(152_064, 3584, 28, 28, 4, 18_944, False)
_QWEN_14 = _qwen25(152_064, 5120, 48, 40, 8, 13_824, False)
_QWEN_32 = _qwen25(152_064, 5120, 64, 40, 8, 27_648, False)
_LLAMA_8 = _llama(128_256, 4096, 32, 32, 8, 14_336, False)
_LLAMA_70 = _llama(128_256, 8192, 80, 64, 8, 28_672, False)

KNOWN = MappingProxyType(
    {
        **{f"Qwen/Qwen2.5-0.5B{kind}": _QWEN_HALF for kind in ("", "-Instruct")},
        **{f"Qwen/Qwen2.5-{kind}": _QWEN_1_5 for kind in ("1.5B", "1.5B-Instruct", "Math-1.5B", "Math-1.5B-Instruct")},
        **{f"Qwen/Qwen2.5-3B{kind}": _QWEN_3 for kind in ("", "-Instruct")},
        **{f"Qwen/Qwen2.5-{kind}": _QWEN_7 for kind in ("7B", "7B-Instruct", "Math-7B", "Math-7B-Instruct")},
        **{f"Qwen/Qwen2.5-14B{kind}": _QWEN_14 for kind in ("", "-Instruct")},
        **{f"Qwen/Qwen2.5-32B{kind}": _QWEN_32 for kind in ("", "-Instruct")},
        "open-r1/OpenR1-Distill-7B": _QWEN_7,
        "Qwen/QwQ-32B": _QWEN_32,
        "Qwen/QwQ-32B-Preview": _QWEN_32,
        "Qwen/Qwen3-0.6B": _qwen3(1024, 28, 16, 3072, True),
        "Qwen/Qwen3-4B": _qwen3(2560, 36, 32, 9728, True),
        "Qwen/Qwen3-8B": _qwen3(4096, 36, 32, 12_288, False),
        **{f"meta-llama/Llama-3.1-8B{kind}": _LLAMA_8 for kind in ("", "-Instruct")},
        "meta-llama/Llama-3.1-70B": _LLAMA_70,
        "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_70,
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _qwen25(151_936, 1536, 28, 12, 2, 8960, False),
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _QWEN_7,
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": _QWEN_14,
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": _QWEN_32,
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _LLAMA_8,
        "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": _LLAMA_70,
        **{
            f"HuggingFaceTB/SmolLM2-135M{kind}": _llama(49_152, 576, 30, 9, 3, 1536, True) for kind in ("", "-Instruct")
        },
    }
)


def read_shape(name: str | Path) -> ModelShape:
    """The shape of a model folder or a hub id: its config where it is on this machine, then `KNOWN`, then the hub.

    Errors: ValueError for a config that cannot be had, and for a model that is no decoder of this family.
    """
    from transformers import AutoConfig

    try:
        return shape_of_config(AutoConfig.from_pretrained(str(name), local_files_only=True), str(name))
    except OSError as missing:
        if str(name) in KNOWN:
            return KNOWN[str(name)]
        if Path(name).is_dir():
            raise ValueError(f"{name}: its config.json cannot be read: {missing}") from missing
    try:
        config = AutoConfig.from_pretrained(str(name))
    except OSError as missing:
        raise ValueError(
            f"{name}: there is no network to read its config from, and it is none of the {len(KNOWN)} models whose "
            "dimensions are known; give a folder with its config.json"
        ) from missing
    return shape_of_config(config, str(name))


def shape_of_config(config: PretrainedConfig, name: str) -> ModelShape:
    """The shape that a config describes, checked against the model itself on the meta device.

    Errors: ValueError for a model that has other parameters than such a decoder.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        hidden, heads = config.hidden_size, config.num_attention_heads
        shape = ModelShape(
            vocab=config.vocab_size,
            hidden=hidden,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            intermediate=config.intermediate_size,
            tied=bool(config.tie_word_embeddings),
            qkv_bias=config.model_type == "qwen2",
            qk_norm=config.model_type == "qwen3",
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except AttributeError as missing:
        raise ValueError(f"{name} ({config.model_type}) is no decoder that can be planned: {missing}") from missing
    found = sum(parameter.numel() for parameter in model.parameters())
    if found != shape.parameters:
        raise ValueError(
            f"{name} ({config.model_type}) has {found:,} parameters where a decoder of its dimensions has "
            f"{shape.parameters:,}: only attention with a gated MLP (Llama, Mistral, Qwen2, Qwen3) can be planned"
        )
    return shape
