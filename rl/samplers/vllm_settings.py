"""Which of vLLM's settings a user may give. Standard library only, so that a recipe is checked without vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# The distribution and the bookkeeping are the sampler's to set; everything else of an engine or a request is open.
OURS_IN_AN_ENGINE = frozenset(("model", "tokenizer", "logprobs_mode", "skip_tokenizer_init", "trust_remote_code"))
OURS_IN_A_REQUEST = frozenset(
    ("n", "temperature", "top_p", "max_tokens", "seed", "logprobs", "flat_logprobs", "prompt_logprobs", "detokenize")
) | {"stop_token_ids", "output_kind", "repetition_detection"}


def closed_settings(engine: Mapping[str, Any], request: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with it) of settings that the sampler sets itself.

    Example: `closed_settings({}, {"seed": 1, "min_p": 0.1})` yields `("request.seed", "...")` alone.
    """
    for what, given, ours in (("engine", engine, OURS_IN_AN_ENGINE), ("request", request, OURS_IN_A_REQUEST)):
        for key in sorted(ours & given.keys()):
            yield f"{what}.{key}", "is set by the sampler itself (see sampling.temperature, .max_tokens, …); remove it"


def refuse_settings(engine: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    """ValueError for the first of `closed_settings`."""
    for key, message in closed_settings(engine, request):
        raise ValueError(f"vllm.{key} {message}")
