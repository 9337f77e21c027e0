"""Reads the fields of the configuration from its dataclasses: type, choices, bounds, meaning.

Checks, error messages, the types of flags, docs/config.md and `launch.py --help` are all made from
this, so each field is declared only once.
"""

import dataclasses
import inspect
import math
import os
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from evac_jax.config import import_string
from evac_jax.errors import nearest
from policies.ranges import Range


def with_home(text: str) -> str:
    """Return a path, or several joined by commas, with the home folder in the place of "~".

    Also in "--flag=~/path", where no shell does so, and in "policy:~/path" of a mixture of players.
    """
    begins = r"(^|^--?[\w.]+=|,|policy:)~(?=/|,|$)"
    return re.sub(begins, lambda found: found[1] + os.path.expanduser("~"), text)


@dataclass(frozen=True)
class Kind:
    """The values that a field may have.

    Attributes:
        type: str, int, float, bool or tuple.
        choices: the values to choose from; () = any.
        range: bounds of a number; None = none.
        optional: None is allowed as well.
        own: so is an import string, which names the user's own code.
        entries: kinds of a tuple's entries; one kind if `many`.
        many: a tuple may be of any length.
    """

    type: type
    choices: tuple = ()
    range: Range | None = None
    optional: bool = False
    own: bool = False
    entries: "tuple[Kind, ...]" = ()
    many: bool = False

    @classmethod
    def of(cls, hint: Any) -> "Kind":
        """Read a type hint such as `Annotated[int, Range(1)] | None` or `tuple[Literal["a"], ...]`.

        Raises:
            TypeError: the form of the hint is not supported.
        """
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            more = {"optional": type(None) in args, "own": import_string.ImportString in args}
            inner = set(args) - {type(None), import_string.ImportString}
            if len(inner) == 1:
                return dataclasses.replace(cls.of(inner.pop()), **more)
        if origin is typing.Annotated:
            (bounds,) = (extra for extra in args[1:] if isinstance(extra, Range))
            return dataclasses.replace(cls.of(args[0]), range=bounds)
        if origin is typing.Literal:
            return cls(type(args[0]), choices=args)
        if origin is tuple:
            many = args[-1] is Ellipsis
            return cls(tuple, entries=tuple(map(cls.of, args[:1] if many else args)), many=many)
        if hint in (str, int, float, bool):
            return cls(hint)
        raise TypeError(f"the configuration has no fields of type {hint}")

    @property
    def name(self) -> str:
        """The type in words, e.g. "float or None", "tuple of 2 int"."""
        name = self.type.__name__
        if self.entries:
            count = "" if self.many else f"{len(self.entries)} "
            name = f"tuple of {count}{self.entries[0].name}"
        return f"{name} or None" if self.optional else name

    @property
    def allowed(self) -> str:
        """The choices or bounds in words, for a tuple those of its entries; "" = any value."""
        if self.entries:
            return self.entries[0].allowed
        if self.choices:
            return f"one of {self.choices}" + f" or '{import_string.FORM}'" * self.own
        return "" if self.range is None else str(self.range)

    def convert(self, value: Any, path: str, problems: list[str]) -> Any:
        """Return `value` as this type (int to float if needed), or append to `problems`.

        A path may begin with "~/".
        """
        if value is None and self.optional:
            return None
        if self.type is tuple:
            return self._convert_tuple(value, path, problems)
        if self.type is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, self.type) or isinstance(value, bool) != (self.type is bool):
            problems.append(f"config.{path}: expected {self.type.__name__}, got {value!r}")
        return with_home(value) if isinstance(value, str) else value

    def _convert_tuple(self, value: Any, path: str, problems: list[str]) -> Any:
        if not isinstance(value, list | tuple):
            problems.append(f"config.{path}: expected a tuple, got {value!r}")
            return value
        if not self.many and len(value) != len(self.entries):
            problems.append(f"config.{path}: expected {len(self.entries)} entries, got {value!r}")
            return value
        kinds = self.entries * len(value) if self.many else self.entries
        entries = zip(kinds, value, strict=True)
        return tuple(kind.convert(entry, path, problems) for kind, entry in entries)

    def problems(self, value: Any, path: str) -> list[str]:
        """Return what is wrong with a value of this type: choices, bounds, NaN and infinity."""
        if value is None:
            return []
        if self.type is tuple:
            kinds = self.entries * len(value) if self.many else self.entries
            entries = zip(kinds, value, strict=True)
            return [text for kind, entry in entries for text in kind.problems(entry, path)]
        expected, hint = self.allowed, ""
        if isinstance(value, float) and not math.isfinite(value):
            expected = "a finite number"
        elif self.own and import_string.is_one(str(value)):
            return []
        elif self.choices and value not in self.choices:
            hint = f".{nearest(value, self.choices)}" if isinstance(value, str) else ""
        elif self.range is None or value in self.range:
            return []
        expected = f"None or {expected}" if self.optional else expected
        return [f"config.{path}: expected {expected}, got {value!r}{hint}"]


class Field(NamedTuple):
    """One field of a section.

    Attributes:
        name: the part of its flag after `--config.`, e.g. "optim.lr".
        kind: the values that it may have.
        value: its value in the section that was read.
        meaning: its description in the docstring, in one line.
    """

    name: str
    kind: Kind
    value: Any
    meaning: str


def hints(cls: type) -> dict[str, Any]:
    """Return {field: type hint} of a dataclass, with ranges."""
    return typing.get_type_hints(cls, include_extras=True)


def meanings(cls: type) -> dict[str, str]:
    """Return {field: meaning} of the "Attributes:" in the docstrings of a class and its bases."""
    found = {}
    for base in reversed(cls.__mro__):
        _, _, text = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:\n")
        entries = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", text, re.MULTILINE)
        found |= {name: " ".join(meaning.split()) for name, meaning in entries}
    return found


def walk(section: Any, prefix: str = "") -> Iterator[Field]:
    """Yield every field of a section and of its subsections.

    Args:
        prefix: text before each field's name, e.g. "optim.".
    """
    declared, texts = hints(type(section)), meanings(type(section))
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{name}.")
        else:
            yield Field(name, Kind.of(declared[field.name]), value, texts.get(field.name, ""))


def value_problems(section: Any, prefix: str = "") -> list[str]:
    """Return one line for every value that is not among the choices or within the bounds."""
    return [
        text
        for field in walk(section, prefix)
        for text in field.kind.problems(field.value, field.name)
    ]
