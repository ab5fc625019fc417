"""A key-value cache for sampling: buffers allocated ahead, written in place, rows moved instead of copied.

transformers' `DynamicCache` concatenates the keys and values of every layer at every token, which copies the whole
cache for each token drawn. Here a layer keeps a buffer wider than what it has seen, writes the new column into it and
returns the filled part as a view. When sequences leave the batch, the last rows move into their places (`compaction`),
so the cost follows the rows that left and not those that stay.

The cache is a `DynamicCache` with other layers behind transformers' own layer interface. Only layers that attend to
all that came before are replaced: a model with a sliding window, recurrent states or an indexer keeps its own kind.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

GROWTH = 1.5  # a full buffer is replaced by one this much wider


class ColumnBuffer:
    """Rows of columns, (rows, heads, columns, size), with room for `capacity` columns before it is replaced.

    Example: capacity 4; 3 columns and then 1 fill it; one more replaces it by a buffer for 6.
    """

    def __init__(self, columns: torch.Tensor, capacity: int) -> None:
        self.width = 0
        self.buffer = self._allocate(columns, capacity)

    @property
    def filled(self) -> torch.Tensor:
        """A view of what has been written."""
        return self.buffer[:, :, : self.width]

    def append(self, columns: torch.Tensor) -> torch.Tensor:
        """Write more columns behind the filled ones; all of them as a view."""
        start, self.width = self.width, self.width + columns.shape[2]
        if self.width > self.buffer.shape[2]:
            narrow, capacity = self.buffer, max(self.width, int(GROWTH * self.buffer.shape[2]))
            self.buffer = self._allocate(narrow, capacity)
            self.buffer[:, :, :start] = narrow[:, :, :start]
        self.buffer[:, :, start : self.width] = columns
        return self.filled

    def select(self, order: torch.Tensor) -> torch.Tensor:
        """Row i becomes what row `order[i]` was. Only the rows that change places are copied; more rows than before
        (the samples of one prompt) need a new buffer."""
        if len(order) > len(self.buffer):
            columns = self.filled[order.to(self.buffer.device)]
            self.buffer = self._allocate(columns, self.buffer.shape[2])
            self.buffer[:, :, : self.width] = columns
        else:
            # Found on the device of `order`: the sampler keeps it on the CPU, so that a GPU need not be waited for.
            moved = (order != torch.arange(len(order), device=order.device)).nonzero().squeeze(-1)
            sources, targets = order[moved].to(self.buffer.device), moved.to(self.buffer.device)
            self.buffer[targets, :, : self.width] = self.buffer[sources, :, : self.width]
            self.buffer = self.buffer[: len(order)]
        return self.filled

    @staticmethod
    def _allocate(like: torch.Tensor, capacity: int) -> torch.Tensor:
        return like.new_empty(*like.shape[:2], capacity, like.shape[3])


class PreallocatedLayer(CacheLayerMixin):
    """One layer's keys and values, in a `ColumnBuffer` each."""

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity  # to begin with

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys = ColumnBuffer(key_states, self.capacity)
        self._values = ColumnBuffer(value_states, self.capacity)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self._keys.append(key_states), self._values.append(value_states)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.keys, self.values = self._keys.select(beam_idx), self._values.select(beam_idx)

    def get_seq_length(self) -> int:
        return self._keys.width if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1  # transformers' word for "no limit"


def sampling_cache(config: PreTrainedConfig, capacity: int) -> DynamicCache:
    """The cache for a model of this config: preallocated (`capacity` columns to begin with) where every layer attends
    to all that came before, else the model's own kind of `DynamicCache`."""
    cache = DynamicCache(config=config)
    if all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers[:] = [PreallocatedLayer(capacity) for _ in cache.layers]
    return cache


def compaction(alive: torch.Tensor) -> torch.Tensor:
    """The `order` of rows when those that are not `alive` (R,) leave: the last living rows fill the holes.

    Example: rows 1 and 2 of 5 have ended: [0, 4, 3], so row 0 stays and only two rows are moved.
    """
    count = int(alive.sum())
    order = torch.arange(count)
    order[~alive[:count]] = (alive[count:].nonzero().squeeze(-1) + count).flip(0)
    return order
