"""Models: loading, saving, and the log-probabilities of given tokens.

`PolicyModel` is the training forward: packed rows in (`rl.packing`), log-probs of the completion tokens out, logits
never held for more than a chunk (`rl.logprobs`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from rl.attention import PACKED
from rl.logprobs import CHUNK_TOKENS, LogitTransform, chunked_logprobs
from rl.packing import PackedBatch, pack
from rl.rows import TrainingRow
from rl.runs import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# A bar per loaded shard would break the progress of the stage that loads it.
logging.disable_progress_bar()


def load_model(name: str | Path, *, to_train: bool = False) -> PreTrainedModel:
    """A causal language model in eval mode (no dropout anywhere in `reason`): fp32 on CPU, bf16 on a GPU.

    With `to_train` fp32 everywhere: an AdamW step at lr 1e-6 is smaller than the spacing of bf16 weights, so most of it
    would be lost without a word.
    """
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu and not to_train else torch.float32
    model = AutoModelForCausalLM.from_pretrained(str(name), dtype=dtype)
    return model.to(torch.device("cuda" if on_gpu else "cpu")).eval()  # pyright: ignore[reportArgumentType]


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; one without a pad token pads with its EOS (padding is always masked)."""
    tokenizer = AutoTokenizer.from_pretrained(str(name))
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: the tokenizer has no EOS token, so no completion could ever end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write an ordinary Hugging Face model folder. The caller makes it appear at once (a partial stage folder)."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer into a model folder, the same bytes with and without a network."""
    tokenizer.save_pretrained(folder)
    # transformers writes down whether it was offline; a model's files must not depend on that.
    path = folder / "tokenizer_config.json"
    kept = {k: v for k, v in read_json(path).items() if k not in ("is_local", "local_files_only")}
    write_json(path, kept, "model.tokenizer")


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up rows; `load_tokenizer` made sure that there is one."""
    assert isinstance(tokenizer.pad_token_id, int)
    return tokenizer.pad_token_id


def eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a completion in training rows; `load_tokenizer` made sure that there is one."""
    assert isinstance(tokenizer.eos_token_id, int)
    return tokenizer.eos_token_id


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a sampled completion: the generation config's (it may list several) and the tokenizer's."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    return all_stop_ids(configured, tokenizer)


