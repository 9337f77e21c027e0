"""The algorithm that a configuration names: one of ours, or the user's own."""

import dataclasses
import importlib
from typing import Any

from algos import ALGORITHMS
from evac_jax.config import import_string
from evac_jax.errors import ConfigError, nearest


def load_algorithm(name: str) -> Any:
    """Return the module of an algorithm, or the object that an import string names.

    Args:
        name: a key of `ALGORITHMS`, or "module:attribute".

    Raises:
        ConfigError: there is no such algorithm, or it lacks something that the trainer needs.
    """
    if name in ALGORITHMS:
        return importlib.import_module(ALGORITHMS[name])
    if not import_string.is_one(name):
        raise ConfigError(
            f"config.algorithm: expected one of {tuple(ALGORITHMS)} or '{import_string.FORM}', got "
            f"{name!r}.{nearest(name, ALGORITHMS)}"
        )
    try:
        found = import_string.load(name, needs=import_string.ALGORITHM)
    except ConfigError as error:
        raise ConfigError(f"config.algorithm: {error}") from error
    base = importlib.import_module("algos.policy_gradient").PolicyGradientConfig
    config = found.Config
    if not (isinstance(config, type) and issubclass(config, base) and _is_frozen(config)):
        raise ConfigError(
            f"config.algorithm: {name!r} has the Config {config!r}; expected a frozen dataclass "
            "that is derived from algos.policy_gradient.PolicyGradientConfig"
        )
    return found


def _is_frozen(cls: type) -> bool:
    return dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
