"""A base model made ready to be a student: the chat template, the end of a turn, padding, the context.

The six students of DeepSeek-R1 (arXiv 2501.12948, section 2.4) start from base models: their chat templates belong to
other data and drop or never open the thought, their EOS is not always the end of a turn, and Qwen2.5-Math knows 4,096
positions where the traces have up to 32,768. All of that is decided once, here, before anything is tokenised, so that
the stages which import traces, mix, train, sample and check read one folder and cannot disagree.

Weights are not touched: their files are linked where the file system allows it, else copied. Deviation: the paper says
neither its template nor how the context was made longer; the base frequency of the rotary embedding is the caller's.

Line: `reason run r1-distill-qwen-7b base`, the stage with `method: prepare`.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.faults import fault
from rl.policy import save_tokenizer
from rl.prompts import TEMPLATES
from rl.runs import write_json

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True, slots=True)
class Preparation:
    """What is changed of a base model; None leaves it as it is.

    Example: `Preparation("r1", pad_token="<|vision_pad|>", context=32_768, rope_theta=300_000.0)`
    """

    template: str | None = None  # a name of `rl.prompts.TEMPLATES`; replaces the tokenizer's own
    eos_token: str | None = None  # the string that ends a turn
    pad_token: str | None = None
    context: int | None = None  # positions, in tokens
    rope_theta: float | None = None  # base frequency of the rotary embedding


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, wanted: Preparation) -> None:
    """Change a tokenizer in place. ValueError for a token that it does not have: new rows would be untrained."""
    for role, token in (("eos_token", wanted.eos_token), ("pad_token", wanted.pad_token)):
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            raise ValueError(
                f"{role}: {token!r} is not in the vocabulary of {tokenizer.name_or_path}, and a new one would have an "
                "untrained row; name one that it has"
            )
        setattr(tokenizer, role, token)
    if wanted.template is not None:
        tokenizer.chat_template = TEMPLATES[wanted.template]


def prepare_config(config: PretrainedConfig, wanted: Preparation, eos: int | None, pad: int | None) -> None:
    """Change a config in place: positions, base frequency, and the ids that the tokenizer has.

    Errors: ValueError for fewer positions than the model has, and for a base frequency where the rotary embedding is
    scaled already, since both together were never meant.
    """
    text: Any = config.get_text_config()
    if wanted.context is not None:
        if wanted.context < text.max_position_embeddings:
            raise ValueError(
                f"context: {wanted.context} is less than the {text.max_position_embeddings} positions that the model "
                "has; remove the key"
            )
        text.max_position_embeddings = wanted.context
    if wanted.rope_theta is not None:
        rope = dict(text.rope_parameters)
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"rope_theta: the model scales its rotary embedding ({rope['rope_type']}); remove the key")
        text.rope_parameters = rope | {"rope_theta": wanted.rope_theta}
    for each in {id(config): config, id(text): text}.values():
        each.eos_token_id, each.pad_token_id = eos, pad


def prepare_generation(generation: GenerationConfig, eos: int | None, pad: int | None) -> None:
    """A generation config that stops where the tokenizer's turn ends, and nowhere else; no sampling defaults of its
    own, which engines would take over unasked."""
    generation.eos_token_id, generation.pad_token_id = eos, pad
    generation.do_sample, generation.temperature, generation.top_p, generation.top_k = None, None, None, None
    generation.repetition_penalty = None


def prepare_student(start: str | Path, folder: Path, wanted: Preparation) -> dict[str, Any]:
    """Write `folder`, a model folder with the weights of `start` and what is wanted of the rest; returns a summary.

    `start` is a folder or a hub id. Errors: ValueError for weights that are not safetensors, and as above.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    source = Path(start) if Path(start).is_dir() else _download(str(start))
    weights = sorted(path for pattern in WEIGHTS for path in source.glob(pattern))
    if not any(path.suffix == ".safetensors" for path in weights):
        raise ValueError(f"{start} has no safetensors weights: convert them (`save_pretrained` of transformers)")
    tokenizer = AutoTokenizer.from_pretrained(str(source))
    config = AutoConfig.from_pretrained(str(source))
    before = config.get_text_config().max_position_embeddings
    try:
        generation = GenerationConfig.from_pretrained(str(source))
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    prepare_tokenizer(tokenizer, wanted)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    prepare_config(config, wanted, eos, pad)
    prepare_generation(generation, eos, pad)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in weights:
        _link(path.resolve(), folder / path.name)  # the hub's cache holds links
    fault("student.weights")
    config.save_pretrained(folder)
    generation.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    summary = {
        "start": str(start),
        "template": wanted.template,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "positions_before": before,
        "positions": config.get_text_config().max_position_embeddings,
        "rope_theta": wanted.rope_theta,
        "weight_files": len(weights),
    }
    write_json(folder.parent / "summary.json", summary, "student.summary")
    return summary


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.json", *WEIGHTS, "*.model", "*.txt", "*.jinja"]))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
