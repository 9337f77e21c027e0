r"""Translates RLinf's configuration of a run in EVAC into a command of launch.py.

    python -m evac_jax.tools.hub.from_rlinf libero_spatial_evac_grpo_openvlaoft.yaml \
        algorithm.group_size=4 algorithm.num_group_envs=16
    ... COMPOSED.yaml --weights weights

The file is composed by hydra as RLinf does it, from the folder where it lies, with Hydra's
overrides behind it; a file that is composed already is read as it is. Every key is listed: what it
is here, or why it has no meaning, or what is different. A key that is not known, or a value that is
not supported, makes the exit status 1. A value that RLinf could not read is refused, and so is a
file whose command launch.py would refuse. See docs/from_rlinf.md.
"""

import contextlib
import functools
import os
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evac_jax.config.flags import read_config, read_preset
from evac_jax.errors import ConfigError, nearest
from evac_jax.tools.command_line import Parser, run_tool
from evac_jax.tools.hub import rlinf_kinds
from evac_jax.tools.hub.launch_command import flags_of, launch_command
from evac_jax.tools.hub.rlinf_keys import ROWS
from evac_jax.tools.hub.rlinf_row import ANY, DIFFERENT, MAPPED, NO_MEANING, UNSUPPORTED, Row, To
from evac_jax.tools.hub.rlinf_values import PLACEMENT, WEIGHTS

HYDRA = "hydra-core==1.3.2"
UNKNOWN = "unknown"
PRESETS: dict[object, str] = {
    "grpo": "configs/grpo.py:libero_spatial",
    "gae": "configs/ppo.py:libero_spatial",
}
TOP = ("cluster", "runner", "algorithm", "env", "rollout", "actor")  # keys of every run's file
WHOLE = (PLACEMENT,)  # mappings that are one value
# Where RLinf's scripts point it, if the file lies in a folder of this name.
VARIABLE, FOLDER = "EMBODIED_PATH", "config"
SECTIONS = {
    UNSUPPORTED: "the command has the preset's value instead",
    UNKNOWN: "no such key in RLinf's EVAC configuration (c9f1d8471)",
    DIFFERENT: "not the same in RLinf and here",
    MAPPED: "the same here",
    NO_MEANING: "needs nothing here",
}


class Line(NamedTuple):
    """What became of a key.

    Attributes:
        verdict: a key of `SECTIONS`.
        key: dotted path in RLinf's file.
        value: there.
        fields: of our configuration that it sets.
        reason: why.
    """

    verdict: str
    key: str
    value: Any
    fields: dict[str, Any]
    reason: str


