"""The fields of the configuration that are paths."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evac_jax.config import hub
from evac_jax.config.schema import TrainConfig

RUN_PATHS = ("log.dir", "checkpoint.dir", "checkpoint.restore", "video.dir")
INPUT_PATHS = (
    *("policy.checkpoint", "policy.lora_adapter", "world_model.checkpoint", "reward.checkpoint"),
    *("env.initial_states_path", "env.keyframe_data", "env.pose_model", "collect.out"),
    *("libero.root", "libero.states", "libero.python", "cluster.compilation_cache"),
)
WORLD = "world"  # never downloaded as a whole: its parts are, under the names above
# What these fields say that is no path.
WORDS = ("", "auto", "latest")


def with_home(config: TrainConfig) -> TrainConfig:
    """Return a configuration with ~ in its paths replaced by the user's folder."""

    def at_home(_: str, text: str) -> str:
        return text if hub.is_address(text) else str(Path(text).expanduser())

    return changed(config, (*RUN_PATHS, *INPUT_PATHS, WORLD), at_home)


def with_absolute(config: TrainConfig, names: tuple[str, ...]) -> TrainConfig:
    """Return a configuration whose paths `names` mean the same in every folder and on every host.

    Args:
        names: of `RUN_PATHS` and `INPUT_PATHS`, or `WORLD`.
    """
    return changed(config, names, lambda _, text: hub.absolute(text))


def changed(
    config: TrainConfig, names: tuple[str, ...], change: Callable[[str, str], str]
) -> TrainConfig:
    """Return a configuration whose paths `names` are what `change` makes of (name, path)."""
    sections: dict[str, Any] = {}
    for name in names:
        section, _, field = name.rpartition(".")
        part = sections.get(section, getattr(config, section) if section else config)
        value = getattr(part, field)
        # Several classifiers are joined by commas.
        paths = value.split(",") if name == "reward.checkpoint" else [value]
        value = ",".join(path if path in WORDS else change(name, path) for path in paths)
        if section:
            sections[section] = dataclasses.replace(part, **{field: value})
        else:
            sections[field] = value
    return dataclasses.replace(config, **sections)
