"""What SFT and DPO share around TRL's trainers: order of rows, arguments, checkpoints, metrics, resume.

Where TRL 1.16 and transformers 5.19 would decide silently, this module decides:

* rows come in our order (a seeded permutation an epoch, laid end to end), read in sequence: batches cross the border of
  an epoch instead of leaving a small last one in each, and a resumed run sees the same batches;
* no truncation, and no packing by TRL; bf16 and gradient checkpointing, unless asked for, on a GPU only (TRL switches
  both on everywhere);
* a loss or gradient that is not finite stops the run before the optimizer's step (transformers puts the average of
  earlier losses into the log in its place, and steps);
* checkpoints get a manifest and a rename, and only an intact one is resumed (transformers takes the highest number);
  pickled arguments are left out of them;
* no telemetry, no model cards, no dictionaries printed to the terminal;
* of several processes (rl/ranks.py) the first writes. A stage that one process runs alone is refused under a launcher:
  accelerate would read the launcher's variables and wait for the others. A checkpoint says nothing of how many there
  were. Sharding is accelerate's FSDP2 plugin, and refused on a CPU, where accelerate replicates without a word. On more
  than one GPU nothing here has run yet.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback

from distill.guards import Overflow
from rl.policy import save_model
from rl.ranks import ALONE, Ranks
from rl.runs import append_line, latest_checkpoint, read_lines, rewind_lines, save_checkpoint, write_json
from rl.samplers.base import sample_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Report = Callable[[int, int, Mapping[str, float]], None]  # (step, total steps, metrics of the step)

METRICS = "metrics.jsonl"
SCRATCH = ".trainer"  # where transformers writes before a checkpoint is committed; hidden, so never part of a manifest
CALL = "call.json"  # in a checkpoint: what it is a checkpoint of


@dataclass(frozen=True, slots=True)
class Schedule:
    """What every training on rows is told. `save_every` is in steps, 0 for none; `suffix` is the prompt's.

    Errors: ValueError, naming the key, for what would train on nothing or backwards.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    max_length: int
    seed: int
    suffix: str = ""
    overflow: Overflow = "refuse"
    warmup_ratio: float = 0.03
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.0
    save_every: int = 100

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "weight_decay", "save_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("warmup_ratio", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

    def numbers(self) -> dict[str, Any]:
        """Those that say what is learnt from given rows in a given order."""
        names = ("epochs", "learning_rate", "batch_size", "max_length", "warmup_ratio", "min_lr_ratio", "weight_decay")
        return {name: getattr(self, name) for name in (*names, "save_every")}


def row_order(num_rows: int, epochs: int, seed: int) -> list[int]:
    """Row indices for all epochs, each a permutation by (`seed`, epoch): `len(row_order(10, 3, 0)) == 30`."""
    order: list[int] = []
    for epoch in range(epochs):
        indices = list(range(num_rows))
        random.Random(sample_seed(seed, "epoch", epoch)).shuffle(indices)
        order += indices
    return order


def load_for_training(name: str | Path, max_length: int) -> PreTrainedModel:
    """The model with fp32 weights: AdamW's small steps would be lost in bf16 ones. Autocast does the rest on a GPU."""
    model = AutoModelForCausalLM.from_pretrained(str(name), dtype=torch.float32)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ValueError(f"max_length = {max_length} is more than the {positions} positions that {name} has")
    return model


def trainer_arguments(
    folder: Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    warmup_ratio: float,
    min_lr_ratio: float,
    weight_decay: float,
    save_every: int,
    seed: int,
    bf16: bool | None = None,
    gradient_checkpointing: bool | None = None,
    shard: bool = False,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """The arguments that SFTConfig and DPOConfig share. The learning rate rises to its value over `warmup_ratio` of the
    steps, then falls along a cosine to `min_lr_ratio` of it, which the last step has.

    `bf16` and `gradient_checkpointing`: None is on a GPU only. `shard` has no effect on a single process.

    Errors: ValueError for a stage of one process under a launcher of several, and for `shard` without a GPU.
    """
    on_gpu = torch.cuda.is_available()
    _check_processes(ranks, shard, on_gpu)
    checkpointing = on_gpu if gradient_checkpointing is None else gradient_checkpointing
    sharded = shard and ranks.world > 1
    return {
        "output_dir": str(folder / SCRATCH),
        "num_train_epochs": 1,  # the epochs are laid end to end by row_order
        "per_device_train_batch_size": batch_size,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": on_gpu,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine_warmup_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": min_lr_ratio},
        "warmup_steps": math.ceil(warmup_ratio * steps),
        "weight_decay": weight_decay,
        "max_grad_norm": 1.0,
        "max_length": None,  # TRL cuts at 1024 by default; our rows are already within the limit
        "bf16": on_gpu if bf16 is None else bf16,
        "gradient_checkpointing": checkpointing and not sharded,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointing and not sharded else None,
        **(sharding_arguments(checkpointing) if sharded else {}),
        "ddp_find_unused_parameters": False,
        "use_cpu": not on_gpu,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if save_every else "no",
        "save_steps": save_every or 1,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
    }


def sharding_arguments(checkpointing: bool) -> dict[str, Any]:
    """FSDP2 by decoder layer, checkpoints with whole tensors, so that any number of processes goes on from them.

    Activation checkpointing is FSDP's own here: it must go around the layer inside its sharding.
    """
    config = {"version": 2, "state_dict_type": "FULL_STATE_DICT", "activation_checkpointing": checkpointing}
    return {"fsdp": True, "fsdp_config": config}


