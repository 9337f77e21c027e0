"""Runs of launch.py and of tools that a benchmark keeps, so that it goes on where it stopped.

They are found again by their settings and by the hashes of the weights that they begin with.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evac_jax.config.flags import read_preset
from evac_jax.files.atomic import replacing
from evac_jax.telemetry.report import EVALUATION_FILE

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ("policy.checkpoint", "world_model.checkpoint", "reward.checkpoint", "env.pose_model")
STARTS = "env.initial_states_path"  # counts where it names a folder
GROUND_TRUTH = {"env.simulator": "ground_truth", "eval.episodes": 0, "eval.twin_fraction": 0.0}
MINUTES = "minutes.json"  # in the folder of a run that is finished


class Runs:
    """Runs commands and keeps their results.

    Args:
        work: folder of runs and evaluations.
        settings: {"section.field": value}, for every call of launch.py.
    """

    def __init__(self, work: Path, settings: Mapping[str, object]):
        self.work = work.absolute()
        self.work.mkdir(parents=True, exist_ok=True)
        # No videos and no evaluations in imagination, because no figure here needs them.
        self.settings = {"eval.episodes": 0, "video.save": False, "log.tensorboard": False}
        self.settings |= settings

    def key(self, preset: str, settings: Mapping[str, object], extra: object = None) -> str:
        """Return a short hash of everything that the outcome depends on, except the code.

        A world counts by what is in it, so that one that was moved or shipped is found again.
        """
        world = str(settings.get("world") or "")
        flags = [f"--config.world={world}"] if world else []
        config = read_preset(str(ROOT / preset), flags).to_dict()
        folders = {}
        for name in (*WEIGHTS, STARTS):
            section, field = name.split(".")
            named = str(settings.get(name, config[section][field]))
            if name == STARTS and not named:
                continue
            folders[name] = [
                (file.name, hashlib.sha256(file.read_bytes()).hexdigest())
                for folder in named.split(",")
                for file in sorted(Path(folder).glob("*"))
                if file.is_file() and file.name != "card.json"
            ]
        facts = json.dumps([preset, config, dict(settings), folders, extra], default=str)
        if world:
            facts = facts.replace(json.dumps(world)[1:-1], "{world}")
        return hashlib.sha256(facts.encode()).hexdigest()[:12]

    def call(self, name: str, command: Sequence[str]) -> float:
        """Run a command of this Python, whose output goes to `name`.log; return its seconds.

        A command that fails ends the benchmark with its last lines.
        """
        command = [sys.executable, *command]
        log, began = self.work / f"{name}.log", time.perf_counter()
        with log.open("w") as stream:
            done = subprocess.run(
                command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            sys.exit(f"{' '.join(command)}\nended with status {done.returncode}:\n{tail}")
        return time.perf_counter() - began

    def _launch(self, preset: str, settings: Mapping[str, object], name: str, *flags: str) -> float:
        settings = dict(settings) | {"log.dir": self.work, "log.run": name}
        command = ["launch.py", f"--config={preset}", *flags]
        command += [f"--config.{field}={value}" for field, value in settings.items()]
        return self.call(name, command)

    def train(self, name: str, preset: str, changes: Mapping[str, object]) -> Path:
        """Return the folder of a finished run; an interrupted run starts again.

        Otherwise its minutes would not be comparable.

        Args:
            name: what its folder's name begins with.
            changes: settings of this run.
        """
        settings = self.settings | changes
        name = f"{name}-{self.key(preset, settings)}"
        folder = self.work / name
        if not (folder / MINUTES).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            seconds = self._launch(preset, settings, name)
            with replacing(folder / MINUTES) as temporary:
                temporary.write_text(json.dumps({"minutes": seconds / 60}))
        return folder

    def minutes(self, run: Path) -> float:
        """Return the minutes of the whole command of a finished run."""
        return json.loads((run / MINUTES).read_text())["minutes"]

    def evaluate(
        self, preset: str, changes: Mapping[str, object], run: Path | None, iteration: int
    ) -> dict[str, Any]:
        """Return what an evaluation of a policy in the ground truth told.

        Args:
            changes: settings of this evaluation.
            run, iteration: whose policy it is; iteration 0 = the start policy.
        """
        settings = self.settings | GROUND_TRUTH | changes
        whose = [run.name, iteration] if run is not None and iteration else None
        key = self.key(preset, settings, whose)
        if whose:
            settings |= {"checkpoint.restore": run, "checkpoint.step": iteration}
        found = self.work / f"eval-{key}" / EVALUATION_FILE
        if not found.is_file():
            self._launch(preset, settings, f"eval-{key}", "--mode=eval")
        return json.loads(found.read_text())
