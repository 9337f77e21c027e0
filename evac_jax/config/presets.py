"""Converts the dataclass defaults to a ConfigDict and applies a preset to it.

A preset only overrides values; fields, meanings and ranges are in `evac_jax/config/schema.py`.
"""

import dataclasses

from ml_collections import config_dict

from evac_jax.config import world
from evac_jax.config.build import default_config
from evac_jax.config.fields import Kind, hints
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
    if config.world:
        world.fill(config)
    return config
