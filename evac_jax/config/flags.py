"""Checks `--config.a.b=value` flags against the preset before ml_collections sees them.

ml_collections stops at the first mistake; a user would rather read all of them at once, each with
the nearest valid name. Everything else about flags (types, tuples, locking) is ml_collections' own.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from ml_collections import config_dict

from evac_jax.errors import ConfigError, nearest


def _flatten(config: config_dict.ConfigDict, prefix: str = "") -> dict[str, type | None]:
    """Return {"section.field": type}."""
    names: dict[str, type | None] = {}
    for key in config:
        if isinstance(config[key], config_dict.ConfigDict):
            names |= _flatten(config[key], f"{prefix}{key}.")
        else:
            names[prefix + key] = config.get_type(key)
    return names


def load_preset(file: str) -> config_dict.ConfigDict:
    """Return `get_config(preset)` of "path.py" or "path.py:preset".

    Raises:
        ConfigError: no such file, or it cannot give a configuration.
    """
    path, _, preset = file.partition(":")
    if not Path(path).is_file():
        raise ConfigError(f"--config: no file {path!r}; try --config=configs/grpo.py")
    spec = importlib.util.spec_from_file_location("evac_jax_preset", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config: {path!r} has no get_config(preset)")
    return module.get_config(preset) if preset else module.get_config()


def _problem(name: str, value: str | None, valid: dict[str, type | None]) -> str | None:
    """What is wrong with one override, or None."""
    if name not in valid:
        leaf = {field.rsplit(".", 1)[-1]: field for field in valid}
        by_leaf = leaf.get(name.rsplit(".", 1)[-1])
        hint = f" Did you mean {by_leaf!r}?" if by_leaf else nearest(name, valid)
        return f"--config.{name}: unknown field.{hint}"
    kind = valid[name]
    if value is not None and kind in (int, float):
        try:
            kind(value)
        except ValueError:
            return f"--config.{name}: expected {kind.__name__}, got {value!r}"
    return None


def check_flags(argv: Sequence[str], default_file: str) -> None:
    """Raise one ConfigError that lists every bad `--config.` flag of `argv`."""
    file, overrides = default_file, []
    for index, argument in enumerate(argv):
        flag, has_value, value = argument.partition("=")
        flag = "--" + flag.lstrip("-")
        if flag == "--config":
            file = value if has_value else "".join(argv[index + 1 : index + 2])
        elif flag.startswith("--config."):
            # "--config.a.b[0]=x" sets one entry of a tuple; the field's name ends at the bracket.
            name = flag.removeprefix("--config.").split("[", 1)[0]
            follows = argv[index + 1] if index + 1 < len(argv) else None
            overrides.append((name, value if has_value else follows))
    valid = _flatten(load_preset(file))
    problems = [p for name, value in overrides if (p := _problem(name, value, valid))]
    if problems:
        raise ConfigError("these overrides cannot be used:\n  " + "\n  ".join(problems))
