"""Common parts of the tools' command lines: their help, their errors, options that several have.

The help shows the docstring of the tool without reformatting, and the default of every option.
"""

import argparse
import copy
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evac_jax.config.fields import value_problems, with_home
from evac_jax.config.libero import MAX_STEPS, LiberoConfig, problems
from evac_jax.errors import ConfigError, DataError, EvacJaxError
from evac_jax.files import claim
from policies.ranges import Range

LIBERO_PYTHON = ".venv-libero/bin/python"  # where `make libero` installs it
_LIBERO = ("suite", "root", "states", "python", "renderer", "crop", "oversample", "reflections")


def run_tool(main: Callable[[], None]) -> None:
    """Call a tool's `main`; a user's mistake, or a disk's, ends with one message and status 2."""
    try:
        main()
    except (EvacJaxError, OSError) as error:
        sys.stderr.write(f"\n{type(error).__name__}: {error}\n")
        sys.exit(2)


def number(kind: type, allowed: Range) -> Callable[[str], Any]:
    """Return the type of an option: a finite number of `kind`, int or float, in a range."""
    name = "a whole number" if kind is int else "a finite number"
    expected = f"{name}, {str(allowed).removeprefix('a number ')}"

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if value not in allowed or not -math.inf < value < math.inf:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return read


not_negative = number(float, Range(0))
# Names that options of a `Parser` may give as their type.
KINDS = {
    "count": number(int, Range(1)),
    "natural": number(int, Range(0)),
    "positive": number(float, Range(0, open="low")),
    "not_negative": not_negative,
    "share": number(float, Range(0, 1)),
    "share_above_0": number(float, Range(0, 1, open="low")),
    "share_below_1": number(float, Range(0, 1, open="high")),
    "dropout": number(float, Range(0, 0.25)),  # of a world model's conditions
}


def refuse_existing(out: str | Path) -> None:
    """Refuse an --out that is there already, or that cannot be made, before any work is done.

    Raises:
        DataError: there is such a file or folder: nothing of the user's is written over.
        StorageError: it lies below a file, or in a folder that cannot be written to.
    """
    if os.path.lexists(path := Path(out)):  # a link that leads nowhere is in the way, too
        kind = "folder" if path.is_dir() else "file"
        raise DataError(f"--out: {out} exists; choose another {kind} or remove it")
    claim.check_writable(path, "choose another --out")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of the description and adds defaults, even if there is no help text."""

    def add_argument(self, action: argparse.Action) -> None:
        default = _shown(action)
        if default and action.help != argparse.SUPPRESS:
            action = copy.copy(action)
            action.help = f"{action.help or ''} (default: {default.replace('%', '%%')})".strip()
        super().add_argument(action)


def _shown(action: argparse.Action) -> str:
    """Return the default as one would type it; "" if there is none, as for a switch."""
    default = action.default
    if default is None or default is False or default == argparse.SUPPRESS:
        return ""
    return " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)


def add_libero(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which LIBERO is played and how it is drawn; see `libero_of`."""
    official, kinds = LiberoConfig(), {"crop": _shares, "oversample": int}
    for name in _LIBERO:
        text = f"as config.libero.{name}" + ("; with commas" if name == "crop" else "")
        kind: dict[str, Any]
        if name == "reflections":
            kind = {"action": argparse.BooleanOptionalAction}
        else:
            kind = {"type": kinds.get(name, str), "choices": MAX_STEPS if name == "suite" else None}
        default = LIBERO_PYTHON if name == "python" else getattr(official, name)
        parser.add_argument(f"--{name}", default=default, help=text, **kind)


def _shares(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def libero_of(args: argparse.Namespace, **more: Any) -> LiberoConfig:
    """Return the LIBERO that the options of `add_libero` and `more` fields describe.

    Raises:
        ConfigError: a value is out of range, or a file or package is missing.
    """
    config = LiberoConfig(**{name: getattr(args, name) for name in _LIBERO}, **more)
    if wrong := value_problems(config, "--") or problems(config):
        raise ConfigError("\n".join(wrong))
    return config


class Parser(argparse.ArgumentParser):
    """The parser of `python -m evac_jax.tools.<tool>`.

    Args:
        tool: "noun.verb", or "noun".
        doc: docstring of the tool.
        **options: passed to `argparse.ArgumentParser`.
    """

    def __init__(self, tool: str, doc: str | None, **options: Any):
        super().__init__(
            prog=f"python -m evac_jax.tools.{tool}",
            description=doc,
            formatter_class=_Formatter,
            **options,
        )
        for name, kind in KINDS.items():
            self.register("type", name, kind)

    def parse_known_args(self, args: Any = None, *rest: Any, **named: Any) -> Any:
        """Parse as usual; paths may begin with "~/", also behind "--option="."""
        argv = map(with_home, sys.argv[1:] if args is None else args)
        return super().parse_known_args(list(argv), *rest, **named)

    def add_device(self) -> None:
        """Add `--device` of a tool that computes in PyTorch."""
        # Tools without this option compute in JAX and do not need PyTorch.
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        known = ["cpu", *["cuda"] * (count > 0), *(f"cuda:{number}" for number in range(count))]

        def device(name: str) -> str:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"expected one of {', '.join(known)}, got {name!r}; "
                    f"PyTorch {torch.__version__} sees {count} CUDA devices"
                )
            return name

        default = "cuda" if count else "cpu"
        text = "where PyTorch computes, cpu, cuda or cuda:N; cuda where there is one"
        self.add_argument("--device", type=device, default=default, help=text)

    def add_threads(self) -> None:
        """Add `--threads` of a tool that computes in PyTorch."""
        self.add_argument("--threads", type="count", default=1, help="of PyTorch on the CPU")

    def add_seed(self, of: str) -> None:
        """Add `--seed`; `of` says what the seed is for."""
        kind = number(int, Range(0, 2**31 - 1))
        self.add_argument("--seed", type=kind, default=0, help=f"of {of}")

    def add_image_size(self, default: int = 0) -> None:
        """Add `--image_size`; a default of 0 keeps the size of the pictures."""
        text = "pixels per side" + ("" if default else "; 0 = as they are")
        kind = "count" if default else "natural"
        self.add_argument("--image_size", type=kind, default=default, help=text)
