"""What the README shows is what happens: its recipe runs, its error message is the real one, its tree exists."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from recipes.loader import RecipeError, parse_value
from recipes.problem_keys import Problems
from recipes.schema import load_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def mine(tmp_path, tiny_model_folder) -> Path:
    """The README's own recipe, with a made model and problems beside it."""
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    shutil.copytree(tiny_model_folder, tmp_path / "my-model")
    rows = [{"question": f"{a}+{b}", "answer": str(a + b)} for a in range(10, 18) for b in range(10, 18)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "mine.yaml"
    path.write_text(block)
    return path


@pytest.mark.timeout(120)
def test_the_recipe_for_your_own_model_and_problems_runs(mine, tmp_path):
    from recipes.console import PlainReport
    from recipes.runner import run_recipe
    from recipes.stages import METHODS

    small = ["sampling.max_tokens=24", "problems.prompt_suffix=''", "brief.max_tokens=16"]
    for stage in ("teacher", "brief"):
        small += [f"{stage}.steps=2", f"{stage}.eval_every=1", f"{stage}.problems_per_step=2", f"{stage}.group_size=2"]
    results = run_recipe(load_recipe(mine, small), root=tmp_path / "runs", methods=METHODS, report=PlainReport())
    assert [result.name for result in results if "." not in result.name] == ["teacher", "brief", "frontier"]
    assert (results[-1].folder / "report.html").stat().st_size > 10_000


def test_the_error_message_is_the_real_one(mine):
    block = yaml.safe_load(mine.read_text())
    assert block["name"] == "mine"
    mine.write_text(mine.read_text().replace("steps: 200,", "steps: 200, group_sise: 8,"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(mine)
    shown = re.search(r"mine\.yaml:\d+: (stages\.teacher\.group_sise: .*)", README)
    assert shown is not None
    assert shown.group(1) in str(caught.value)


def test_every_file_of_the_tree_exists():
    (tree,) = re.findall(r"## The tree\n\n```\n(.*?)```", README, re.DOTALL)
    room = ""
    for line in tree.splitlines():
        if not line.startswith(" "):
            room = line.split("/")[0] if "/" in line.split()[0] else ""
        for name in re.findall(r"[\w-]+\.(?:py|md)\b", line):
            assert (ROOT / room / name).is_file() or (ROOT / name).is_file(), f"{room}/{name}"
    for room in ("rl", "distill", "long2short"):
        for path in (ROOT / room).glob("*.py"):
            assert path.name == "__init__.py" or path.name in tree, f"{room}/{path.name} is not in the README's tree"


def test_the_problem_sections_are_valid():
    lines = re.findall(r"^problems: (\{source: .*\})$", README, re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        Problems.model_validate_json(json.dumps(parse_value(line, "README")))
