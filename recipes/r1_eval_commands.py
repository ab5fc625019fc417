"""`reason r1-eval`: a model at DeepSeek-R1's protocol (arXiv 2501.12948, section 3; its README's advice for use).

    reason r1-eval MODEL --out eval --file livecodebench=test6.jsonl --engine vllm

Temperature .6, top-p .95, 32,768 tokens, no system prompt; pass@1 is the mean over k samples and cons@k the majority
vote of the decided ones; every reply is made to begin with `<think>` and a new line, unless the model's template opens
the thought itself. `OUT/results.json` holds what a figure depends on; called again, nothing is drawn twice.

Deviations: GPQA's options are shuffled by a seed, not asked in the data set's order; codeforces and the general
benchmarks are not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recipes.loader import likely
from recipes.options import (
    BatchOption,
    CountOption,
    EngineOption,
    JsonOption,
    MaxTokensOption,
    ModelArgument,
    ReplicasOption,
    RootSeedOption,
    ServerOption,
    TemperatureOption,
    TopPOption,
    VllmOption,
)

if TYPE_CHECKING:
    from recipes.direct import Draw

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Where its problems are, how they are judged and asked, and how many samples the paper takes."""

    source: str | None  # hub id with its split; None where the hub has no copy that loads without running its code
    task: str
    samples: int
    suffix: str


BENCHMARKS: dict[str, Benchmark] = {
    "aime24": Benchmark("HuggingFaceH4/aime_2024:train", "math", 64, BOXED),
    "math500": Benchmark("HuggingFaceH4/MATH-500:test", "math", 16, BOXED),
    "gpqa-d": Benchmark(
        "Idavidrein/gpqa/gpqa_diamond:train", "choice", 64,
        "\nPlease reason step by step, and put the letter of your answer within \\boxed{}.",
    ),
    "livecodebench": Benchmark(
        None, "code", 8, "\nPlease reason step by step, and give the whole program in one block of Python code."
    ),
}  # fmt: skip


def r1_eval_command(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Keep pools and results.json here.")] = Path(
        "r1-eval"
    ),
    only: Annotated[
        str | None, typer.Option("--only", metavar="NAME,NAME", help="These benchmarks  [all that can be had]")
    ] = None,
    files: Annotated[
        list[str] | None,
        typer.Option("--file", metavar="NAME=PATH", help="A local file or another hub id for a benchmark. Repeat it."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", "-k", min=1, help="Completions per problem  [the paper's]")
    ] = None,
    count: CountOption = None,
    temperature: TemperatureOption = 0.6,
    top_p: TopPOption = 0.95,
    max_tokens: MaxTokensOption = 32_768,
    batch_size: BatchOption = 256,
    engine: EngineOption = "vllm",
    replicas: ReplicasOption = 1,
    vllm: VllmOption = None,
    server: ServerOption = None,
    seed: RootSeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Score a model at DeepSeek-R1's protocol: AIME 2024, MATH-500, GPQA-Diamond, LiveCodeBench."""
    from recipes import direct
    from recipes.console import open_report, show
    from recipes.engines import choose

    drawer = choose(engine, batch_size, replicas, vllm or (), server)
    chosen = benchmarks_of(only, files or ())
    name = direct.check_model(model)
    found: dict[str, Any] = {}
    with open_report() as report:
        for place, (benchmark, (entry, source)) in enumerate(chosen.items(), start=1):
            problems = direct.problem_set(source, "all", count, entry.task)
            draw = direct.Draw(
                samples or entry.samples, temperature, top_p, max_tokens, drawer, seed, entry.suffix, force_think=True
            )
            title = f"{benchmark} ({place} of {len(chosen)})"
            groups = direct.sample(
                name, problems, out / benchmark, draw,
                lambda done, total, title=title: report.stage_progress(title, done, total, "completions"),
            )  # fmt: skip
            summary, _ = direct.evaluate(groups, problems)
            found[benchmark] = {
                "source": source,
                "samples": draw.samples,
                "suffix": entry.suffix,
                "verifier": problems.task.verifier_version,
                "pool": _address(out / benchmark),
                "summary": summary,
            }
    value = {"model": model, "protocol": protocol_of(name, drawn_by=draw), "benchmarks": found}
    write_results(out / "results.json", value)
    show(value, results_text(found), as_json)


def benchmarks_of(only: str | None, files: Sequence[str]) -> dict[str, tuple[Benchmark, str]]:
    """The benchmarks that are asked for, each with where its problems are.

    Errors: ValueError for a name that there is not, and for a benchmark that is asked for and has no source.
    """
    given: dict[str, str] = {}
    for text in files:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise ValueError(f"--file must be NAME=PATH, such as aime24=./aime24.jsonl, not {text[:60]!r}")
        given[_known(name, "--file")] = path
    names = list(BENCHMARKS) if only is None else [_known(part.strip(), "--only") for part in only.split(",")]
    chosen: dict[str, tuple[Benchmark, str]] = {}
    for name in names:
        source = given.get(name, BENCHMARKS[name].source)
        if source is not None:
            chosen[name] = (BENCHMARKS[name], source)
        elif only is not None:
            raise ValueError(
                f"{name} has no copy on the hub that loads without running code of its own: download its test file "
                f"and give --file {name}=PATH"
            )
    return chosen


def _known(name: str, option: str) -> str:
    if name not in BENCHMARKS:
        raise ValueError(
            f"{option}: there is no benchmark {name[:40]!r}{likely(name, BENCHMARKS)}; they are {', '.join(BENCHMARKS)}"
        )
    return name


def _address(folder: Path) -> dict[str, Any]:
    """What the samples are samples of: fingerprints of model, problems and template, and the sampling settings."""
    from rl.pool import Pool

    return Pool.open(folder).address.to_json()


def protocol_of(model: str, drawn_by: Draw) -> dict[str, Any]:
    """What the figures depend on beside model and problems: template, sampling, seed, versions."""
    from hashlib import sha256

    from rl.policy import load_tokenizer
    from rl.prompts import force_think
    from rl.runs import versions

    tokenizer = load_tokenizer(model)
    force_think(tokenizer)
    return {
        "temperature": drawn_by.temperature,
        "top_p": drawn_by.top_p,
        "max_tokens": drawn_by.max_tokens,
        "seed": drawn_by.seed,
        "chat_template_sha256": sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        "versions": versions(),
    }


def write_results(path: Path, value: Mapping[str, Any]) -> None:
    from rl.runs import write_json

    write_json(path, dict(value), "r1eval.results")


def results_text(found: Mapping[str, Any]) -> str:
    """One line a benchmark: pass@1 with its interval, cons@k, tokens."""
    lines = [f"{'benchmark':<14} {'problems':>8}  {'pass@1':<22} {'cons@k':<14} {'tokens':>8} {'truncated':>9}"]
    for name, entry in found.items():
        summary = entry["summary"]
        accuracy = summary["accuracy"]
        interval = f"{accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]"
        voted = f"{summary['maj_at_k']:.3f} (k {entry['samples']})"
        lines.append(
            f"{name:<14} {summary['num_problems']:>8}  {interval:<22} {voted:<14} "
            f"{summary['tokens']['mean']['value']:>8.1f} {summary['truncated']:>9.1%}"
        )
    return "\n".join(lines)
