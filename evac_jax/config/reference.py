"""Makes docs/config.md and the list of fields in `launch.py --help`.

    python -m evac_jax.config.reference > docs/config.md

Both are made from the types, defaults and docstrings of the dataclasses.
"""

import inspect
import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from algos import ALGORITHMS
from evac_jax.config import import_string
from evac_jax.config.build import default_config
from evac_jax.config.fields import Field, Kind, walk
from evac_jax.config.flags import load_preset, preset_file

HELP_FLAGS = ("help", "helpfull", "?")  # not --helpshort, which lists launch.py's own flags only
WIDTH = 80  # of --help, the same as in absl's own part

HEAD = """\
# Configuration

These are all fields of a run's configuration. Each is a flag, such as `--config.optim.lr=1e-5`; a
tuple is given whole, as in `--config.eval.starts="(0, 100)"`. The tables give the defaults of the
dataclasses; presets (`configs/`, [presets.md](presets.md)) override some. The command
`python launch.py --config=configs/ppo.py:lora --help` lists the fields with the values of a preset.

Values that are not allowed are refused before anything starts, with all problems in one message.
What depends on the sizes in a model's folder, such as `algo.global_batch`, is checked once these
are known.
Every float must be finite.

A value is that of the last of these that names it: default, preset, the folder of `world`, flag. A
world fills every field that it knows: [own_simulator.md](own_simulator.md#what-a-world-is).

A path that is read may be an address on the Hugging Face Hub, `hf://OWNER/NAME[@REVISION][/PATH]`:
[from_rlinf.md](from_rlinf.md#addresses-in-the-place-of-paths).

The command `python -m evac_jax.config.reference > docs/config.md` makes this page from the
dataclasses in `evac_jax/config/` and `algos/`. Change those, not the page: a test compares the two.
"""
TABLE = ["| flag | type | allowed | default | meaning |", "| --- | --- | --- | --- | --- |"]


def _summary(cls: type) -> str:
    """The docstring of a class up to its attributes, in one line."""
    return " ".join(inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:")[0].split())


def _text(value: Any) -> str:
    """A value in the form in which presets write it."""
    if isinstance(value, tuple):
        entries = ", ".join(map(_text, value))
        return f"({entries},)" if len(value) == 1 else f"({entries})"
    return json.dumps(value) if isinstance(value, str) else str(value)


def _choices(kind: Kind) -> tuple:
    return kind.entries[0].choices if kind.entries else kind.choices


def _row(field: Field) -> str:
    """A row of a Markdown table."""
    choices = _choices(field.kind)
    choices += (import_string.FORM,) * field.kind.own
    allowed = ", ".join(f"`{_text(choice)}`" for choice in choices) or field.kind.allowed
    meaning = field.meaning
    for character in "|<*":
        meaning = meaning.replace(character, f"\\{character}")
    cells = (f"`{field.name}`", field.kind.name, allowed, f"`{_text(field.value)}`", meaning)
    return f"| {' | '.join(cells)} |"


def _section(title: str, summary: str, fields: Iterable[Field]) -> list[str]:
    return ["", f"## {title}", "", summary, "", *TABLE, *map(_row, fields)]


def _algorithms() -> list[str]:
    """The tables of `algo`: fields that all algorithms share, then those of each algorithm."""
    configs = {name: default_config(name).algo for name in ALGORITHMS}
    fields = {name: list(walk(config, "algo.")) for name, config in configs.items()}
    shared = [f for f in fields["grpo"] if all(f in others for others in fields.values())]
    lines = _section("algo", "Settings that all algorithms have alike.", shared)
    for name, config in configs.items():
        own = [field for field in fields[name] if field not in shared]
        lines += _section(f"algo, {name.upper()}", _summary(type(config)), own)
    return lines


def page() -> str:
    """Return the reference page, Markdown."""
    config, lines = default_config("grpo"), [HEAD.rstrip()]
    lines += _section("Whole run", _summary(type(config)), _of_section(walk(config), ""))
    lines += _algorithms()
    for name, section in vars(config).items():
        fields = _of_section(walk(config), name)
        if fields and name != "algo":
            lines += _section(name, _summary(type(section)), fields)
    return "\n".join(lines) + "\n"


def _of_section(fields: Iterable[Field], section: str) -> list[Field]:
    """The fields of a section; "" = fields that are in no section."""
    return [f for f in fields if section == (f.name.partition(".")[0] if "." in f.name else "")]


def help_text(argv: Sequence[str]) -> str:
    """Return the fields with the values of the given preset; "" if no help was asked for.

    Raises:
        ConfigError: `--config` does not name a preset.
    """
    if not any(argument.lstrip("-") in HELP_FLAGS for argument in argv if argument[:1] == "-"):
        return ""
    file = preset_file(argv)
    preset = load_preset(file)
    config = default_config(str(preset.algorithm))
    lines = [f"\nFields of the configuration with the values of {file} (tables: docs/config.md)"]
    fields = list(walk(config))
    for name, section in {"": config, **vars(config)}.items():
        for number, field in enumerate(_of_section(fields, name)):
            if number == 0:
                lines += ["", *textwrap.wrap(f"{name or 'run'}: {_summary(type(section))}", WIDTH)]
            lines += _help_lines(field, preset)
    return "\n".join(lines).replace("%", "%%") + "\n"  # absl formats the text


def _help_lines(field: Field, preset: Any) -> list[str]:
    """A field in the same form as absl's flags."""
    value = preset
    for key in field.name.split("."):
        value = value[key]
    kind, choices = field.kind, _choices(field.kind)
    choices += (import_string.FORM,) * kind.own
    allowed = "|".join(map(str, choices)) or kind.allowed
    shape = ", ".join(filter(None, (kind.name, allowed)))
    if choices and kind.type is str:
        shape = allowed
    text = f"--config.{field.name}: <{shape}>: {field.meaning}"
    wrapped = textwrap.wrap(
        text,
        WIDTH,
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [*wrapped, f"    (default: {_text(value)})"]


if __name__ == "__main__":
    sys.stdout.write(page())
