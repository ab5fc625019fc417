"""What every test shares: no network, one thread, fault points counted from zero, a tiny model folder on disk."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path
from subprocess import CompletedProcess

# Before any test module imports torch or transformers.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.pop("REASON_FAULT", None)

import pytest

from rl.faults import reset_faults

# Half a minute to six each. Whichever of two processes begins one of these last is waited for by the other.
LONGEST = ("test_smollm2.py", "test_recipes.py", "test_r1_recipes.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, the others as they are; `make test` keeps this order."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that need a sandbox are not run where there is none, except where that is an error (CI)."""
    if item.get_closest_marker("sandbox") is None:
        return
    from rl.sandbox.base import SandboxUnavailable
    from rl.sandbox.ladder import find_sandbox

    try:
        find_sandbox()
    except SandboxUnavailable as error:
        if os.environ.get("REASON_NEEDS_SANDBOX"):
            raise
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _faults_from_zero() -> Iterator[None]:
    reset_faults()
    yield
    reset_faults()


@pytest.fixture(scope="session")
def timed() -> Callable[[list[str]], tuple[float, CompletedProcess[str]]]:
    """Runs a Python command four times and gives its least seconds of processor time, which a machine that is busy with
    other work does not raise as it does the time on the clock."""

    def run(words: list[str]) -> tuple[float, CompletedProcess[str]]:
        runs = []
        for _ in range(4):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            runs.append((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done))
        return min(runs, key=itemgetter(0))

    return run


@pytest.fixture(scope="session")
def libraries_seconds(timed: Callable[[list[str]], tuple[float, CompletedProcess[str]]]) -> float:
    """What Python's start and the import of what every command needs cost here: what a quick command is held to on a
    machine that is slow."""
    return timed(["-c", "import typer, pydantic, yaml, rich.markdown"])[0]


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of the tiny world as an ordinary HF folder. Read it, never write into it."""
    from rl.policy import save_model
    from rl.tasks.tiny_models import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("models") / "untrained"
    tokenizer = make_tokenizer()
    save_model(make_model(hidden=32, layers=1, heads=2, tokenizer=tokenizer, seed=0), tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def train_rl() -> Callable[..., None]:
    """`train_rl(model_folder, folder, steps=4, ...)`: an RL run on the tiny world, every part of it replaceable."""
    import torch

    from rl.collect import Collector, RolloutSettings, no_shaping
    from rl.curriculum import Shuffled
    from rl.grpo import DevSet, Schedule, train
    from rl.learner import Learner, OptimSettings
    from rl.objectives import dapo
    from rl.policy import PolicyModel, load_model, load_tokenizer
    from rl.rewards import FormatReward, WeightedReward, accuracy_reward
    from rl.samplers.base import SamplingSettings
    from rl.samplers.transformers import TransformersSampler
    from rl.schedules import constant
    from rl.tasks import tiny

    rule_rewards = (
        WeightedReward("accuracy", accuracy_reward, 1.0),
        WeightedReward("format", FormatReward(True), 0.5),
    )

    def run(
        model_folder, folder, steps=4, *, per_step=4, group=4, max_tokens=16, train_problems=12, dev_problems=4,
        eval_every=0, save_every=2, objective=None, optim=None, rewards=rule_rewards, shape=no_shaping, seed=5,
        source=Shuffled, limits=None, dynamic_rounds=0, budget=None, train_old_segments=True, with_reference=False,
        recompute_old=False, temperature=1.0, stop_repetition=None, wrap=lambda sampler: sampler, **changes,
    ):  # fmt: skip
        folder.mkdir(exist_ok=True, parents=True)
        model, tokenizer = load_model(model_folder, to_train=True), load_tokenizer(model_folder)
        optim = optim or OptimSettings(learning_rate=1e-3)
        policy = PolicyModel(model)
        learner = Learner(
            policy,
            torch.optim.AdamW(
                policy.parameters(), lr=optim.learning_rate, betas=optim.betas, weight_decay=optim.weight_decay
            ),
            objective or dapo(), optim, temperature,
            reference=PolicyModel(load_model(model_folder)) if with_reference else None, recompute_old=recompute_old,
        )  # fmt: skip
        sampling = SamplingSettings(temperature, max_tokens=max_tokens, stop_repetition=stop_repetition)
        collector = Collector(
            wrap(TransformersSampler(model, tokenizer)), tokenizer,
            source(tiny.problems("train", train_problems), seed), tiny.TASK, rewards,
            RolloutSettings(
                per_step, group, sampling, limits or constant(max_tokens), dynamic_rounds, budget, train_old_segments
            ),
            seed=seed, shape=shape,
        )  # fmt: skip
        train(
            learner, collector, DevSet(tiny.problems("dev", dev_problems), tiny.TASK, sampling), tokenizer,
            Schedule(steps, eval_every, save_every=save_every), folder, seed=seed, **changes,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def launch_two() -> Callable[..., tuple[list[int], list[str]]]:
    """`launch_two(script, *arguments, flags=(), seconds=200)`: two processes as a launcher starts them; exit
    codes and stderr."""
    import socket
    import subprocess
    import sys

    root = Path(__file__).resolve().parents[1]

    def launch(
        script: str, *arguments: object, flags: tuple[str, ...] = (), seconds: float = 200
    ) -> tuple[list[int], list[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(root)}
        processes = [
            subprocess.Popen(
                [sys.executable, *flags, script, *map(str, arguments)],
                env=os.environ | launched | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            errors = [process.communicate(timeout=seconds)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [process.returncode for process in processes], errors

    return launch
