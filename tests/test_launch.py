"""The launch files: accelerate takes their configs, shells take their scripts, and what they start exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from recipes.schema import load_recipe, shipped_recipes

ROOT = Path(__file__).parent.parent
CONFIGS = {"one_gpu": ("NO", 1), "one_node": ("MULTI_GPU", 8), "several_nodes": ("MULTI_GPU", 32)}
NAMED = r"(?:cli run|launch/slurm\.sh|RECIPE[=:]) ?([a-z0-9.-]+-[a-z0-9.-]+[a-z0-9])"


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_takes_the_config(name):
    config = load_config_from_file(str(ROOT / "launch" / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    found = (str(getattr(config.distributed_type, "value", config.distributed_type)), config.num_processes)
    assert found == CONFIGS[name]


def test_the_slurm_script_is_a_script_and_wants_a_recipe():
    script = ROOT / "launch" / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    bare = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert (bare.returncode, bare.stderr.startswith("give a recipe")) == (2, True)


def test_the_slurm_script_starts_a_process_for_each_gpu_of_each_node(tmp_path):
    """With programs of the same names that print what they are given."""
    for name, body in {
        "scontrol": "echo first; echo second",
        "srun": '"$@"',
        "torchrun": 'for word in "$@"; do echo "$word"; done',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    found = subprocess.run(
        ["bash", str(ROOT / "launch" / "slurm.sh"), "tiny", "--set", "teacher.steps=2"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n", "SLURM_NNODES": "2", "SLURM_NODEID": "1"},
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    words = found.stdout.split("\n")[:-1]
    assert words == [
        "--nnodes",
        "2",
        "--node-rank",
        "1",
        "--nproc-per-node",
        "8",
        "--master-addr",
        "first",
        "--master-port",
        "29500",
        "-m",
        "cli",
        "run",
        "tiny",
        "--set",
        "teacher.steps=2",
    ]


def test_sky_starts_what_exists():
    task = yaml.safe_load((ROOT / "launch" / "sky.yaml").read_text())
    assert load_recipe(task["envs"]["RECIPE"])
    subprocess.run(["bash", "-n"], input=task["setup"] + task["run"], text=True, check=True)


@pytest.mark.parametrize("path", sorted((ROOT / "launch").iterdir()), ids=lambda path: path.name)
def test_the_recipes_that_the_files_name_exist(path):
    names = set(re.findall(NAMED, path.read_text())) - {"RECIPE"}
    assert names <= set(shipped_recipes())


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_the_launch_files_that_a_recipe_names_exist(name):
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    assert all((ROOT / path).is_file() for path in re.findall(r"launch/[a-z_]+\.(?:yaml|sh)", text))
