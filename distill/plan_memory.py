"""Peak memory of a training step and of sampling, from dimensions and settings alone.

Counted as our trainers really hold it (distill/training.py, rl/policy.py, rl/learner.py): fp32 weights, gradients and
AdamW's two moments; tensors that autograd saves, layer by layer; the output layer in tiles; keys and values of a
rollout. The peak is the largest of three moments of a step from the second on (moments exist, gradients do not):

* head:   all activations, and the tiles of the output layer with its gradient;
* layers: the backward pass enters the last layer: all activations, its passing gradients, the head's gradient;
* end:    all gradients, and the embedding's own before it is added to the output layer's.

Bytes a token that one layer saves, H hidden, Q and K widths of queries and keys, I of the MLP, read off transformers
5.19's modules: two norms with their inputs and outputs, queries, keys, values and output of SDPA, four tensors of the
MLP. In fp32 24 H + 8 Q + 8 K + 16 I; under bf16 autocast 26 H + 4 Q + 4 K + 8 I, since the residual stream stays fp32
and every linear layer saves its own bf16 copy of its input; 20 H where FSDP2 makes the stream bf16.

Checked against measured peaks on CPU: benchmarks/plan_accuracy.py. The figures for GPUs follow from the same counting
and have not been measured: bf16 copies of weights that autocast keeps until a forward pass ends are counted, the
allocator's fragmentation is in `Device.usable`.

Line: `reason plan RECIPE`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from distill.plan_models import ModelShape

FP32, BF16 = 4, 2
TRL_TOKENS, TRL_VOCAB = 4096, 32_768  # TRL 1.16's fused output layer: a tile of so many tokens × tokens of vocabulary
TRL_COPIES = 8.25  # of a tile at once where there is no Triton: seven of its figures, two bytes masks, the product
CHUNK = 1024  # rl/logprobs.py
CHUNK_COPIES = 2  # logits and their exponentials

# (shape, tokens, bf16) -> bytes that the output layer has at once, without the gradient of its weight
HeadBytes = Callable[[ModelShape, int, bool], int]


def trl_head_cpu(shape: ModelShape, tokens: int, bf16: bool) -> int:
    """TRL's output layer in torch operations: tiles, the hidden states' copy and their gradient, both fp32."""
    tile = min(tokens, TRL_TOKENS) * min(shape.vocab, TRL_VOCAB)
    return int(TRL_COPIES * tile * FP32) + 2 * FP32 * tokens * shape.hidden


def trl_head_gpu(shape: ModelShape, tokens: int, bf16: bool) -> int:
    """TRL's output layer in Triton: one tile and the same part of the weight in the training dtype."""
    width, part = BF16 if bf16 else FP32, min(shape.vocab, TRL_VOCAB)
    return width * part * (min(tokens, TRL_TOKENS) + shape.hidden) + (FP32 + width) * tokens * shape.hidden


def chunked_head(shape: ModelShape, tokens: int, bf16: bool) -> int:
    """Our chunked log-probs: 1,024 positions of fp32 logits, and under bf16 the weight and its gradient once more."""
    again = 2 * BF16 * shape.embedding if bf16 else 0
    return CHUNK_COPIES * FP32 * min(tokens, CHUNK) * shape.vocab + again + 2 * FP32 * tokens * shape.hidden


@dataclass(frozen=True, slots=True)
class Training:
    """A training step on one process. `tokens` are those of one micro-batch, padding included.

    Example: `Training(shape, tokens=2048, head=trl_head_cpu)` trains all weights in fp32 on one process, a step being
    one micro-batch.
    """

    shape: ModelShape
    tokens: int
    head: HeadBytes
    mask_cells: int = 0  # rows × length², where rows are padded and so a mask is made; 0 without one
    checkpointing: bool = False
    bf16: bool = False
    lora_rank: int | None = None
    accumulates: bool = False  # more than one micro-batch an optimizer step
    gpus: int = 1
    shard: bool = False  # FSDP2 over them
    casts_gathered: bool = False  # sharded weights are gathered in fp32 and cast by autocast (rl/distributed.py)
    beside: int = 0  # parameters of frozen models beside it: a reference, a teacher

    @property
    def trained(self) -> int:
        """Parameters that train."""
        return self.shape.parameters if self.lora_rank is None else self.shape.adapters(self.lora_rank)

    @property
    def stream(self) -> int:
        """Bytes of a number of the residual stream: bf16 where FSDP2 gathers bf16 weights, fp32 under autocast."""
        return BF16 if self.bf16 and self.shard and not self.casts_gathered else FP32

    @property
    def parts(self) -> int:
        """Over how many processes weights, gradients and moments are divided."""
        return self.gpus if self.shard else 1


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU at the peak, by what they are for; a part that is not there at that moment is 0."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    copies: int = 0  # bf16 copies and gathered weights
    activations: int = 0
    logits: int = 0
    kv_cache: int = 0
    engine: int = 0  # what vLLM takes for itself

    @property
    def total(self) -> int:
        return (
            self.weights + self.gradients + self.optimizer + self.copies + self.activations + self.logits
            + self.kv_cache + self.engine
        )  # fmt: skip