def compose(file: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the values of a file, nested, as RLinf would see them.

    Raises:
        ConfigError: hydra is not installed, there is no such file, or it cannot be composed.
    """
    try:
        import hydra
        from hydra.errors import HydraException
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError
    except ImportError as error:
        raise ConfigError(
            f"RLinf's files are composed by hydra, which cannot be imported ({error}); install it "
            f"with: {sys.executable} -m pip install {HYDRA}"
        ) from error
    if not file.is_file():
        what = f"{str(file)!r} is a folder" if file.is_dir() else f"no file {str(file)!r}"
        raise ConfigError(f"{what}; expected RLinf's .yaml file of a run")
    if file.suffix != ".yaml":
        raise ConfigError(f"expected a .yaml file, got {str(file)!r}")
    file = file.absolute()
    # RLinf's own resolvers.
    for name, function in {
        "multiply": lambda x, y: x * y,
        "int_div": lambda x, y: x // y,
        "subtract": lambda x, y: x - y,
        "not": lambda x: not x,
    }.items():
        OmegaConf.register_new_resolver(name, function, replace=True)
    try:
        with (
            warnings.catch_warnings(),
            _variable_of(file.parent),
            hydra.initialize_config_dir(str(file.parent), version_base="1.1"),
        ):
            # RLinf's files are of this kind; version_base says how they are meant.
            warnings.filterwarnings("ignore", ".*Defaults list is missing `_self_`")
            config = hydra.compose(file.stem, overrides=list(overrides))
            values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{file} cannot be composed: {_message(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{file} cannot be composed: a value of it holds itself") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file}, or a file that it includes: expected UTF-8 text ({error}); save it as UTF-8"
        ) from error
    return {str(key): value for key, value in dict(values).items()}


def _message(error: BaseException | None) -> str:
    """Return what an error says; hydra's own may leave it to the one that caused it."""
    while error is not None:
        if str(error):
            return str(error)
        error = error.__cause__ or error.__context__
    return "without a message"


@contextlib.contextmanager
def _variable_of(folder: Path) -> Iterator[None]:
    """Point RLinf's search path to `folder`, as its scripts do, unless the user does."""
    own = VARIABLE not in os.environ and folder.name == FOLDER
    if own:
        os.environ[VARIABLE] = str(folder.parent)
    try:
        yield
    finally:
        if own:
            del os.environ[VARIABLE]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {dotted path: value}; lists, empty mappings and those of `WHOLE` are one value."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and path not in WHOLE:
            result |= flat(value, f"{path}.")
        else:
            result[path] = value
    return result


def translate(values: Mapping[str, Any], weights: str) -> list[Line]:
    """Return what becomes of every key, in the order of the file; then of those that are missing.

    Args:
        values: {dotted path: value}.
        weights: folder with what was imported.

    Raises:
        ConfigError: it is no run of RLinf's, a value cannot be read, or the file names no algorithm
            that is known here.
    """
    found = list(dict.fromkeys(key.partition(".")[0] for key in values))
    if missing := [key for key in TOP if key not in found]:
        raise ConfigError(
            "this is no configuration of an RLinf run in a simulator: expected the top-level keys "
            f"{', '.join(TOP)}; got {', '.join(found) or 'none'}; missing {', '.join(missing)}"
        )
    inner = [key for key in values if any(name.startswith(f"{key}.") for name in ROWS)]
    mistakes = [
        f"{key}: expected a section, got {values[key]!r}" for key in inner if key not in ROWS
    ]
    if mistakes := mistakes + rlinf_kinds.mistakes(values):
        raise ConfigError(
            "these are no values of RLinf's keys; change them in its file, or by an override:\n"
            + "\n".join(f"  {mistake}" for mistake in mistakes)
        )
    known = {**values, WEIGHTS: weights}
    lines = []
    for key, value in values.items():
        if key in ROWS:
            lines.append(_line(key, value, ROWS[key], known))
        else:
            lines.append(Line(UNKNOWN, key, value, {}, nearest(key, ROWS).strip() or "not known"))
    for key, row in ROWS.items():
        if key not in values and row.absent is not ANY:
            line = _line(key, row.absent, row, known)
            lines.append(line._replace(reason=f"{line.reason}; not in the file, RLinf's default"))
    # GRPO has no fields of the critic.
    usual = _preset(values.get("algorithm.adv_type"))[1]
    return [
        line._replace(fields={name: v for name, v in line.fields.items() if name in usual})
        for line in lines
    ]


@functools.cache
def _preset(algorithm: object) -> tuple[str, dict[str, Any]]:
    """Return the preset of RLinf's algorithm, and its values.

    Raises:
        ConfigError: it is not known here.
    """
    if algorithm not in PRESETS:
        raise ConfigError(f"algorithm.adv_type: expected one of {[*PRESETS]}, got {algorithm!r}")
    preset = PRESETS[algorithm]
    return preset, flat(read_preset(preset).to_dict())


def _line(key: str, value: Any, row: Row, values: Mapping[str, Any]) -> Line:
    if row.only is not ANY and value not in row.only:
        expected = " or ".join(map(repr, row.only))
        return Line(UNSUPPORTED, key, value, {}, f"expected {expected}: {row.reason}")
    try:
        fields = row.convert(value, values)
        if why := rlinf_kinds.refused(fields):
            raise ValueError(why)
        return Line(row.verdict, key, value, fields, row.reason)
    except KeyError as error:
        return Line(UNSUPPORTED, key, value, {}, f"needs {error.args[0]} too, which is missing")
    except (ValueError, TypeError, ZeroDivisionError) as error:
        return Line(UNSUPPORTED, key, value, {}, f"{error} ({row.reason})")


def command_of(lines: Sequence[Line]) -> str:
    """Return the command: a preset, and a flag for every field in which the file differs from it.

    Raises:
        ConfigError: the file names no algorithm that is known here, or launch.py would refuse the
            command, whatever files there are.
    """
    algorithm = {line.key: line.value for line in lines}.get("algorithm.adv_type")
    preset, usual = _preset(algorithm)
    fields: dict[str, Any] = {}
    for line in lines:
        fields |= line.fields
    changed = {name: value for name, value in fields.items() if value != usual[name]}
    try:
        read_config(preset, flags_of(changed))
    except ConfigError as error:
        keys = "\n".join(_keys_named(str(error), lines))
        raise ConfigError(
            f"launch.py would refuse the command: {error}\nfrom these keys:\n{keys}"
        ) from error
    return launch_command(preset, changed)


def _keys_named(text: str, lines: Sequence[Line]) -> list[str]:
    """Return the keys behind the fields that a text names, also those that the file lacks."""

    def named(fields: Iterable[str]) -> bool:
        return any(re.search(rf"\b{re.escape(field)}\b", text) for field in fields)

    keys = [f"  {line.key} = {line.value!r}" for line in lines if named(line.fields)]
    given = {line.key for line in lines}
    return keys + [
        f"  {key}, which is not in the file"
        for key, row in ROWS.items()
        if key not in given and isinstance(row.convert, To) and named([row.convert.field])
    ]


def report(lines: Sequence[Line]) -> str:
    """Return the table: a section for every verdict, in it keys with the same reason together."""
    text = []
    for verdict, meaning in SECTIONS.items():
        by_reason: dict[str, list[Line]] = defaultdict(list)
        for line in lines:
            if line.verdict == verdict:
                by_reason[line.reason].append(line)
        count = sum(map(len, by_reason.values()))
        if count:
            text += ["", f"{verdict} ({count}): {meaning}"]
        for reason, same in by_reason.items():
            text.append(f"  {reason}")
            text += [f"    {line.key} = {line.value!r}{_arrow(line.fields)}" for line in same]
    return "\n".join(text[1:])


def _arrow(fields: Mapping[str, Any]) -> str:
    named = ", ".join(f"{name} = {value!r}" for name, value in fields.items())
    return f"  ->  {named}" if named else ""


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser("hub.from_rlinf", __doc__)
    add = parser.add_argument
    add("config", type=Path, help="RLinf's YAML file")
    add("overrides", nargs="*", default=(), help="Hydra's, such as algorithm.group_size=8")
    add("--weights", default="weights", help="folder with world_model, reward and pose_model")
    add(
        "--allow_unknown",
        action="store_true",
        help="exit status 0 in spite of unknown keys and values that are not supported",
    )
    args = parser.parse_args(argv)
    lines = translate(flat(compose(args.config, args.overrides)), args.weights)
    sys.stdout.write(f"{report(lines)}\n")
    sys.stdout.write(f"\nThe command:\n\n{command_of(lines)}\n")
    bad = [line.key for line in lines if line.verdict in (UNKNOWN, UNSUPPORTED)]
    if bad and not args.allow_unknown:
        sys.stderr.write(
            "\nThe command is not the same run; unknown or not supported: "
            f"{', '.join(bad)}. --allow_unknown accepts that\n"
        )
        sys.exit(1)


if __name__ == "__main__":
    run_tool(main)