def all_stop_ids(configured: list[int] | int | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids of a generation config's `eos_token_id` and the tokenizer's, each once."""
    ids = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return tuple(dict.fromkeys([*ids, eos_token_id(tokenizer)]))


class PolicyModel(torch.nn.Module):
    """A causal language model as a function from a packed micro-batch to log-probs.

    Its forward is the only training forward, so that whatever wraps this module (DDP, `fully_shard` on it as the root)
    sees every use of the parameters. A PEFT model is used through its base model, whose layers carry the adapters.
    Wrapping sets the model's attention to `rl.attention.PACKED`, which leaves every other use of the model (generation
    included) with SDPA as before.

    At construction its log-probs of two short sequences are compared with the model's own. A model whose attention or
    logits are not what is computed here (soft-capped attention, recurrent layers, learned prompts, ...) is refused by
    name, with its attention put back.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        chunk_tokens: int = CHUNK_TOKENS,
        fp32_head: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        """`chunk_tokens`: positions that go through the output layer at a time. `fp32_head`: its product in fp32.

        `gradient_checkpointing`: decoder layers keep their inputs only and run again in the backward pass.
        """
        super().__init__()
        self.model = model
        self.chunk_tokens, self.fp32_head = chunk_tokens, fp32_head
        self.gradient_checkpointing = gradient_checkpointing
        inner = _base(model)
        head = inner.get_output_embeddings()
        if type(head) is not torch.nn.Linear:
            raise ValueError(
                f"{type(inner).__name__}: the output layer is a {type(head).__name__}, log-probs need a plain Linear; "
                "with PEFT leave the output layer out of target_modules and modules_to_save"
            )
        if head.weight.is_meta or isinstance(head.weight, DTensor):
            raise ValueError(
                f"{type(inner).__name__}: its weights are on the meta device or sharded already; load them, wrap the "
                "model in PolicyModel, and shard that"
            )
        self.transform = _logit_transform(inner)
        before = inner.config._attn_implementation
        own = _own_logprobs(model, head.weight)
        inner.set_attn_implementation(PACKED)
        try:
            self._check(own, head.weight)
        except ValueError:
            inner.set_attn_implementation(before or "sdpa")
            raise
        if gradient_checkpointing:
            inner.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, batch: PackedBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs (with gradient) and entropies (without) of the completion tokens, two (B, T) in nats, 0 on padding.

        Both are of softmax(logits / temperature), the distribution the sampler drew from.
        """
        head = _base(self.model).get_output_embeddings()
        assert isinstance(head, torch.nn.Linear)
        if isinstance(head.weight, DTensor):
            raise ValueError(
                "the output layer's weight is sharded inside PolicyModel.forward; apply fully_shard to the PolicyModel "
                "and to its decoder layers, not to the output layer"
            )
        logprobs, entropies = chunked_logprobs(
            self.hidden(batch).index_select(0, batch.scored), head.weight, batch.targets,
            bias=head.bias, temperature=temperature, transform=self.transform,
            chunk_tokens=self.chunk_tokens, fp32=self.fp32_head,
        )  # fmt: skip
        return batch.padded(logprobs), batch.padded(entropies)

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """The last hidden states of the packed row, (N, H)."""
        # A mask with four dimensions is handed on as it is, so none is built; packed attention does not read it.
        unread = torch.empty(1, 1, 1, 1, device=batch.input_ids.device)
        checkpoint = self.gradient_checkpointing and torch.is_grad_enabled()
        with _checkpointing(self.model) if checkpoint else nullcontext():
            output = _base(self.model).base_model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=unread,
                use_cache=False, packed_layout=batch.layout,
            )  # fmt: skip
        return output.last_hidden_state[0]

    @torch.no_grad()
    def _check(self, own: list[torch.Tensor], weight: torch.Tensor) -> None:
        """Refuse a model whose packed log-probs are not its own."""
        rows = _check_rows(weight)
        with _evaluating(self.model), _half_on_gpu(weight):
            found, _ = self(pack(rows, weight.device), temperature=1.0)
        worst = max((line[: len(o)] - o).abs().max().item() for line, o in zip(found, own, strict=True))
        scale = max(1.0, *(o.abs().max().item() for o in own))
        tolerance = scale * (1e-4 if weight.dtype == torch.float32 and not weight.is_cuda else 3e-2)
        if not worst <= tolerance:  # NaN too
            raise ValueError(
                f"{type(_base(self.model)).__name__}: packed log-probs differ from the model's own by {worst:.3g} nats "
                f"where rounding explains {tolerance:.3g}; its attention or logits are not what rl/attention.py and "
                "rl/logprobs.py compute. Use a model with causal softmax attention and a linear output layer"
            )


def _check_rows(weight: torch.Tensor) -> list[TrainingRow]:
    """Two completions of one prompt, of different lengths, in a vocabulary as small as `weight` (V, H) says."""
    prompt, *completions = (tuple(i % len(weight) for i in ids) for ids in ((3, 7, 5, 11), (2, 6, 1), (4, 8, 9, 9, 12)))
    return [TrainingRow(prompt, ids, (0.0,) * len(ids), 0.0, sample=i) for i, ids in enumerate(completions)]


@torch.no_grad()
def _own_logprobs(model: PreTrainedModel, weight: torch.Tensor) -> list[torch.Tensor]:
    """Log-probs of `_check_rows` as the model gives them, one plain call a row."""
    found = []
    with _evaluating(model), _half_on_gpu(weight):
        for row in _check_rows(weight):
            ids = torch.tensor([row.prompt_ids + row.token_ids], device=weight.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, -row.num_tokens - 1 : -1].float()
            found.append(logits.log_softmax(-1).gather(-1, ids[0, -row.num_tokens :, None]).squeeze(-1))
    return found


def _half_on_gpu(weight: torch.Tensor) -> torch.autocast:
    """On a GPU the check runs in bf16, so that it is varlen attention which is checked."""
    return torch.autocast(weight.device.type, torch.bfloat16, enabled=weight.is_cuda)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _base(model: PreTrainedModel) -> PreTrainedModel:
    """The causal language model inside a PEFT model; any other is its own."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def _logit_transform(model: PreTrainedModel) -> LogitTransform:
    """What the config says becomes of the output layer's product: Cohere multiplies, Granite divides, Gemma 2 caps."""
    config = model.config.get_text_config()
    multiply, divide = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    return LogitTransform((multiply or 1.0) / (divide or 1.0), getattr(config, "final_logit_softcapping", None))


@contextmanager
def _checkpointing(model: torch.nn.Module) -> Iterator[None]:
    """Let decoder layers checkpoint. transformers does so in training mode only, which would switch dropout on and the
    sampler's cache off; so the layers alone are told, for this forward, and nothing inside them."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    before = [layer.training for layer in layers]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.training = training
