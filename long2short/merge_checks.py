"""What two models must have in common before their weights may be merged.

Weights can be averaged only where they mean the same: the same tensors, the same architecture (sizes, rope, positions,
tied heads), a vocabulary that agrees id by id, the same special tokens. A refusal names the first thing that differs.
Nothing is written before these checks have passed.

Line: `reason long2short RECIPE`, the stage with `method: merge`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from distill.preflight_subjects import EMBEDDING, HEAD
from long2short.merge_files import ModelFolder

# Keys of a config, and of a config in it, that may differ: they do not change what a weight means.
FREE_KEYS = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "attention_dropout",
    "initializer_range",
    "bos_token_id",  # ids of special tokens are compared in the tokenizers
    "eos_token_id",
    "pad_token_id",
}
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def check_relatives(one: ModelFolder, other: ModelFolder, *, special_tokens: bool = True) -> None:
    """Refuse models whose weights do not mean the same: ValueError that names the first key, tensor or token id.

    `special_tokens=False` for the base that deltas are taken from: it is never prompted, so it may end its texts with
    another token.
    """
    _check_configs(one.path, other.path)
    _check_vocabularies(one.path, other.path, SPECIAL_TOKENS if special_tokens else ())
    for here, there in ((one, other), (other, one)):
        lone = here.tensors.keys() - there.tensors.keys()
        if lone:
            more = f" and {len(lone) - 1} more" if len(lone) > 1 else ""
            raise ValueError(f"tensor {min(lone)}{more} of {here.path} is not in {there.path}: they cannot be merged")
    for name, info in one.tensors.items():
        if info.shape != other.tensors[name].shape:
            raise ValueError(
                f"tensor {name} has shape {info.shape} in {one.path} and {other.tensors[name].shape} in {other.path}"
            )


def _check_configs(one: Path, other: Path) -> None:
    configs = (AutoConfig.from_pretrained(str(folder)) for folder in (one, other))
    if unlike := unlike_configs(*configs, names=(str(one), str(other))):
        raise ValueError(unlike)


def unlike_configs(one: PreTrainedConfig, other: PreTrainedConfig, names: tuple[str, str]) -> str | None:
    """The first key in which two configs differ so that weights trained under one do not fit the other; None: none.

    Example: "config key rope_theta is 10000.0 in ./long and 1000000.0 in ./short: weights trained under one ...".
    """
    ours, theirs = _bound_keys(one.to_dict()), _bound_keys(other.to_dict())
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            return (
                f"config key {key} is {ours.get(key)!r} in {names[0]} and {theirs.get(key)!r} in {names[1]}: weights "
                "trained under one do not fit the other"
            )
    return None


def _bound_keys(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The keys that decide what a weight means; those of a config in the config as `text_config.hidden_size`."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, Mapping):
            found |= _bound_keys(value, f"{path}{key}.")
        elif key not in FREE_KEYS:
            found[f"{path}{key}"] = value
    return found


def tied_tensors(folder: ModelFolder) -> dict[str, str]:
    """Output layer -> input embedding of a folder whose config ties them and which stores both all the same; else {}.

    transformers ties such two as long as their values are equal, so a merge has to do the same to both. Example:
    `{"lm_head.weight": "model.embed_tokens.weight"}`.
    """
    head, embedding = _find(folder, HEAD), _find(folder, EMBEDDING)
    if head is None or embedding is None or not AutoConfig.from_pretrained(str(folder.path)).tie_word_embeddings:
        return {}
    return {head: embedding}


def _find(folder: ModelFolder, endings: Sequence[str]) -> str | None:
    return next((name for end in endings for name in folder.tensors if f".{name}".endswith(f".{end}")), None)


def _check_vocabularies(one: Path, other: Path, special_tokens: tuple[str, ...]) -> None:
    ours, theirs = (AutoTokenizer.from_pretrained(str(folder)) for folder in (one, other))
    for tokenizer in (ours, theirs):
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # as rl.policy.load_tokenizer reads it
    our_ids, their_ids = ({i: token for token, i in t.get_vocab().items()} for t in (ours, theirs))
    for index in sorted(our_ids.keys() | their_ids.keys()):
        if our_ids.get(index) != their_ids.get(index):
            raise ValueError(
                f"token id {index} is {our_ids.get(index)!r} in {one} and {their_ids.get(index)!r} in {other}: their "
                "embeddings stand for different words"
            )
    for key in special_tokens:
        if getattr(ours, key) != getattr(theirs, key):
            raise ValueError(f"{key} is {getattr(ours, key)} in {one} and {getattr(theirs, key)} in {other}")
