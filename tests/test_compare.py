"""`reason compare`: two pools in one paired comparison, and what cannot be compared."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import cli
from recipes.compare_commands import read_both
from rl.evaluate import compare
from rl.pool import Pool, fill_pool
from rl.samplers.base import SamplingSettings
from rl.tasks import tiny
from rl.tasks.base import Task
from rl.types import Completion, FinishReason
from tests import pool_world

ROOT = Path(__file__).resolve().parents[1]
PROBLEMS = tiny.problems("test", 8, (2, 3, 4))


class Model(pool_world.ScriptedSampler):
    """Right where the seed's rest by `every` is 0, with `tokens` tokens and some more; every seventh is cut off."""

    def __init__(self, every: int, tokens: int) -> None:
        super().__init__()
        self.every, self.tokens = every, tokens

    def complete(self, request):
        answers = {tuple(ord(c) for c in p.text + "\n"): p.answer for p in PROBLEMS}
        right = answers[request.prompt_ids]
        answer = right if request.seed % self.every == 0 else f"{(int(right) + 1) % 100:02}"
        length = self.tokens + request.seed % 5
        reason = FinishReason.LENGTH if request.seed % 7 == 0 else FinishReason.STOP
        return Completion(f"so</think>{answer}", tuple(range(length)), (0.0,) * length, reason)


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("compare")
    pool_world.fill(folder / "a", samples=4, sampler=Model(2, 20), problems=PROBLEMS)
    pool_world.fill(folder / "b", samples=6, sampler=Model(3, 40), problems=PROBLEMS)
    return folder / "a", folder / "b"


def reason(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["compare", *map(str, arguments)])


def value_of(*arguments: object, exit_code: int = 0) -> dict:
    done = reason(*arguments, "--json")
    assert done.exit_code == exit_code, done.output
    return json.loads(done.stdout)


def test_it_says_what_compare_says_of_the_first_k_of_both(pools: tuple[Path, Path]):
    a, b = pools
    value = value_of(a, b)
    groups = [Pool.open(folder).groups(PROBLEMS, "tiny-1", 4) for folder in pools]
    difference = compare(*groups)
    assert value["difference"] == json.loads(json.dumps(difference.to_json()))
    assert (value["verifier"], value["samples"], value["held"], value["differs"]) == ("tiny-1", 4, [4, 6], {})
    for side, own in zip(value["sides"], groups, strict=True):
        rollouts = [rollout for group in own for rollout in group.rollouts]
        assert side["accuracy"]["value"] == pytest.approx(sum(r.right for r in rollouts) / 32)
        assert side["tokens"]["mean"]["value"] == sum(r.num_tokens for r in rollouts) / 32
        cut = sum(r.completion.finish_reason is FinishReason.LENGTH for r in rollouts)
        assert side["truncated"] == cut / 32 and side["undecided"] == 0
    back = value_of(b, a)["difference"]
    assert back["accuracy"]["value"] == -value["difference"]["accuracy"]["value"]
    assert back["only_any"] == value["difference"]["only_any"][::-1]


def test_the_text_names_the_rows_and_what_to_know(pools: tuple[Path, Path]):
    done = reason(*pools)
    assert done.exit_code == 0
    for line in ("accuracy (avg@4)", "tokens, mean", "truncated", "tokens, both right", "A - B, paired"):
        assert line in done.stdout
    assert "longer on 0 problems, shorter on 8, alike on 0; sign test p = 0.008" in done.stdout  # 2 / 2^8
    assert "A has 4 samples a problem and B 6: the first 4 count" in done.stdout
    assert "8 problems x 4 samples, judged by tiny-1" in done.stdout
    assert "Only 8 problems: with fewer than 100 the intervals are rough." in done.stdout


def test_a_pool_equals_itself(pools: tuple[Path, Path]):
    found = value_of(pools[0], pools[0])["difference"]
    assert found["accuracy"]["value"] == found["tokens"]["value"] == found["tokens_relative"]["value"] == 0
    assert found["accuracy_signs"] == {"up": 0, "down": 0, "equal": 8, "p": 1.0}
    assert found["only_any"] == found["only_majority"] == [0, 0]


def test_other_problems_and_missing_ones_are_refused(pools: tuple[Path, Path], tmp_path: Path):
    pool_world.fill(tmp_path / "other", samples=2, sampler=Model(2, 20), problems=PROBLEMS[:5])
    error = value_of(pools[0], tmp_path / "other", exit_code=2)["error"]
    assert "different problem sets" in error and "same file, split and count" in error
    pool_world.fill(tmp_path / "half", samples=2, sampler=Model(2, 20), problems=PROBLEMS, part=(0, 2))
    error = value_of(pools[0], tmp_path / "half", exit_code=2)["error"]
    assert "lacks 4 problems that the other pool has" in error and "fill it first" in error
    Pool.open(tmp_path / "empty", pool_world.address(PROBLEMS))
    assert "hold no samples" in value_of(tmp_path / "empty", tmp_path / "empty", exit_code=2)["error"]
    assert "holds no pool" in value_of(pools[0], tmp_path / "nowhere", exit_code=2)["error"]


def test_a_race_is_refused(pools: tuple[Path, Path], tmp_path: Path):
    Pool.open(tmp_path, pool_world.address(PROBLEMS, racing=True))
    assert "racing pool" in value_of(pools[0], tmp_path, exit_code=2)["error"]


