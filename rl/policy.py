"""Models: loading, saving, and the log-probabilities of given tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

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
    ids = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return tuple(dict.fromkeys([*ids, eos_token_id(tokenizer)]))


def token_logprobs(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    num_completion: int,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of the last `num_completion` tokens of each row.

    `input_ids`, `attention_mask`: (B, T), prompts left-padded and completions right-padded, so that the completions
    start in one column. Returns two (B, num_completion) tensors in nats, under the distribution `softmax(logits /
    temperature)`, the one the sampler drew from. Logits are made for the completion's positions only and in fp32.
    """
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    logits = model(**arguments, position_ids=position_ids, logits_to_keep=num_completion + 1).logits[:, :-1]
    log_softmax = torch.log_softmax(logits.float() / temperature, dim=-1)  # (B, num_completion, V)
    targets = input_ids[:, -num_completion:].unsqueeze(-1)
    logprobs = log_softmax.gather(-1, targets).squeeze(-1)
    with torch.no_grad():
        entropies = -(log_softmax.exp() * log_softmax).sum(-1)
    return logprobs, entropies
