"""Hours of training and of sampling, from floating-point operations and bandwidth.

Training: 6 operations a token and multiplied parameter (forward 2, backward 4), 6 × layers × width of the queries ×
context for causal attention; gradient checkpointing runs the layers forward once more; LoRA takes no gradient of frozen
weights, and 6 a parameter of its own; the output layer in tiles is made again in the backward pass. Divided by the
device's speed times `utilization`, the share of it that a trainer reaches: 0.3 unless told otherwise (prime-rl's own
tables have 17 % for SFT of 0.6B and 27 % of 4B). `benchmarks/plan_accuracy.py` measures it for a CPU.

Sampling is the roofline of decoding: a step for a batch of sequences reads every weight and all their keys and values
once at 80 % of the bandwidth, or multiplies at the same utilization, whichever takes longer. Prompts are not counted:
they are short beside the thoughts.

Line: `reason plan RECIPE`.
"""

from __future__ import annotations

from distill.plan_gpus import Device
from distill.plan_memory import BF16, FP32, Training
from distill.plan_models import ModelShape

UTILIZATION = 0.3
REACHED_BANDWIDTH = 0.8
ADAMW_BYTES = 28  # a trained parameter: reads weight, gradient and moments, writes weight and moments


def training_flops(training: Training, length: float) -> float:
    """Operations of one token in rows of `length` tokens, forward and backward.

    Example: a model of 100 multiplied parameters, 20 of them in the output layer, at length 0: 6 × 100 + 2 × 20 = 640.
    """
    shape = training.shape
    layers, head = shape.layers * shape.layer_matrices, shape.embedding
    attention = 2 * shape.layers * shape.query * length  # forward
    adapters = 0 if training.lora_rank is None else training.trained
    weights = 2 if training.lora_rank is None else 0  # the gradient of the weights
    again = 2 * (layers + adapters) + attention if training.checkpointing else 0
    return (4 + weights) * (layers + head) + 6 * adapters + 2 * head + 3 * attention + again


def step_seconds(
    training: Training, tokens: float, length: float, device: Device, utilization: float = UTILIZATION
) -> float:
    """One optimizer step on `tokens` tokens over all GPUs."""
    work = tokens * training_flops(training, length) / (training.gpus * device.flops * utilization)
    return work + ADAMW_BYTES * training.trained / training.parts / device.bandwidth


def decode_rate(
    shape: ModelShape, sequences: int, context: float, device: Device, utilization: float = UTILIZATION
) -> float:
    """Tokens a second of one engine that decodes `sequences` at once, at a mean context of `context` tokens.

    Example: a model of 10⁹ bytes of weights and no keys, 4 sequences, 10⁹ bytes a second reached: 4 tokens a second.
    """
    width = BF16 if device.on_gpu else FP32
    read = width * shape.parameters + sequences * context * shape.kv_bytes(width)
    multiplied = sequences * (2 * shape.multiplied + 4 * shape.layers * shape.query * context)
    slowest = max(read / (device.bandwidth * REACHED_BANDWIDTH), multiplied / (device.flops * utilization))
    return sequences / slowest
