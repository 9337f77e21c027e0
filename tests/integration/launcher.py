"""Starts `launch.py` as a user does, on random weights of the smallest sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import xla_flags

TWO_SIMULATORS = ("--config.simulator.processes=2",)  # one is the default here, as it starts sooner


class Launcher:
    """Starts launch.py on tiny weights; tests/conftest.py lets runs share compiled programs."""

    def __init__(self, repository: Path, weights: Path, folder: Path):
        self._repository, self.runs = repository, folder / "runs"
        self._environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
        }
        settings = {
            "policy.checkpoint": weights / "policy",
            "world_model.checkpoint": weights / "world_model",
            "reward.checkpoint": weights / "reward",
            "env.pose_model": weights / "pose_model",
            "world_model.steps": 1,
            "simulator.processes": 1,
            "env.num_envs": 8,
            "env.max_episode_steps": 16,
            "algo.group_size": 4,
            "algo.global_batch": 8,
            "algo.micro_batch": 8,
            "algo.entropy_bonus": 0.01,  # learns even where all episodes of a group end alike
            "eval.episodes": 4,
            "eval.ground_truth_episodes": 8,
            "eval.ground_truth_envs": 8,
            "eval.twin_fraction": 0.5,
            "eval.interval": 0,
            "video.save": False,
            "video.episodes": 1,
            "checkpoint.interval": 100,  # the last iteration is saved always
            "log.dir": self.runs,
        }
        self._flags = [f"--config.{name}={value}" for name, value in settings.items()]

    def start(
        self,
        *flags: str,
        config: str = "configs/grpo.py",
        devices: int = 2,
        cwd: Path | None = None,
    ):
        """Start a run, from another folder than the repository if `cwd` says so."""
        root = self._repository if cwd else Path()
        command = [sys.executable, str(root / "launch.py"), f"--config={root / config}"]
        return self.again([*command, *self._flags, *flags], devices, cwd)

    def again(self, command: list[str], devices: int = 2, cwd: Path | None = None):
        return subprocess.Popen(
            command,
            cwd=cwd or self._repository,
            env=self._environment | {"XLA_FLAGS": xla_flags(devices)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *flags: str, status: int = 0, **how) -> str:
        return self.finish(self.start(*flags, **how), status)

    def finish(self, process, status: int = 0) -> str:
        output = process.communicate(timeout=600)[0]
        assert process.returncode == status, output
        return output

    def metrics(self, run: str) -> dict[int, dict[str, float]]:
        lines = (self.runs / run / "metrics.jsonl").read_text().splitlines()
        return {line["iteration"]: line for line in map(json.loads, lines)}

    def assert_same(self, run: str, other: str, iterations, ignored=(), **tolerance) -> None:
        """Every metric of both runs is the same, but for clocks, compilations and `ignored`."""
        one, two = self.metrics(run), self.metrics(other)
        ignored = ("time/", "log/compilations", *ignored)
        for iteration in iterations:
            names = {name for name in one[iteration] if not name.startswith(ignored)}
            assert names
            for name in names:
                expected = pytest.approx(one[iteration][name], **tolerance)
                assert two[iteration][name] == expected, (iteration, name)
