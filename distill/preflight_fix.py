"""`reason preflight --fix`: a copy of a model folder in which what can be safely put right is put right.

Nothing is edited in place. What is safe: the EOS that the template writes, a pad token of its own, a generation config
that agrees, embeddings with a row for every token, rows of zeros started from the mean of the others, a config that
says what is stored, and a template that keeps the thought. What is not (limits, data, longer contexts without YaRN,
another tokenizer) is left to the reader.

    done = write_fixed(Path("models/base"), Path("fixed/base"), defects)      # ("eos_token is <|im_end|>", ...)

Line: `reason preflight RECIPE --fix`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from distill.preflight_model import DTYPES, UNTRAINED, yarn_reach
from distill.preflight_subjects import EMBEDDING, HEAD, INDEX, Defect, Stored, problem, read_stored
from distill.preflight_tokens import as_ids, turn_end
from rl.faults import fault
from rl.prompts import THINK_OPEN, render_text

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

PADS = ("<|pad|>", "<|endoftext|>", "<|finetune_right_pad_id|>", "<pad>", "[PAD]")  # taken where they are known


@dataclass(slots=True)
class Draft:
    """A model on its way to the new folder."""

    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    generation: GenerationConfig | None
    stored: Stored | None
    rows: int | None = None  # that the embedding shall have; None: as it is
    fill: bool = False  # start rows of zeros from the mean
    done: list[str] = field(default_factory=list)


def write_fixed(model: Path, out: Path, defects: Sequence[Defect]) -> tuple[str, ...]:
    """Copy `model` to `out` with the safe fixes of `defects`; what was done, () (and no folder) where none is safe.

    Errors: ValueError if `out` exists.
    """
    checks = dict.fromkeys(defect.check for defect in defects)
    fixes = [FIXES[check] for check in FIXES if check in checks]
    if not fixes:
        return ()
    if out.exists():
        raise ValueError(f"{out} exists; name a folder that does not (--out)")
    draft = open_draft(model)
    for fix in dict.fromkeys(fixes):
        fix(draft)
    if not draft.done:
        return ()
    _align_generation(draft)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(model, partial)
    _save(draft, model, partial)
    partial.rename(out)
    return tuple(draft.done)


def open_draft(model: Path) -> Draft:
    """A model folder as it is, without its weights."""
    from transformers import AutoConfig, AutoTokenizer

    return Draft(
        AutoTokenizer.from_pretrained(str(model)),
        AutoConfig.from_pretrained(str(model)),
        read_generation(model),
        read_stored(model),
    )


def read_generation(model: str | Path) -> GenerationConfig | None:
    """A model's generation config; None where it has none."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(str(model))
    except OSError:
        return None


# --- the fixes --------------------------------------------------------------------------------------------------------


def set_eos(draft: Draft) -> None:
    """EOS is what the template writes after an answer, if that is a token."""
    end = turn_end(draft.tokenizer)
    if end in draft.tokenizer.get_vocab() and end != draft.tokenizer.eos_token:
        draft.tokenizer.eos_token = end
        draft.config.eos_token_id = draft.tokenizer.eos_token_id  # pyright: ignore[reportAttributeAccessIssue]
        draft.done.append(f"eos_token is {end}")


def set_pad(draft: Draft) -> None:
    """A pad token that no text ends with: one that the tokenizer knows, else a new one with a row of its own."""
    tokenizer = draft.tokenizer
    taken = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
    known = [pad for pad in PADS if pad in tokenizer.get_vocab() and pad not in taken]
    tokenizer.pad_token = known[0] if known else PADS[0]
    if not known:
        tokenizer.add_special_tokens({"pad_token": PADS[0]})
        add_rows(draft)
    draft.config.pad_token_id = tokenizer.pad_token_id  # pyright: ignore[reportAttributeAccessIssue]
    draft.done.append(f"pad_token is {tokenizer.pad_token}")


def add_rows(draft: Draft) -> None:
    """A row of the embedding for every token; new rows start from the mean of the others."""
    wanted = max(draft.tokenizer.get_vocab().values()) + 1
    have = _stored_rows(draft)
    if have is None or wanted > have:
        draft.rows = wanted
        draft.done.append(f"the embedding has {wanted} rows")


def agree_on_rows(draft: Draft) -> None:
    """The config says how many rows are stored."""
    have = _stored_rows(draft)
    if have is not None:
        draft.config.get_text_config().vocab_size = have
        draft.done.append(f"vocab_size is {have}")


def fill_rows(draft: Draft) -> None:
    """Rows of zeros start from the mean of the others."""
    draft.fill = True
    draft.done.append("rows of zeros start from the mean of the others")


def tie_head(draft: Draft) -> None:
    """A model without an output layer of its own shares the embedding."""
    draft.config.tie_word_embeddings = True  # pyright: ignore[reportAttributeAccessIssue]
    draft.done.append("tie_word_embeddings is true")


def untie_head(draft: Draft) -> None:
    """A stored output layer of its own is used, where it fits."""
    stored = draft.stored
    inputs, head = (stored.find(EMBEDDING), stored.find(HEAD)) if stored is not None else (None, None)
    if stored is not None and inputs is not None and head is not None and stored.shapes[inputs] == stored.shapes[head]:
        draft.config.tie_word_embeddings = False  # pyright: ignore[reportAttributeAccessIssue]
        draft.done.append("tie_word_embeddings is false")


