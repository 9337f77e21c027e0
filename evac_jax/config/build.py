"""Builds a checked `TrainConfig` from nested mappings, and renders one as such.

Every problem is collected before anything is raised, so that one message holds them all.
"""

import dataclasses
import importlib
import types
import typing
from typing import Any

from algos import ALGORITHMS
from evac_jax.config.checks import validate
from evac_jax.config.schema import TrainConfig
from evac_jax.errors import ConfigError, nearest


def algorithm_config(name: str) -> type:
    """Return the configuration class of an algorithm.

    Raises:
        ConfigError: no such algorithm.
    """
    if name not in ALGORITHMS:
        raise ConfigError(f"algorithm must be one of {sorted(ALGORITHMS)}, got {name!r}")
    return importlib.import_module(ALGORITHMS[name]).Config


def default_config(algorithm: str) -> TrainConfig:
    """Return the configuration with every field at its default."""
    return TrainConfig(algorithm=algorithm, algo=algorithm_config(algorithm)())


def _convert(value: Any, hint: Any, path: str, problems: list[str]) -> Any:
    """Return `value` as the type `hint`, or note why it cannot be."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        hint = next(arg for arg in args if arg is not type(None))
        return _convert(value, hint, path, problems)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            problems.append(f"config.{path}: expected a tuple, got {value!r}")
            return value
        if args[-1] is not Ellipsis and len(value) != len(args):
            problems.append(f"config.{path}: expected {len(args)} entries, got {value!r}")
            return value
        hints = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(_convert(v, h, path, problems) for v, h in zip(value, hints, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        return value
    problems.append(f"config.{path}: expected {hint.__name__}, got {value!r}")
    return value


def _build(cls: type, values: Any, path: str, problems: list[str]) -> Any:
    """Return a dataclass from a mapping, noting unknown keys and wrong types."""
    if not hasattr(values, "items"):
        problems.append(f"config.{path.rstrip('.')}: expected a section, got {values!r}")
        return cls()
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            problems.append(f"config.{path}{key}: unknown field.{nearest(key, hints)}")
        elif dataclasses.is_dataclass(hints[key]):
            arguments[key] = _build(hints[key], value, f"{path}{key}.", problems)
        else:
            arguments[key] = _convert(value, hints[key], f"{path}{key}", problems)
    return cls(**arguments)


def from_config_dict(values: dict[str, Any]) -> TrainConfig:
    """Build and validate a configuration from nested mappings (a ConfigDict's `to_dict()`).

    Raises:
        ConfigError: unknown fields, wrong types and impossible combinations, all in one message.
    """
    values = dict(values)
    algorithm = values.pop("algorithm", "grpo")
    problems: list[str] = []
    algo = _build(algorithm_config(algorithm), values.pop("algo", {}), "algo.", problems)
    hints = typing.get_type_hints(TrainConfig)
    sections: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            problems.append(f"config.{key}: unknown field.{nearest(key, hints)}")
        elif dataclasses.is_dataclass(hints[key]):
            sections[key] = _build(hints[key], value, f"{key}.", problems)
        else:
            sections[key] = _convert(value, hints[key], key, problems)
    if not problems:
        config = TrainConfig(algorithm=algorithm, algo=algo, **sections)
        problems = validate(config)
        if not problems:
            return config
    raise ConfigError(_message(problems))


def _message(problems: list[str]) -> str:
    count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
    return f"the configuration has {count}:\n" + "\n".join(f"  {p}" for p in problems)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return nested plain values; `from_config_dict(to_dict(config)) == config`."""
    return dataclasses.asdict(config)