def _check_processes(ranks: Ranks, shard: bool, on_gpu: bool) -> None:
    distributed = torch.distributed
    world = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if world != ranks.world:
        raise ValueError(
            f"this stage trains on {ranks.world} process, but a launcher started {world}: run the recipe up to this "
            "stage without a launcher, then launch the rest"
        )
    if shard and ranks.world > 1 and not on_gpu:
        raise ValueError("shard: true needs GPUs in this stage (on a CPU accelerate only replicates): set shard: false")


class TrainerGuards(Trainer):
    """Mixed in before TRL's trainer: what it does unasked and we do not want."""

    def _send_telemetry(self) -> None:
        """TRL pings the hub from every constructor."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL writes one into every checkpoint."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss).all():
            raise FloatingPointError(
                f"the loss of step {self.state.global_step + 1} is {loss.item()}: stopped before it"
            )
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(float(norm)):
            raise FloatingPointError(
                f"the gradient norm of step {self.state.global_step + 1} is {float(norm)}: stopped before it"
            )
        return norm


class StageCallback(TrainerCallback):
    """Writes metrics.jsonl, commits checkpoints, reports progress."""

    def __init__(
        self,
        folder: Path,
        tokens: Sequence[int],
        call: str,
        at_checkpoint: Callable[[], None],
        report: Report,
        ranks: Ranks = ALONE,
    ) -> None:
        self.folder = folder
        self.tokens = tokens  # trained so far, after each step
        self.call = call
        self.at_checkpoint = at_checkpoint
        self.report = report
        self.ranks = ranks

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:  # the last log of a run is about its time
            return
        step = state.global_step
        # TRL's own count starts again at 0 in a resumed run.
        left_out = ("learning_rate", "num_tokens", "epoch", "total_flos", "step")
        others = {name: float(value) for name, value in logs.items() if name not in left_out}
        metrics = others | {"lr": float(logs["learning_rate"]), "tokens": self.tokens[step - 1]}
        if self.ranks.first:
            append_line(self.folder / METRICS, {"step": step} | metrics)
        self.report(step, len(self.tokens), metrics)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ranks.wait()  # each wrote the state of its random numbers
        if not self.ranks.first:
            return
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (written / "training_args.bin").unlink()  # a pickle, and nothing reads it back
        (written / CALL).write_text(self.call, encoding="utf-8")
        self.at_checkpoint()

        def move(target: Path) -> None:
            for path in written.iterdir():
                path.rename(target / path.name)

        save_checkpoint(self.folder, state.global_step, move)
        written.rmdir()


def tokens_after_steps(lengths: Sequence[int], order: Sequence[int], batch_size: int) -> list[int]:
    """Tokens trained after each step: lengths [5, 7, 9], order [2, 0, 1], batches of 2 -> [14, 21]."""
    running = list(accumulate(lengths[i] for i in order))
    return [running[min(end, len(order)) - 1] for end in range(batch_size, len(order) + batch_size, batch_size)]


def fingerprint(*parts: object) -> str:
    """What a training run is a function of, so that a checkpoint is only resumed by the call that made it."""
    return sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


def clear_scratch(folder: Path) -> None:
    """Remove what a killed run left of an uncommitted checkpoint or model."""
    for name in (SCRATCH, ".model.partial"):
        shutil.rmtree(folder / name, ignore_errors=True)


def run_trainer(trainer: Trainer, folder: Path, call: str, ranks: Ranks = ALONE) -> int:
    """Train, from the last intact checkpoint if there is one; returns the step it went on from, 0 for a fresh run."""
    trainer.remove_callback(PrinterCallback)
    found = latest_checkpoint(folder) if ranks.first else None
    step, checkpoint = ranks.from_first((0, None) if found is None else (found[0], str(found[1])))
    if checkpoint is not None and (Path(checkpoint) / CALL).read_text(encoding="utf-8") != call:
        raise ValueError(f"{checkpoint} belongs to a run with other rows or settings: remove it, or use another folder")
    if ranks.first:
        rewind_lines(folder / METRICS, step)
    trainer.train(resume_from_checkpoint=checkpoint)
    ranks.wait()
    if ranks.first:
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    return step


def write_result(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    start: str | Path,
    folder: Path,
    summary: Mapping[str, Any],
    at_model: Callable[[], None],
    site: str,
) -> None:
    """Write `folder/model` in the dtype of the start model, whole or not at all, and `folder/summary.json`."""
    config = AutoConfig.from_pretrained(str(start))
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    model = model.to(dtype).eval()  # pyright: ignore[reportArgumentType]
    model.config.use_cache = config.use_cache  # transformers' Trainer turns it off, and every later rollout would crawl
    partial = folder / ".model.partial"
    save_model(model, tokenizer, partial)
    at_model()
    shutil.rmtree(folder / "model", ignore_errors=True)
    partial.rename(folder / "model")
    write_json(folder / "summary.json", dict(summary), site)


def last_losses(folder: Path) -> dict[str, float]:
    """The losses of the first and the last step, from the metrics."""
    rows = read_lines(folder / METRICS)
    return {"first_loss": rows[0]["loss"], "last_loss": rows[-1]["loss"]}