def set_dtype(draft: Draft) -> None:
    """The config's dtype is the stored one; bf16 instead of fp16."""
    import torch

    kept = draft.stored.find(EMBEDDING) if draft.stored is not None else None
    stored = "bfloat16" if draft.stored is None or kept is None else DTYPES.get(draft.stored.dtypes[kept], "bfloat16")
    name = "bfloat16" if stored == "float16" else stored
    draft.config.dtype = getattr(torch, name)
    draft.done.append(f"dtype is {name}")


def set_positions(draft: Draft) -> None:
    """As many positions as YaRN reaches."""
    config: Any = draft.config.get_text_config()
    reach = yarn_reach(config)
    if reach is not None and reach != config.max_position_embeddings:
        config.max_position_embeddings = reach
        draft.done.append(f"max_position_embeddings is {reach}, as far as YaRN reaches")


def keep_thought(draft: Draft) -> None:
    """The template writes the last answer as it is: it renders the question as ever, then the answer and EOS."""
    tokenizer = draft.tokenizer
    old = tokenizer.chat_template
    if isinstance(old, str):
        tokenizer.chat_template = keeping(old, prefill_of(tokenizer))
        draft.done.append("the chat template keeps the last answer as it is")


def keeping(template: str, prefill: str) -> str:
    """A chat template around `template` that leaves a last assistant's message alone.

    What is before it goes through `template` with its generation prompt; `prefill` is what that opens ("<think>\\n"),
    and is not written twice.
    """
    text = json.dumps(prefill)
    return (
        "{% set last = messages[-1] %}"
        "{% if last.role == 'assistant' %}{% set messages = messages[:-1] %}{% set add_generation_prompt = true %}"
        "{% endif %}" + template.removesuffix("\n") + "{% if last.role == 'assistant' %}"
        f"{{% if last.content.startswith({text}) %}}{{{{ last.content[{len(prefill)}:] }}}}"
        "{% else %}{{ last.content }}{% endif %}{{ eos_token }}{% endif %}"
    )


def prefill_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """What of the answer the generation prompt has written: "<think>\\n", or ""."""
    prompt = render_text(tokenizer, problem("probe", "a"))
    stem = prompt.rstrip()
    return prompt[len(stem) - len(THINK_OPEN) :] if stem.endswith(THINK_OPEN) else ""


def align_generation(draft: Draft) -> None:
    """The generation config stops at the tokenizer's EOS (its other ids stay) and pads with its pad."""
    draft.done.append("the generation config agrees with the tokenizer")


FIXES: Mapping[str, Callable[[Draft], None]] = MappingProxyType(
    {
        "no-eos": set_eos,
        "turn-end-is-not-eos": set_eos,
        "pad-is-unk": set_pad,
        "pad-is-eos": set_pad,
        "thought-dropped": keep_thought,
        "template-rewrites": keep_thought,
        "generation-eos": align_generation,
        "generation-pad": align_generation,
        "turn-end-is-no-stop": align_generation,
        "embedding-rows": agree_on_rows,
        "tokenizer-over-embedding": add_rows,
        "untrained-rows": fill_rows,
        "head-missing": tie_head,
        "tied-head-differs": untie_head,
        "dtype-float16": set_dtype,
        "dtype-differs": set_dtype,
        "positions": set_positions,
    }
)


def _align_generation(draft: Draft) -> None:
    generation, tokenizer = draft.generation, draft.tokenizer
    eos = tokenizer.eos_token_id
    if generation is None or not isinstance(eos, int):
        return
    known = as_ids(generation.eos_token_id)
    turn = tokenizer.get_vocab().get(turn_end(tokenizer), eos)
    stops = list(dict.fromkeys([eos, *known, turn]))
    if stops != known:
        generation.eos_token_id = stops if len(stops) > 1 else eos
    generation.pad_token_id = generation.pad_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _stored_rows(draft: Draft) -> int | None:
    name = draft.stored.find(EMBEDDING) if draft.stored is not None else None
    return None if draft.stored is None or name is None else draft.stored.shapes[name][0]


# --- writing ----------------------------------------------------------------------------------------------------------


def _save(draft: Draft, model: Path, folder: Path) -> None:
    """Write what the draft holds over the copy in `folder`."""
    fault("preflight.model")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    draft.tokenizer.save_pretrained(folder)
    draft.config.save_pretrained(folder)
    if draft.generation is not None:
        draft.generation.save_pretrained(folder)
    if draft.rows is not None or draft.fill:
        _rewrite_weights(draft, model, folder)


def _rewrite_weights(draft: Draft, model: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    stored = _stored_rows(draft)
    if stored is not None:
        draft.config.get_text_config().vocab_size = stored  # what is read; the new number comes with resizing
    pad, draft.config.pad_token_id = draft.config.pad_token_id, None  # it may be a row that is still to come
    loaded = AutoModelForCausalLM.from_pretrained(str(model), config=draft.config)
    with torch.no_grad():
        if draft.rows is not None and stored is not None and draft.rows > stored:
            loaded.resize_token_embeddings(draft.rows, mean_resizing=False)
            for weight in _matrices(loaded):
                weight[stored:] = weight[:stored].mean(0)
        if draft.fill:
            for weight in _matrices(loaded):
                empty = weight.abs().amax(1) < UNTRAINED
                weight[empty] = weight[~empty].mean(0)
    loaded.config.pad_token_id = pad
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink(missing_ok=True)
    fault("preflight.weights")
    loaded.save_pretrained(folder)
    if draft.generation is not None:
        draft.generation.save_pretrained(folder)


def _matrices(model: Any) -> list[torch.Tensor]:
    """The embedding, and the output layer where it is not the same."""
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings()
    return [inputs] if outputs is None or outputs.weight is inputs else [inputs, outputs.weight]
