"""`reason r1-eval`: a model at DeepSeek-R1's protocol (arXiv 2501.12948, section 3; its README's advice for use).

    reason r1-eval MODEL --out eval --file livecodebench=test6.jsonl --engine vllm

Temperature .6, top-p .95, 32,768 tokens, no system prompt; pass@1 is the mean over k samples and cons@k the majority
vote of the decided ones; every reply is made to begin with `<think>` and a new line, unless the model's template opens
the thought itself. `OUT/results.json` holds what a figure depends on; called again, nothing is drawn twice, and where
nothing is missing no engine starts. `OUT/drawn.json` keeps which versions and which engine drew, since the ones that
score a pool again may be others.

Deviations: GPQA's options are shuffled by a seed, not asked in the data set's order; codeforces and the general
benchmarks are not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
        str | None,
        typer.Option("--only", metavar="NAME,NAME", help="Only these of aime24, math500, gpqa-d and livecodebench."),
    ] = None,
    files: Annotated[
        list[str] | None,
        typer.Option("--file", metavar="NAME=PATH", help="A local file or another hub id for a benchmark. Repeat it."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", "-k", min=1, help="Completions per problem, in place of the paper's.")
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
    from rl.runs import write_json

    drawer = choose(engine, batch_size, replicas, vllm or (), server)
    common = direct.Draw(0, temperature, top_p, max_tokens, drawer, seed, force_think=True)
    chosen = benchmarks_of(only, files or ())
    name = direct.check_model(model)
    found: dict[str, Any] = {}
    with open_report() as report:
        for place, (benchmark, (entry, source)) in enumerate(chosen.items(), start=1):
            problems = direct.problem_set(source, "all", count, entry.task)
            draw = replace(common, samples=samples or entry.samples, suffix=entry.suffix)
            title = f"{benchmark} ({place} of {len(chosen)})"
            drawing = {"engine": {"engine": drawer.name} | drawer.identity(), "versions": all_versions()}
            noted = Noted(out / "drawn.json", benchmark, drawing)

            def progress(done: int, total: int, title: str = title, noted: Noted = noted) -> None:
                if done < total:
                    noted.add()
                report.stage_progress(title, done, total, "completions")

            groups = direct.sample(name, problems, out / benchmark, draw, progress)
            summary, _ = direct.evaluate(groups, problems)
            found[benchmark] = {
                "source": source,
                "samples": draw.samples,
                "suffix": entry.suffix,
                "verifier": problems.task.verifier_version,
                "pool": _address(out / benchmark),
                "drawn_with": noted.all(),
                "summary": summary,
            }
    left_out = [benchmark for benchmark in BENCHMARKS if only is None and benchmark not in chosen]
    value = {"model": model, "protocol": protocol_of(name, common), "benchmarks": found, "left_out": left_out}
    write_json(out / "results.json", value, "r1eval.results")
    show(value, results_text(found, left_out), as_json)


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
    from recipes.loader import likely

    if name not in BENCHMARKS:
        raise ValueError(
            f"{option}: there is no benchmark {name[:40]!r}{likely(name, BENCHMARKS)}; they are {', '.join(BENCHMARKS)}"
        )
    return name


def _address(folder: Path) -> dict[str, Any]:
    """What the samples are samples of: fingerprints of model, problems and template, and the sampling settings."""
    from rl.pool import Pool

    return Pool.open(folder).address.to_json()


@dataclass(frozen=True, slots=True)
class Noted:
    """What has drawn samples of one benchmark, in a file that holds all of them: a pool may be filled in several runs.

    Written before the first sample, so that a killed run is there too.
    """

    path: Path
    benchmark: str
    present: Mapping[str, Any]  # engine and versions of this process

    def all(self) -> list[Any]:
        return self._read().get(self.benchmark, [])

    def add(self) -> None:
        from rl.runs import write_json

        noted = self._read()
        if self.present not in noted.setdefault(self.benchmark, []):
            noted[self.benchmark].append(dict(self.present))
            write_json(self.path, noted, "r1eval.drawn")

    def _read(self) -> dict[str, list[Any]]:
        from rl.runs import read_json

        return read_json(self.path) if self.path.exists() else {}


def all_versions() -> dict[str, str | None]:
    """Those that every stage keeps, and those of what draws and judges here."""
    from rl.runs import versions

    return versions("vllm", "math-verify")


def protocol_of(model: str, drawn_by: Draw) -> dict[str, Any]:
    """What the figures depend on beside model and problems: template, sampling, seed, the versions that scored."""
    from hashlib import sha256

    from rl.policy import load_tokenizer
    from rl.prompts import force_think

    tokenizer = load_tokenizer(model)
    force_think(tokenizer)
    return {
        "temperature": drawn_by.temperature,
        "top_p": drawn_by.top_p,
        "max_tokens": drawn_by.max_tokens,
        "seed": drawn_by.seed,
        "chat_template_sha256": sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        "versions": all_versions(),
    }


def results_text(found: Mapping[str, Any], left_out: Sequence[str] = ()) -> str:
    """One line a benchmark: pass@1 with its interval, cons@k, tokens; and which were not measured."""
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
    lines += [f"{name:<14} not measured: give --file {name}=PATH" for name in left_out]
    return "\n".join(lines)
