"""How a run was started, and started again: `launches.jsonl` in its folder, one line per process.

A line holds "began" (time with its zone), "iteration" (finished ones that it went on from),
"command" (arguments), "folder" (where it was given), "preset" ("" = not known) and "changed":
settings that differ from the preset in the run's world, each with both values; "judged_by" ({name:
value}): settings on which the success of an evaluation depends.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from evac_jax.config import commands
from evac_jax.config.flags import load_preset, preset_file, read_preset
from evac_jax.config.libero import PROTOCOL
from evac_jax.config.presets import differences
from evac_jax.errors import ConfigError, DataError

LAUNCHES_FILE = "launches.jsonl"
# Beside the policy's weights; sections are named without a field.
JUDGED_BY = (
    *("seed", "env.simulator", "env.initial_states", "env.initial_states_path"),
    *("env.max_episode_steps", "env.gripper", "env.pose_model", "simulator.dtype"),
    *("world_model.checkpoint", "world_model.steps", "world_model.eta", "world_model.solver"),
    *("world_model.reference_compat", "policy.unnorm_key", "policy.keep_stop_token"),
    *("policy.eval_temperature", "policy.top_k"),
    *("reward.judge", "reward.checkpoint", "reward.veto", "reward.threshold", "reward.vlm"),
    *("reward.success_frames", "reward.judged_frames", "eval.episodes", "eval.starts"),
    *("eval.ground_truth", "eval.ground_truth_starts", "eval.ground_truth_episodes"),
    *(f"libero.{name}" for name in ("suite", *PROTOCOL)),
)
ROOT = Path(__file__).parents[2]  # a host that Ray chose has no presets in its own folder


def record(folder: Path, config: Mapping[str, Any], finished: int, *, resumed: bool) -> None:
    """Add this process to a run's launches; one that begins the run anew replaces them.

    Args:
        folder: the run's own.
        config: its whole configuration, nested plain values.
        finished: iterations that it goes on from.
        resumed: whether it goes on with the run.
    """
    command = commands.given()
    preset, changed = _origin(preset_file(command), config)
    line = {
        "began": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "iteration": finished,
        "command": command,
        "folder": str(Path.cwd()),
        "preset": preset,
        "changed": changed,
        "judged_by": {name: _value(config, name) for name in JUDGED_BY},
    }
    with (folder / LAUNCHES_FILE).open("a" if resumed else "w") as file:
        file.write(f"{json.dumps(line)}\n")


def _value(config: Mapping[str, Any], name: str) -> Any:
    for part in name.split("."):
        config = config.get(part, {})
    return config


def _origin(file: str, config: Mapping[str, Any]) -> tuple[str, dict[str, list[Any]]]:
    """Return the preset of `--config`, and the settings that differ from it."""
    path, colon, name = file.partition(":")
    for place in (Path(path), ROOT / path):
        if place.is_file():
            try:
                return file, _changed(f"{place}{colon}{name}", config)
            except (ConfigError, DataError) as error:
                logging.warning("%s: settings are not compared with the preset: %s", file, error)
                break
    return "", {}


def _changed(preset: str, config: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return what differs from a preset; of what another world fills in, only that world."""
    own = load_preset(preset).world
    here = read_preset(preset, [f"--config.world={config['world']}"] * bool(config["world"]))
    return differences(here.to_dict() | {"world": own}, config)