def other_judge(version: str) -> Task:
    """The tiny world's judge under another version, which finds everything right."""

    def judge(attempts):
        return tiny.TASK.judge([(p, replace(c, text=f"</think>{p.answer}")) for p, c in attempts])

    return replace(tiny.TASK, judge=judge, verifier_version=version)


def test_verdicts_are_those_of_a_verifier_that_judged_both(pools: tuple[Path, Path], tmp_path: Path):
    for name, every in (("a", 2), ("b", 3)):
        pool_world.fill(tmp_path / name, samples=2, sampler=Model(every, 9), problems=PROBLEMS)
    a, b = tmp_path / "a", tmp_path / "b"
    Pool.open(a).judge(PROBLEMS, other_judge("kind-1"))
    assert read_both(a, b).verifier == "tiny-1"
    error = value_of(a, b, "--verifier", "kind-1", exit_code=2)["error"]
    assert "verifier kind-1 has not judged both pools" in error and "reason rescore" in error
    assert "not judged both" in value_of(a, b, "--task", "exact", exit_code=2)["error"]
    assert "there is no task 'exat'" in value_of(a, b, "--task", "exat", exit_code=2)["error"]
    Pool.open(b).judge(PROBLEMS, other_judge("kind-1"))
    assert read_both(a, b).verifier == "kind-1"  # the one that judged last
    assert all(r.right for groups in read_both(a, b).groups for group in groups for r in group.rollouts)
    assert value_of(a, b, "--verifier", "tiny-1")["verifier"] == "tiny-1"
    assert reason(a, b, "--verifier", "tiny-1", "--task", "exact").exit_code == 2
    pool_world.fill(tmp_path / "c", samples=2, sampler=Model(2, 9), problems=PROBLEMS, task=other_judge("kind-2"))
    error = value_of(tmp_path / "c", pools[0], exit_code=2)["error"]
    assert "no verifier has judged both pools" in error and "by kind-2" in error and "by tiny-1" in error


def test_other_sampling_settings_are_told_not_refused(pools: tuple[Path, Path], tmp_path: Path):
    address = replace(pool_world.address(PROBLEMS), temperature=0.5, model="another", seed=3)
    settings = SamplingSettings(temperature=0.5, max_tokens=address.max_tokens)
    pool = Pool.open(tmp_path, address)
    fill_pool(pool, Model(2, 20), pool_world.TOKENIZER, PROBLEMS, tiny.TASK, 4, settings, 3)
    done = reason(pools[0], tmp_path)
    assert "They were drawn with another temperature: 1.0 and 0.5." in done.stdout
    assert value_of(pools[0], tmp_path)["differs"] == {"temperature": [1.0, 0.5]}


def test_the_help_needs_neither_torch_nor_numpy():
    code = (
        "import sys, cli\n"
        "from typer.testing import CliRunner\n"
        "assert 'POOL_A' in CliRunner().invoke(cli.app, ['compare', '--help']).output\n"
        "sys.exit(str([n for n in ('torch', 'transformers', 'datasets', 'numpy') if n in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "[]"


def test_the_frontier_prints_markdown_and_csv(pools: tuple[Path, Path]):
    arms = ["--arm", f"a={pools[0]}", "--arm", f"same={pools[0]}", "--parent", "a", "--count", "8"]
    printed = CliRunner().invoke(cli.app, ["frontier", *arms, "--csv"])
    assert printed.exit_code == 0, printed.output
    lines = list(csv.DictReader(io.StringIO(printed.stdout)))
    assert [line["name"] for line in lines] == ["a", "same"]
    assert float(lines[1]["difference_accuracy"]) == 0.0
    printed = CliRunner().invoke(cli.app, ["frontier", *arms, "--markdown"])
    assert printed.exit_code == 0 and "| \\* same |" in printed.stdout and "- 8 problems × 4 samples" in printed.stdout


def test_the_frontier_of_pools_writes_its_page_and_names_other_settings(
    pools: tuple[Path, Path], tmp_path: Path, tiny_model_folder: Path
):
    changed = tmp_path / "changed"
    shutil.copytree(pools[0], changed)
    address = json.loads((changed / "pool.json").read_text())
    (changed / "pool.json").write_text(
        (changed / "pool.json").read_text().replace('"temperature": 1.0', '"temperature": 0.5')
    )
    assert address != json.loads((changed / "pool.json").read_text())
    out = tmp_path / "out"
    command = ["frontier", "--arm", f"a={pools[0]}", "--arm", f"cool={changed}", "--parent", "a", "--count", "8"]
    printed = CliRunner().invoke(cli.app, [*command, "--out", str(out), "--tokenizer", str(tiny_model_folder)])
    assert printed.exit_code == 0, printed.output
    assert "cool was drawn with another temperature than a: 0.5 and 1.0" in printed.stdout
    names = ["frontier.csv", "frontier.json", "frontier.md", "frontier.png", "frontier.svg", "report.html"]
    assert sorted(path.name for path in out.iterdir()) == names
    row = json.loads((out / "frontier.json").read_text())["rows"][0]
    assert row["efficiency"] is not None and row["summary"]["think_tokens"] is not None
    assert "cool was drawn with another temperature" in (out / "report.html").read_text()
    value = json.loads(CliRunner().invoke(cli.app, [*command, "--json"]).stdout)
    assert value["page"] is None and len(value["differs"]) == 1
    shown = CliRunner().invoke(cli.app, [*command, "--markdown"])
    assert "another temperature" in shown.stderr and shown.stdout.startswith("| ")
    again = CliRunner().invoke(cli.app, [*command, "--out", str(out)])
    assert again.exit_code == 2 and "holds something already; name a new folder" in again.output
