"""Reads presets and `--config.a.b=value` flags, for launch.py and for tools.

ml_collections stops at the first mistake. This module reports all mistakes at once, each with the
nearest valid name. ml_collections does the rest (types, tuples, locking).
"""

import ast
import dataclasses
import importlib.util
import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import config_dict, config_flags

from evac_jax.config import addresses, world
from evac_jax.config.build import from_config_dict
from evac_jax.config.fields import with_home
from evac_jax.config.schema import TrainConfig
from evac_jax.errors import ConfigError, EvacJaxError, nearest

DEFAULT_PRESET = "configs/grpo.py"
# Fields that name files of the user, which need not exist where a configuration is only read.
PATHS = (
    *("policy.checkpoint", "policy.lora_adapter", "world_model.checkpoint", "reward.checkpoint"),
    *("env.pose_model", "env.initial_states_path", "env.keyframe_data"),
)
EXISTING = os.devnull  # it exists, and holds no config.json that could be compared
# Type of a field -> what reads its value; it raises ValueError.
READERS = {int: int, float: float, bool: flags.BooleanParser().parse}


def _flatten(config: config_dict.ConfigDict, prefix: str = "") -> dict[str, type | None]:
    """Return {"section.field": type}."""
    names: dict[str, type | None] = {}
    for key in config:
        value: Any = config[key]
        if isinstance(value, config_dict.ConfigDict):
            names |= _flatten(value, f"{prefix}{key}.")
        else:
            names[prefix + key] = config.get_type(key)
    return names


def _module(path: str) -> ModuleType:
    """Run a preset file."""
    if not Path(path).is_file():
        presets = Path(__file__).parents[2] / DEFAULT_PRESET
        there = DEFAULT_PRESET if Path(DEFAULT_PRESET).is_file() else presets
        raise ConfigError(f"--config: no file {path!r}; try --config={there}")
    spec = importlib.util.spec_from_file_location("evac_jax_preset", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config: expected a Python file, got {path!r}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except EvacJaxError:
        raise
    except Exception as error:  # whatever a preset of the user's own does
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == spec.origin]
        line = f", line {lines[-1]}" if lines else ""  # a SyntaxError names its own
        raise ConfigError(f"--config: {path}{line}: {type(error).__name__}: {error}") from error
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config: {path!r} has no get_config(preset)")
    return module


def resolved(flag: Any) -> config_dict.ConfigDict:
    """Return a parsed flag's configuration; a world that a flag names fills what no flag gave.

    Raises:
        ConfigError: the world cannot be read.
    """
    config, given = flag.value, config_flags.get_override_values(flag)
    if given.get("world"):
        world.fill(config, given)
    return config


def preset_names(path: str) -> list[str]:
    """Return the presets of a file in the order of the file, [] if it does not list them.

    Raises:
        ConfigError: there is no such file, or it gives no configuration.
    """
    return list(getattr(_module(path), "PRESETS", ()))


def load_preset(file: str) -> config_dict.ConfigDict:
    """Return `get_config(preset)` of "path.py" or "path.py:preset".

    Raises:
        ConfigError: there is no such file, or it gives no configuration.
    """
    path, _, preset = file.partition(":")
    module = _module(path)
    return module.get_config(preset) if preset else module.get_config()


def read_preset(file: str, overrides: Sequence[str] = ()) -> config_dict.ConfigDict:
    """Return a preset changed by `--config.a.b=value` flags, read as launch.py reads them.

    Raises:
        ConfigError: no such preset, unknown fields, values that cannot be read, or no such world.
    """
    check_flags([f"--config={file}", *overrides])
    known, argv = flags.FlagValues(), ["", *overrides]
    try:
        # The declaration of the flag reads names from `argv`, so it can fail as the parser can.
        config_flags.DEFINE_config_dict(
            "config", load_preset(file), flag_values=known, sys_argv=argv
        )
        rest = known(argv)[1:]
    except flags.Error as error:
        raise ConfigError(f"these overrides cannot be used: {error}") from error
    if rest:
        raise ConfigError(f"these overrides cannot be used: unexpected {rest}")
    return resolved(known["config"])


