"""Addresses on the Hugging Face Hub (`hub`) in the place of a configuration's paths.

They are checked by their form with everything else, and replaced by paths once all else is in
order. What a run writes down has the address with its commit again.
"""

import dataclasses
from collections.abc import Callable

from evac_jax.config import hub
from evac_jax.config.paths import INPUT_PATHS, RUN_PATHS, changed
from evac_jax.config.schema import TrainConfig
from evac_jax.errors import DataError

# Those that are written to, or run.
OF_THIS_MACHINE = (*RUN_PATHS, "collect.out", "libero.python", "cluster.compilation_cache")
FROM_HUB = tuple(name for name in INPUT_PATHS if name not in OF_THIS_MACHINE)
MIX, POLICY = "collect.mix", "policy:"


def fields(config: TrainConfig) -> list[str]:
    """Return the names of all fields that hold an address."""
    found: list[str] = []

    def note(name: str, text: str) -> str:
        found.extend([name] * hub.is_address(text))
        return text

    _each(config, note)
    return found


def problems(config: TrainConfig) -> list[str]:
    """Return one line for every address without the form of one, or where none can be."""
    _, found = _tried(config, hub.parse)

    def refuse(name: str, text: str) -> str:
        if hub.is_address(text):
            found.append(f"config.{name}: expected a path of this machine, got {text!r}")
        return text

    changed(config, OF_THIS_MACHINE, refuse)
    return found


def with_local(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """Return a configuration with paths in the place of its addresses; downloads what is not here.

    Returns:
        The configuration, and one line for every address that cannot be had.
    """
    return _tried(config, hub.local)


def with_addresses(config: TrainConfig) -> TrainConfig:
    """Return a configuration with an address, commit included, for every path in the Hub's cache.

    So a run's files say where its weights came from, and hosts can compare them.
    """
    return _each(config, lambda _, text: hub.address_of(text))


def _tried(config: TrainConfig, change: Callable[[str], object]) -> tuple[TrainConfig, list[str]]:
    """Change every address; return one line for each that cannot be, which stays."""
    found: list[str] = []

    def tried(name: str, text: str) -> str:
        try:
            return str(change(text)) if hub.is_address(text) else text
        except DataError as error:
            found.append(f"config.{name}: {error}")
            return text

    return _each(config, tried), found


def _each(config: TrainConfig, change: Callable[[str, str], str]) -> TrainConfig:
    """Change every path that can be an address, also those in collect.mix."""
    config = changed(config, FROM_HUB, change)
    players = ",".join(_player(text, change) for text in config.collect.mix.split(","))
    return dataclasses.replace(config, collect=dataclasses.replace(config.collect, mix=players))


def _player(text: str, change: Callable[[str, str], str]) -> str:
    """Change the folder in "policy:FOLDER@TEMPERATURE=SHARE"; the last @ is the temperature's."""
    kind, equals, share = text.rpartition("=")
    if not kind.strip().startswith(POLICY):
        return text
    folder, at, temperature = kind.strip().removeprefix(POLICY).rpartition("@")
    if not at:
        folder, temperature = temperature, ""
    return f"{POLICY}{change(MIX, folder)}{at}{temperature}{equals}{share}"
