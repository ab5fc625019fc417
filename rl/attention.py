"""Attention over packed rows: many sequences in one row of tokens, none seeing another, and no dense mask.

Linear layers, norms and the MLP of a model are functions of one token, so they run on a packed row as it is; only
attention knows where a sequence begins and ends. It is registered with transformers' public `AttentionInterface` under
the name `PACKED`; the layout reaches it as a keyword of the model's forward, so nothing is global and gradient
checkpointing may call it again. Called without a layout (sampling, evaluation) it is transformers' SDPA, unchanged.

Two backends, the same mathematics:

* Buckets (any device, any dtype): sequences of nearly equal length are gathered into (rows, heads, length, head_dim)
  and go through causal SDPA. Only attention is padded, on the right, where a causal query never looks.
* Varlen (CUDA, compute capability 8 or newer, fp16 or bf16): `torch.nn.attention.varlen`, no padding at all. It is
  written for the documented interface of torch 2.11 to 2.14 and *has not run on a GPU yet*; `rl.policy.PolicyModel`
  compares packed with plain logits before it trains, on every device, so a kernel that disagreed would be refused.

Flex attention is not used: it has no backward on CPU, and on a GPU it compiles again for new packed lengths
(unsloth-zoo#868), while varlen covers the same masks.

A prompt that several sequences share lies in the row once. Each of them reads its keys and values from there (a gather
with repeated indices, whose backward sums), so sharing changes no result.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "reason_packed"

# Of one bucket: how much of its tokens may be padding, at most.
MAX_PADDING = 0.1
# torch 2.11 has no such argument; there keys and values are repeated for grouped queries.
_VARLEN_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """Where one sequence lies in the packed row: its prompt's positions and then its completion's.

    Example: two sequences that share the prompt at 0..2: `PackedSequence(range(0, 3), range(3, 5))` and
    `PackedSequence(range(0, 3), range(5, 9))`.
    """

    prompt: range
    completion: range

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """Who sees whom in a packed row of N tokens, in the form the two backends read. Index tensors, on one device."""

    buckets: tuple[tuple[int, int], ...]  # (sequences, length) of each
    slots: torch.Tensor  # (S,): the packed positions in all buckets, one after another; padding points at position 0
    restore: torch.Tensor  # (N,): the slot that holds token n's output
    keys: torch.Tensor | None  # (K,): packed positions of all keys, run after run; None: they are 0, 1, ..., N - 1
    query_starts: torch.Tensor  # (runs + 1,) int32: the packed row cut into runs of queries of one sequence
    key_starts: torch.Tensor  # (runs + 1,) int32: the keys of each run; a run's queries are the last of its keys
    max_queries: int  # tokens of the longest run
    max_keys: int  # and of the longest sequence


def cut_buckets(lengths: Sequence[int], max_padding: float = MAX_PADDING) -> list[list[int]]:
    """Indices of sequences in buckets, each as wide as its longest and at most `max_padding` of it padding.

    Greedy from the longest on. Example: lengths 10, 9, 8, 4 at .1 give [[0, 1, 2], [3]]: the first has 3 slots of
    30 to fill up, with the 4 it would be 9 of 40.
    """
    buckets: list[list[int]] = []
    filled = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if buckets:
            slots = lengths[buckets[-1][0]] * (len(buckets[-1]) + 1)
            if slots - filled - lengths[index] <= max_padding * slots:
                buckets[-1].append(index)
                filled += lengths[index]
                continue
        buckets.append([index])
        filled = lengths[index]
    return buckets


def attention_layout(sequences: Sequence[PackedSequence], device: torch.device | str = "cpu") -> AttentionLayout:
    """The layout of sequences whose positions cover 0, 1, ..., N - 1, in order of their completions."""
    num_tokens = max(max(s.prompt.stop, s.completion.stop) for s in sequences)
    positions = [[*s.prompt, *s.completion] for s in sequences]
    lengths = [len(row) for row in positions]

    buckets: list[tuple[int, int]] = []
    slots: list[int] = []
    restore = [0] * num_tokens
    for members in cut_buckets(lengths):
        width = lengths[members[0]]
        buckets.append((len(members), width))
        for i in members:
            for slot, position in enumerate(positions[i], start=len(slots)):
                restore[position] = slot  # a shared prompt stands in several slots, with equal outputs
            slots += positions[i] + [0] * (width - lengths[i])

    runs: list[tuple[range, list[int]]] = []  # queries and the positions of their keys
    shared = sum(lengths) > num_tokens
    for s, row in zip(sequences, positions, strict=True):
        if not shared:
            runs.append((range(row[0], row[-1] + 1), row))
            continue
        if not runs or s.prompt.start >= runs[-1][0].stop:  # the first to hold this prompt
            runs.append((s.prompt, [*s.prompt]))
        if s.completion:
            runs.append((s.completion, row))

    def starts(sizes: list[int]) -> torch.Tensor:
        return torch.tensor([0, *sizes]).cumsum(0).to(device, torch.int32)

    return AttentionLayout(
        buckets=tuple(buckets),
        slots=torch.tensor(slots).to(device),
        restore=torch.tensor(restore).to(device),
        keys=torch.tensor([k for _, keys in runs for k in keys]).to(device) if shared else None,
        query_starts=starts([len(queries) for queries, _ in runs]),
        key_starts=starts([len(keys) for _, keys in runs]),
        max_queries=max(len(queries) for queries, _ in runs),
        max_keys=max(lengths),
    )


def bucket_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: AttentionLayout,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Causal attention bucket by bucket. `query` (N, heads, d), `key`, `value` (N, key heads, d) -> (N, heads, d)."""
    # One gather for all buckets: a gather a bucket would add up as many gradients of N tokens as there are buckets.
    sizes = [rows * length for rows, length in layout.buckets]
    pieces = [x.index_select(0, layout.slots).split(sizes) for x in (query, key, value)]
    outputs = []
    for shape, *qkv in zip(layout.buckets, *pieces, strict=True):
        q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in qkv)
        mask = None
        if window is not None and window < shape[1]:
            steps = torch.arange(shape[1], device=query.device)
            back = steps.unsqueeze(1) - steps
            mask = (back >= 0) & (back < window)
        output = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, layout.restore)


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: AttentionLayout,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """`bucket_attention` without padding, in half precision on CUDA. Not run on a GPU yet (see the module's docstring).

    A run's queries are the last of its keys: flash attention aligns its causal mask to the bottom right corner.
    """
    if layout.keys is not None:
        key, value = key.index_select(0, layout.keys), value.index_select(0, layout.keys)
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not _VARLEN_TAKES_GROUPS:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    grouped: dict[str, Any] = {"enable_gqa": True} if groups > 1 and _VARLEN_TAKES_GROUPS else {}
    output = varlen_attn(
        query, key, value, layout.query_starts, layout.key_starts, layout.max_queries, layout.max_keys,
        scale=scaling, window_size=(-1 if window is None else window - 1, 0), **grouped,
    )  # fmt: skip
    assert isinstance(output, torch.Tensor)
    return output


def _varlen_runs_on(query: torch.Tensor) -> bool:
    return (
        query.is_cuda
        and torch.version.cuda is not None
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    packed_layout: AttentionLayout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function transformers calls. `query` (1, heads, N, d); returns (1, N, heads, d).

    Refused by name where the result would differ from the model's own: logit soft-capping, attention sinks, position
    biases, dropout. Sliding windows are kept.
    """
    if packed_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    given = {name: kwargs.get(name) for name in ("softcap", "s_aux", "position_bias")} | {"dropout": dropout or None}
    for name, what in given.items():
        if what is not None:
            raise ValueError(
                f"{type(module).__name__} asks for {name} = {what} in attention, which packed rows do not compute; "
                "use a model without it (for dropout: model.eval(), or attention_dropout: 0 in its config)"
            )
    if torch.is_autocast_enabled(query.device.type):  # rotated in fp32, the values not
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    attention = varlen_attention if _varlen_runs_on(q) else bucket_attention
    return attention(q, k, v, packed_layout, scaling, sliding_window).unsqueeze(0), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
