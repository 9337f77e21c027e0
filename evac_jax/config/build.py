"""Builds a checked `TrainConfig` from nested mappings, and converts it back.

All problems are collected first, so one error message lists all of them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from evac_jax.config import addresses
from evac_jax.config.algorithms import load_algorithm
from evac_jax.config.checks import validate
from evac_jax.config.fields import Kind, hints
from evac_jax.config.paths import with_home
from evac_jax.config.schema import TrainConfig
from evac_jax.errors import ConfigError, nearest


def default_config(algorithm: str) -> TrainConfig:
    """Return the configuration with every field at its default.

    Raises:
        ConfigError: no such algorithm.
    """
    return TrainConfig(algorithm=algorithm, algo=load_algorithm(algorithm).Config())


def _arguments(cls: type, values: Any, prefix: str, problems: list[str]) -> dict[str, Any]:
    """Return the arguments of a dataclass from a mapping; append what is wrong to `problems`."""
    if not hasattr(values, "items"):
        problems.append(f"config.{prefix.rstrip('.')}: expected a section, got {values!r}")
        return {}
    declared, arguments = hints(cls), {}
    for key, value in values.items():
        hint, path = declared.get(key), f"{prefix}{key}"
        if hint is None:
            problems.append(f"config.{path}: unknown field.{nearest(key, declared)}")
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            arguments[key] = hint(**_arguments(hint, value, f"{path}.", problems))
        else:
            arguments[key] = Kind.of(hint).convert(value, path, problems)
    return arguments


def from_config_dict(
    values: dict[str, Any], check: Callable[[TrainConfig], list[str]] = validate
) -> TrainConfig:
    """Build and validate a configuration from nested mappings (a ConfigDict's `to_dict()`).

    What paths name on the Hugging Face Hub (`addresses`) is downloaded as soon as all else is in
    order.

    Args:
        check: returns what is wrong with the configuration as a whole.

    Raises:
        ConfigError: unknown fields, wrong types, values out of range, missing files and impossible
            combinations, all in one message.
    """
    values = dict(values)
    problems: list[str] = []
    algorithm = str(values.pop("algorithm", "grpo"))
    cls = load_algorithm(algorithm).Config
    algo = cls(**_arguments(cls, values.pop("algo", {}), "algo.", problems))
    sections = _arguments(TrainConfig, values, "", problems)
    if not problems:
        config = with_home(TrainConfig(algorithm=algorithm, algo=algo, **sections))
        problems = check(config)
        if not problems and addresses.fields(config):
            config, problems = addresses.with_local(config)
            problems = problems or check(config)
        if not problems:
            return config
    raise ConfigError(_message(problems))


def _message(problems: list[str]) -> str:
    count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
    return f"the configuration has {count}:\n" + "\n".join(f"  {p}" for p in problems)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return nested plain values; `from_config_dict(to_dict(config)) == config`.

    What came from the Hugging Face Hub is named by its address there, with the commit.
    """
    return dataclasses.asdict(addresses.with_addresses(config))