def layer_bytes(training: Training) -> int:
    """Bytes a token that autograd saves of one decoder layer (the module's docstring says which).

    Example: H 4, Q 4, K 2, I 6 in fp32: 24 × 4 + 8 × 4 + 8 × 2 + 16 × 6 = 240.
    """
    shape = training.shape
    keys = shape.query if training.mask_cells else shape.key  # with a mask SDPA gets keys repeated for their queries
    # Frozen norms keep one tensor less each: their own gradient is not taken.
    frozen = 2 if training.lora_rank is not None else 0
    if training.bf16:
        norms = (26 if training.stream == FP32 else 20) * shape.hidden - training.stream * frozen * shape.hidden
        return norms + BF16 * (2 * shape.query + 2 * keys + 4 * shape.intermediate) + FP32 * shape.heads
    norms = FP32 * (6 - frozen) * shape.hidden
    return norms + FP32 * (2 * shape.query + 2 * keys + 4 * shape.intermediate + shape.heads)


def training_memory(training: Training) -> Memory:
    """The peak of a step, on one GPU. Example: at one token P parameters need 16 P bytes and little more."""
    shape, parts = training.shape, training.parts
    width = BF16 if training.bf16 else FP32
    weights = FP32 * (shape.parameters + training.beside) // parts
    if training.lora_rank is not None:
        weights += FP32 * training.trained
    gradients = FP32 * training.trained // parts
    held = gradients if training.accumulates else 0
    full = training.lora_rank is None
    head_gradient = FP32 * shape.embedding // parts if full else 0

    layer = layer_bytes(training) * training.tokens
    # What a layer's backward pass holds for itself: gradients of two MLP tensors and of the residual stream.
    passing = (2 * width * shape.intermediate + 2 * training.stream * shape.hidden) * training.tokens
    masks = (3 if training.bf16 else 1) * training.mask_cells  # bool, and its copy in the training dtype
    saved = (
        masks + (training.stream * shape.hidden * training.tokens if training.checkpointing else layer) * shape.layers
    )
    last = 3 * FP32 * shape.hidden * training.tokens  # the last norm
    copies = _copies(training)
    logits = training.head(shape, training.tokens, training.bf16)
    if parts > 1 and not training.casts_gathered:  # TRL gathers the output layer in fp32; its gradient is as large
        logits += (2 if full else 1) * FP32 * shape.embedding
    again = layer if training.checkpointing else 0  # the layer that is run again

    moments = {
        "head": (held + head_gradient, saved + last, logits),
        "layers": (max(held, head_gradient), saved + again + passing, 0),
        # The embedding's gradient is added to one that is there already: of a tied output layer, or of before.
        "end": (gradients + (head_gradient if shape.tied or training.accumulates else 0), 0, 0),
        "first layer": (gradients, masks + layer + passing, 0),
    }
    at_peak = max(moments.values(), key=sum)
    return Memory(
        weights=weights,
        gradients=at_peak[0],
        optimizer=2 * FP32 * training.trained // parts,
        copies=copies,
        activations=at_peak[1],
        logits=at_peak[2],
    )


def _copies(training: Training) -> int:
    """bf16 copies of weights; of sharded ones what is whole at a time: two layers, a layer's gradient, the root."""
    shape = training.shape
    cast = BF16 * shape.layers * shape.layer_matrices if training.bf16 else 0
    if training.parts == 1:
        # Autocast keeps its copy of a trained weight until the forward pass ends; of a frozen one autograd keeps it.
        return cast if training.lora_rank is None or not training.checkpointing else cast // shape.layers
    root = (1 if shape.tied else 2) * shape.embedding
    if training.casts_gathered:
        return cast + FP32 * (3 * shape.layer + root)
    width = BF16 if training.bf16 else FP32
    return (2 * width + FP32) * shape.layer + width * root


def sampling_memory(shape: ModelShape, sequences: int, length: int, bf16: bool, parts: int = 1) -> Memory:
    """Sampling with transformers: weights, keys and values of all sequences at full length, two copies of logits.

    Example: Qwen2.5-7B in bf16, 2 sequences of 1,000 tokens: keys and values 2 × 1,000 × 57,344 bytes.
    """
    width = BF16 if bf16 else FP32
    return Memory(
        weights=width * shape.parameters // parts,
        kv_cache=sequences * length * shape.kv_bytes(width) // parts,
        logits=2 * FP32 * sequences * shape.vocab,
    )


def token_budget(training: Training, limit: int) -> int:
    """The most tokens a micro-batch may have within `limit` bytes, in steps of 256; 0 if not even 256 fit.

    Rows are taken as packed: padding makes a mask that grows with the square of the length.
    """
    low, high = 0, 2**14  # × 256 tokens
    while low < high:
        middle = (low + high + 1) // 2
        fits = training_memory(replace(training, tokens=256 * middle, mask_cells=0)).total <= limit
        low, high = (middle, high) if fits else (low, middle - 1)
    return 256 * low