def read_config(file: str, flags: Sequence[str] = ()) -> TrainConfig:
    """Return a preset changed by `--config.a.b=value` flags, checked except for the named files.

    Raises:
        ConfigError: unknown fields, wrong values, impossible combinations.
    """
    values = read_preset(file, flags).to_dict()
    given = {}
    for name in PATHS:
        section, field = name.split(".")
        path = given[section, field] = values[section][field]
        if path or name not in ("policy.lora_adapter", "env.keyframe_data"):
            values[section][field] = ",".join(EXISTING for _ in str(path).split(","))
    config = from_config_dict(values)
    for (section, field), path in given.items():
        part = dataclasses.replace(getattr(config, section), **{field: path})
        config = dataclasses.replace(config, **{section: part})
    if problems := addresses.problems(config):
        raise ConfigError("\n".join(problems))
    return config


def _problem(
    flag: str, given: str | None, follows: str | None, valid: dict[str, type | None]
) -> str | None:
    """What is wrong with "--config.a.b" or "--noconfig.a.b", or None.

    Args:
        given: what stands behind its "=", None if there is none.
        follows: the next argument, the value of a flag without "=" unless it is a bool's.
    """
    switch, _, field = flag.partition(".")
    name, bracket, _ = field.partition("[")
    if name not in valid:
        leaf = {field.rsplit(".", 1)[-1]: field for field in valid}
        by_leaf = leaf.get(name.rsplit(".", 1)[-1])
        hint = f" Did you mean {by_leaf!r}?" if by_leaf else nearest(name, valid)
        return f"{switch}.{name}: unknown field.{hint}"
    if bracket:  # ml_collections takes this as an entry of a list and fails
        return f'{flag}: expected the whole value, as --config.{name}="(A, B)"'
    kind = valid[name]
    if switch == "--noconfig" and (kind is not bool or given is not None):
        return f"{flag}: sets a bool to False and takes no value; use --config.{name}=VALUE"
    value = follows if given is None and kind is not bool else given
    if value and kind is tuple and value.startswith(("(", "[")):
        try:
            ast.literal_eval(value)
        except (ValueError, SyntaxError):
            words = [word.strip(" \"'") for word in value.strip("()[] ").split(",")]
            quoted = "".join(f'"{word}",' for word in words if word)
            return (
                f"--config.{name}: in {value!r} text needs quotes, as --config.{name}='({quoted})'"
            )
    if value is not None and kind is not None and kind in READERS:
        try:
            READERS[kind](value)
        except ValueError:
            return f"--config.{name}: expected {kind.__name__}, got {value!r}"
    return None


def preset_file(argv: Sequence[str]) -> str:
    """Return the value of `--config` in a command line; the default preset if it is absent."""
    file = DEFAULT_PRESET
    for index, argument in enumerate(argv):
        flag, has_value, value = argument.partition("=")
        if f"--{flag.lstrip('-')}" == "--config":
            file = value if has_value else "".join(argv[index + 1 : index + 2])
    return file


def arguments(argv: Sequence[str]) -> list[str]:
    """Return the arguments of a command line, those in a `--flagfile` included; "~/" is replaced.

    Raises:
        ConfigError: such a file cannot be read.
    """
    try:
        found = flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False)
    except flags.Error as error:
        raise ConfigError(f"--flagfile: {error}") from error
    return [with_home(argument) for argument in found]


def parse(argv: Sequence[str]) -> list[str]:
    """Parse absl's flags in the place of absl's own parser, which ends with status 1.

    Returns:
        What is no flag; the program's name is first, as in `argv`.

    Raises:
        ConfigError: a flag is unknown, or its value cannot be read.
    """
    try:
        return flags.FLAGS(argv)
    except (flags.Error, ValueError) as error:  # a plain ValueError for "--nomode=value"
        raise ConfigError(f"the command line cannot be used: {error}") from error


def check_flags(argv: Sequence[str]) -> None:
    """Raise one ConfigError that lists every bad `--config.` and `--noconfig.` flag of `argv`."""
    overrides = []
    for index, argument in enumerate(argv):
        flag, has_value, value = argument.partition("=")
        flag = "--" + flag.lstrip("-")
        if flag.startswith(("--config.", "--noconfig.")):
            follows = argv[index + 1] if index + 1 < len(argv) else None
            overrides.append((flag, value if has_value else None, follows))
    valid = _flatten(load_preset(preset_file(argv)))
    problems = [p for override in overrides if (p := _problem(*override, valid))]
    if problems:
        raise ConfigError("these overrides cannot be used:\n  " + "\n  ".join(problems))
