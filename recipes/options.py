"""Arguments and options that several commands share, each with its name, its help and its limits in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or path of a YAML file.")
]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or a hub id (org/name).")]
ProblemsArgument = Annotated[
    str, typer.Argument(metavar="PROBLEMS", help="`tiny`, a file (JSONL, Parquet, CSV) or a hub id (org/name:split).")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as teacher.steps=5. May be repeated."),
]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="Root seed, instead of the recipe's.")]
RootSeedOption = Annotated[int, typer.Option("--seed", min=0, help="Root seed.")]
RunsOption = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder of all runs.")]
PoolArgument = Annotated[
    Path, typer.Argument(metavar="POOL", help="A pool's folder, or the stage's that holds it.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr.")]
SplitOption = Annotated[
    str | None, typer.Option("--split", help="train, dev, test or all  [default: all; test for tiny]")
]
CountOption = Annotated[int | None, typer.Option("--count", min=1, help="At most this many problems.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", help="Softmax temperature, above 0.")]
TopPOption = Annotated[float, typer.Option("--top-p", help="Nucleus share, in (0, 1].")]
MaxTokensOption = Annotated[int, typer.Option("--max-tokens", min=1, help="Longest completion in tokens.")]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Completions generated at once.")]
EngineOption = Annotated[str, typer.Option("--engine", help="What draws: transformers or vllm.")]
ReplicasOption = Annotated[int, typer.Option("--replicas", min=1, help="Engines side by side, one process each.")]
VllmOption = Annotated[
    list[str] | None,
    typer.Option("--vllm", metavar="KEY=VALUE", help="With vllm: a setting of its own, such as max_num_seqs=64."),
]
ServerOption = Annotated[
    str | None, typer.Option("--server", metavar="URL", help="With vllm: a running `vllm serve` draws.")
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task", help="How answers are judged: exact, integers, math, code, constraints, choice  [default: exact]"
    ),
]
SuffixOption = Annotated[str, typer.Option("--prompt-suffix", help="Appended to every question.")]
