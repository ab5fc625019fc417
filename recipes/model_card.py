"""The card of a model that a recipe made: a README.md beside its weights, in the form that the Hugging Face hub reads.

Written with every model, before anything is measured on it, from the recipe alone: a stage that is made again has the
same card. `reason export` writes it once more with the model's line of the frontier (recipes/export_commands.py).

The card says what is known: how the model was made, from what, on which problems, and what follows from that for its
use. It claims no licence: that is the parents' matter.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import yaml

from recipes.policy_keys import PolicyKeys
from recipes.schema import Recipe, Stage
from rl.runs import versions

# What follows from the way a model was made. Methods without an entry add nothing of their own.
LIMITS = {
    "pretrain": "Trained on generated demonstrations only; it knows no other text.",
    "grpo": "Trained on a rule reward: what the rule does not see (style, safety, truthfulness) was not trained.",
    "length_rl": "Rewarded for brevity among the samples of one problem: it may leave out checks that rarer, harder "
    "problems need. The frontier shows what that cost on the test problems, and only there.",
    "sft": "Imitates selected completions of its teacher, mistakes that the verifier let pass included.",
    "dpo": "Prefers shorter right completions of its parent; probabilities of both sides may have fallen.",
    "simpo": "Prefers shorter right completions of its parent; nothing held it near its parent while it trained.",
    "on_policy": "Follows its teacher token by token on its own samples; no reward was there to keep it right.",
    "preference_model": "Scores final answers as its pairs rank them, whatever is wrong with those; a policy that is "
    "paid by it for long learns to exploit it.",
    "merge": "Arithmetic on two parents' weights, without training: between the parents accuracy need not be between "
    "theirs.",
    "merge_search": "Arithmetic on two parents' weights, the weight chosen on dev problems, without training.",
    "logit_distill": "Imitates its teacher's probabilities on the teacher's own traces, mistakes in them included.",
    "select": "One of several models, chosen on dev problems: on others another one may be better.",
    "prepare": "The weights of its parent, with another template, context or end of turn that nothing was trained on.",
    "import_gguf": "Dequantised: the rounding of the quantised file is in the weights.",
}


NOT_MEASURED = "Nothing yet. A frontier stage of the recipe measures it; `reason export` then writes the figures here."


@dataclass(frozen=True, slots=True)
class Measured:
    """What a frontier says of the model.

    Example: `Measured("frontier", "brief", "teacher", (("accuracy", "0.930", "0.937"),), "400 problems x 4 samples")`
    """

    stage: str  # the frontier stage
    arm: str
    parent: str
    rows: Sequence[tuple[str, str, str]]  # (measure, this model, the parent)
    how: str  # problems, samples and sampling
    notes: Sequence[str] = ()  # what a reader of the figures must know


def model_card(recipe: Recipe, stage: Stage, inputs: Mapping[str, str], measured: Sequence[Measured] = ()) -> str:
    """The card as Markdown. `inputs`: key of the stage -> "<reference> <hash>", as in a manifest."""
    origin = [
        ("recipe", _code(recipe.name)),
        ("stage", _code(stage.name)),
        ("method", _code(stage.method)),
        ("seed", str(recipe.seed)),
        ("problems", _code(_without_folders(recipe.problems.source))),
    ]
    parents = [(_code(key), *_split(text)) for key, text in inputs.items()]
    parts = [
        _front_matter(stage),
        f"# {recipe.name}/{stage.name}",
        _purpose(stage),
        "## How it was made",
        _table(["", ""], origin),
        _table(["reads", "what", "hash"], parents) if parents else "It reads nothing.",
        "The stage with every default filled in:",
        _yaml({stage.name: _without_folders(stage.config.model_dump(mode="json"))}),
        "## Measured",
        "\n\n".join(map(_measured, measured)) or NOT_MEASURED,
        "## Limits",
        "\n".join(f"* {line}" for line in _limits(recipe, stage)),
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in versions().items() if version is not None),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(stage: Stage) -> str:
    """What the hub indexes. The base model is named only where it has a name there."""
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if stage.makes == "preference model" else "text-generation",
        "tags": ["reason", "reasoning", stage.method],
    }
    read = [reference for reference in stage.references() if reference.kind == "hub" and reference.wants == "model"]
    if read:
        fields["base_model"] = sorted({reference.ref for reference in read})
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _purpose(stage: Stage) -> str:
    """The first paragraph of the method's description."""
    return (inspect.getdoc(type(stage.config)) or stage.method).partition("\n\n")[0].replace("\n", " ")


def _limits(recipe: Recipe, stage: Stage) -> list[str]:
    lines = [LIMITS[stage.method]] if stage.method in LIMITS else []
    source = recipe.problems.source
    if source == "tiny":
        lines.append("Made for chains of arithmetic in a notation of a few characters. It does nothing else.")
    else:
        lines.append(
            f"Trained and chosen on problems of {_code(_without_folders(source))}; nothing else was looked at."
        )
    if isinstance(stage.config, PolicyKeys) and isinstance(stage.config.max_tokens, int):  # not one read off a pool
        lines.append(f"Trained on completions of at most {stage.config.max_tokens:,} tokens.")
    lines.append("Licence and intended use: those of the models and data that it was made from.")
    return lines


def _measured(one: Measured) -> str:
    head = f"Arm {_code(one.arm)} of the stage {_code(one.stage)}, against its parent {_code(one.parent)}: {one.how}"
    parts = [head, _table(["", one.arm, one.parent], one.rows), "\n".join(f"* {note}" for note in one.notes)]
    return "\n\n".join(part for part in parts if part)


def _split(text: str) -> tuple[str, str]:
    """ "teacher 0a1b2c3d" -> the reference and its hash, of which twelve digits tell enough."""
    ref, _, digest = text.rpartition(" ")
    return _code(_without_folders(ref or digest)), digest[:12] if re.fullmatch(r"[0-9a-f]{8,}", digest) else "-"


def _without_folders(value: Any) -> Any:
    """A config without the folders of one machine: "/data/me/models/base" is "base". A card may be published."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    return PurePath(value).name if isinstance(value, str) and value.startswith("/") else value


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _yaml(value: Any) -> str:
    return f"```yaml\n{yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110)}```"


def _code(text: str) -> str:
    return f"`{text}`"
