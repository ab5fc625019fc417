"""What the tests of real engines share: the model, its requests, and the distribution that an engine must draw from."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from rl.prompts import render_prompt
from rl.samplers.base import SampleRequest, sample_seed
from rl.tasks import tiny

MODEL = str(Path(__file__).resolve().parents[1] / "recipes" / "models" / "tiny-base")


def requests_for(tokenizer, problems, samples=1, seed=0):
    return [
        SampleRequest(render_prompt(tokenizer, p), sample_seed(seed, p.id, i))
        for p in tiny.problems("train", problems)
        for i in range(samples)
    ]


def trainer_distribution(model, request, completion, temperature=1.0, top_p=1.0):
    """Log-probs (T, V) of the processed distribution at every token of a completion, from the model's own logits."""
    ids = torch.tensor([[*request.context, *completion.token_ids]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(request.context) - 1 : -1]
    plain = torch.log_softmax(logits.double() / temperature, dim=-1)
    if top_p < 1:
        ordered, order = plain.sort(descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        cut = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        plain = torch.log_softmax(plain.masked_fill(cut, -math.inf), dim=-1)
    return plain


def trainer_logprobs(model, request, completion, temperature=1.0, top_p=1.0):
    """Those of the drawn tokens alone, (T,)."""
    plain = trainer_distribution(model, request, completion, temperature, top_p)
    return plain.gather(-1, torch.tensor(completion.token_ids).unsqueeze(-1)).squeeze(-1).tolist()
