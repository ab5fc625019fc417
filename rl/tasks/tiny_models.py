"""The tiny world's models: an ordinary Hugging Face folder, made from nothing in minutes on two cores.

`pretrain` makes a base model (or, from a given one, a fine-tuned relative of it) on the tiny world's demonstrations.
It stands in for a lab's pre-training and is not part of any method. Recipe: `reason run tiny-base`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rl.faults import fault
from rl.policy import eos_token_id, pad_token_id, save_model
from rl.tasks.tiny import demonstrations
from rl.types import Problem

SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|unk|>", "<|user|>", "<|assistant|>")
WORDS = ("<think>", "</think>", *"0123456789", "+", "-", "*", "=", "; ", ", ", " wait ", " so ")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% else %}<|assistant|>{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)


Demonstrations = Callable[[dict[str, float], Sequence[int], int], Iterator[tuple[Problem, str]]]


def make_tokenizer(more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A 25-token tokenizer: one token a digit or sign, one for each of ` wait `, ` so `, `; ` and `, `. It decodes to
    exactly the text it was given. The chat template opens `<think>` in the generation prompt, as R1's students do.
    `more`: further tokens, words with or without a blank before them (rl/tasks/tiny_words.py)."""
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *WORDS, *more))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    # Words that were sampled without a blank between them are still those words.
    words = "".join(f"{token}|" for token in sorted(more, key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"</?think>| wait | so |; |, |{words}."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_model(hidden: int, layers: int, heads: int, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama with tied embeddings; hidden 128 and 3 layers make 0.6 million parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=pad_token_id(tokenizer),
        eos_token_id=eos_token_id(tokenizer),
        bos_token_id=None,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=eos_token_id(tokenizer), pad_token_id=pad_token_id(tokenizer), do_sample=True, temperature=1.0
    )
    return model


def grow(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, more_tokens: Mapping[str, str]) -> None:
    """Give a model of the tiny world the tokens that it does not know, in place; each starts close to the known token
    that `more_tokens` names, so that `four` means `4` from the first step. A model that knows them all stays as it is.
    """
    known = len(_embedding(model))
    if known == len(tokenizer):
        return
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        weight, ids = _embedding(model), tokenizer.get_vocab()
        for token, like in more_tokens.items():
            index, start = ids[token], ids[like]
            if index >= known:
                weight[index] = weight[start] + 0.02 * torch.randn_like(weight[start])


def _embedding(model: PreTrainedModel) -> torch.Tensor:
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    return embedding.weight


def _batches(
    stream: Iterator[tuple[Problem, str]], tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]]:
    """(input_ids, attention_mask, labels), each (B, T), right-padded, and the loss's denominator.

    Eight batches at a time are sorted by length to save padding. The denominator is their mean number of trained
    tokens: a batch's own would give every token of a short guess ten times the weight of a token of a long check.
    """
    eos, pad = eos_token_id(tokenizer), pad_token_id(tokenizer)
    while True:
        drawn = [next(stream) for _ in range(8 * batch_size)]
        prompts = tokenizer([f"<|user|>{problem.text}<|assistant|><think>" for problem, _ in drawn])["input_ids"]
        answers = tokenizer([text for _, text in drawn])["input_ids"]
        rows = sorted(zip(prompts, answers, strict=True), key=lambda row: len(row[0]) + len(row[1]))
        denominator = sum(len(answer) + 1 for _, answer in rows) / 8
        starts = torch.randperm(8).tolist()
        for start in starts:
            chunk = rows[start * batch_size : (start + 1) * batch_size]
            width = max(len(prompt) + len(answer) + 1 for prompt, answer in chunk)
            ids = torch.full((batch_size, width), pad)
            mask = torch.zeros((batch_size, width), dtype=torch.long)
            labels = torch.full((batch_size, width), -100)
            for i, (prompt, answer) in enumerate(chunk):
                row = torch.tensor([*prompt, *answer, eos])
                ids[i, : len(row)], mask[i, : len(row)] = row, 1
                labels[i, len(prompt) : len(row)] = row[len(prompt) :]
            yield ids, mask, labels, denominator


def pretrain(
    output: Path,
    *,
    start: str | None,
    hidden: int,
    layers: int,
    heads: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    styles: dict[str, float],
    levels: tuple[int, ...],
    seed: int,
    stream: Demonstrations = demonstrations,
    more_tokens: Mapping[str, str] = MappingProxyType({}),
    report: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
) -> None:
    """Train on demonstrations and write a model folder to `output`. `start` is a model folder to fine-tune, or None.

    `stream` gives the demonstrations. `more_tokens`: tokens that the model knows beside `WORDS`, and the token that
    each starts as where `start` does not know it yet.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(tuple(more_tokens))
    if start is None:
        model = make_model(hidden, layers, heads, tokenizer, seed)
    else:
        model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
        grow(model, tokenizer, more_tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, min(100, steps // 10))
    batches = _batches(stream(styles, levels, seed), tokenizer, batch_size)
    model.train()
    for step in range(1, steps + 1):
        scale = step / warmup if step <= warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * max(scale, 0.02)
        ids, mask, labels, denominator = next(batches)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        loss = loss / denominator
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps:
            report(step, {"loss": loss.item()})
    fault("pretrain.model")
    save_model(model.eval(), tokenizer, output)
