"""Which process this is, of how many, and what the processes tell each other. Imports torch only where it talks.

Every process (rank) runs the same loop on the same seeds, with its share of the rollouts and micro-batches. What all
must agree on is exchanged, so that every rank draws the same problems, computes the same advantages and denominators
and logs the same figures. Messages are JSON, never pickled objects: floats survive exactly, NaN and infinities too.
They go over a gloo group of their own, on CPU, so that a rank may wait for days without an NCCL timeout and without
keeping a GPU busy.

`start` joins the processes that `torchrun` or `accelerate launch` started; README has the lines. The tests run two
processes on CPU; on more than one GPU nothing here has run yet.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    import torch.distributed as dist

T = TypeVar("T")

# Tensors are exchanged only when every rank has something to exchange; an hour covers the slowest rank's rollouts.
TENSOR_TIMEOUT = timedelta(hours=1)
# Messages are waited for while rank 0 runs a stage of a recipe alone. A rank that dies is noticed at once.
MESSAGE_TIMEOUT = timedelta(days=30)


class AnotherRankFailed(RuntimeError):
    """This process ends because another one failed first, which says why."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among `world` processes; made by `start`. `ALONE` is the only one there is.

    Used as a context manager it leaves the process group when the block is done. Every method but `share` and
    `first_to_fail` is collective: all ranks must call it, in the same order.
    """

    rank: int
    world: int
    group: dist.ProcessGroup | None = field(default=None, repr=False)  # for messages, gloo

    @property
    def first(self) -> bool:
        """Whether this is the one rank that writes files and reports."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part: every `world`-th item, so that neighbours (samples of one problem) are spread.

        Example: rank 1 of 2 gets (b, d) of (a, b, c, d, e).
        """
        return items[self.rank :: self.world]

    def unshare(self, values: Sequence[Any]) -> list[Any]:
        """What was computed from the shares, in the order before `share`: a list of the whole on every rank."""
        parts = self._exchange(list(values))
        found: list[Any] = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            found[rank :: self.world] = part
        return found

    def gather(self, values: Sequence[Any]) -> list[Any]:
        """The values of all ranks in one list, rank by rank."""
        return [value for own in self._exchange(list(values)) for value in own]

    def merge(self, values: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
        """Results of which each rank has some and () for the others: all of them, on every rank."""
        parts = self._exchange([list(value) for value in values])
        return [tuple(next((own for own in row if own), ())) for row in zip(*parts, strict=True)]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Elementwise sums over the ranks, in rank order, in double precision."""
        return [sum(column) for column in zip(*self._exchange(list(values)), strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank."""
        return any(self._exchange(flag))

    def names(self, values: Iterable[str]) -> list[str]:
        """The names that occur on any rank, sorted."""
        return sorted(set(self.gather(sorted(values))))

    def from_first(self, value: Any = None) -> Any:
        """What rank 0 passes; the others' argument does not matter."""
        return self._exchange(value if self.first else None)[0]

    def wait(self) -> None:
        """Until every rank is here."""
        self._exchange(None)

    def first_to_fail(self) -> bool:
        """Whether no other rank has called this before: of the ranks that fail, the one whose error is the cause.

        The others fail because they wait for one that is gone. Not collective.
        """
        if self.group is None:
            return True
        try:
            return self.group.get_group_store().add("failed", 1) == 1
        except RuntimeError:  # the store went down with the rank that held it
            return False

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Leave the group. After an error it is not left, since taking leave of a rank that hangs would hang too: end
        such a process by `end_process`."""
        if self.group is None or error is not None:
            return
        import torch.distributed as dist

        self.wait()  # rank 0 may hold the store that the others still need
        dist.destroy_process_group()

    def _exchange(self, value: Any) -> list[Any]:
        """`value` of every rank, by rank."""
        if self.group is None:
            return [value]
        import torch
        import torch.distributed as dist

        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(own)]), group=self.group)
        longest = int(max(int(size) for size in sizes))
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world)]
        dist.all_gather(parts, torch.nn.functional.pad(own, (0, longest - len(own))), group=self.group)
        return [json.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]


ALONE = Ranks(0, 1)


def end_process(code: int) -> NoReturn:
    """Exit with `code`; at once where a process group was abandoned after an error.

    The threads of such a group still run when the interpreter takes its objects down, and now and then that ends in
    C++'s `terminate` (SIGABRT, in place of the exit code). Everything worth keeping has been written by then.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def start() -> Ranks:
    """Join the processes that a launcher started; `ALONE` without one.

    Under `torchrun` or `accelerate launch` (they set WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT) the
    group is made by accelerate's `PartialState`: NCCL and one GPU a process, or gloo on CPU. On CPU use torchrun:
    `accelerate launch --cpu` starts a single process whatever it is told.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "LOCAL_RANK" not in os.environ:  # some clusters set WORLD_SIZE for every job
        return ALONE
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    # Unless it is told to use the CPU, accelerate takes several processes without a GPU for single ones.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=TENSOR_TIMEOUT)
    if state.num_processes != world:
        raise RuntimeError(
            f"the launcher started {world} processes, accelerate joined {state.num_processes}; launch with torchrun or "
            "accelerate launch without a DeepSpeed, TPU or SageMaker configuration"
        )
    group = dist.new_group(backend="gloo", timeout=MESSAGE_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)  # every rank is in it
    return Ranks(state.process_index, world, group)
