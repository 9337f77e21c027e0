"""Converts the dataclass defaults to a ConfigDict and applies a preset to it.

A preset only overrides values; fields, meanings and ranges are in `evac_jax/config/schema.py`.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from evac_jax.config import hub, world
from evac_jax.config.build import default_config
from evac_jax.config.fields import Kind, hints
from evac_jax.config.paths import INPUT_PATHS, RUN_PATHS, WORDS
from evac_jax.errors import ConfigError, nearest


def render(value) -> config_dict.ConfigDict:
    """Return a dataclass as a ConfigDict; optional fields that are None keep their type."""
    result = config_dict.ConfigDict()
    declared = hints(type(value))
    for field in dataclasses.fields(value):
        entry = getattr(value, field.name)
        if dataclasses.is_dataclass(entry):
            result[field.name] = render(entry)
            continue
        kind = Kind.of(declared[field.name])
        if kind.optional:
            result[field.name] = config_dict.placeholder(kind.type)
        result[field.name] = entry
    return result


def base(algorithm: str, preset: str, presets: dict) -> config_dict.ConfigDict:
    """Return the defaults of `algorithm` changed by the named preset, and by the world it names.

    Raises:
        ConfigError: no such preset, or its world cannot be read.
    """
    if preset not in presets:
        raise ConfigError(
            f"unknown preset {preset!r} for {algorithm}; there are {sorted(presets)}."
            f"{nearest(preset, presets)}"
        )
    config = render(default_config(algorithm))
    presets[preset](config)
    # One whose weights are still to be made is refused when a run is checked.
    if config.world and not world.absent(str(config.world)):
        world.fill(config)
    return config


def differences(
    preset: Mapping[str, Any], config: Mapping[str, Any], prefix: str = ""
) -> dict[str, list[Any]]:
    """Return {"section.field": [the preset's value, the configuration's]} where they differ.

    Tuples and lists are the same, and so are two spellings of one path. A field that only one of
    them has is None in the other.

    Args:
        preset, config: nested plain values, `to_dict()` of either.
    """
    found: dict[str, list[Any]] = {}
    for key in dict.fromkeys((*preset, *config)):
        name, one, other = f"{prefix}{key}", preset.get(key), config.get(key)
        if isinstance(one, Mapping) or isinstance(other, Mapping):
            found |= differences(one or {}, other or {}, f"{name}.")
        elif _plain(name, one) != _plain(name, other):
            found[name] = [one, other]
    return found


def _plain(name: str, value: Any) -> Any:
    """Return a value in the one form in which it is compared."""
    if isinstance(value, str) and name in RUN_PATHS + INPUT_PATHS:
        parts = value.split(",")  # several classifiers
        return [p if p in WORDS or hub.is_address(p) else _place(p) for p in parts]
    return json.loads(json.dumps(value))


def _place(path: str) -> str:
    return str(Path(path).expanduser().absolute())
