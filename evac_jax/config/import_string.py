"""Import strings: how a configuration names code, "module:attribute".

The user's own algorithm, ground truth and judge of success are named so (docs/plug_in.md), and so
is the environment of every simulator process. Only what a user typed or a preset says comes here,
never what a card, a checkpoint or a recording tells.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NewType

from evac_jax.errors import ConfigError

ImportString = NewType("ImportString", str)  # in the type of a field: its own code is allowed
FORM = "module:attribute"

# What own code must have.
ALGORITHM = ("Config", "problems", "make_update")  # see algos/grpo.py
ENVIRONMENT = ("parts", "reset", "step", "park", "close")  # see evac_jax/bridge/environment.py
JUDGE = ("probability", "to")  # see evac_jax/sim/reward.py


def is_one(text: str) -> bool:
    """Whether a value is meant as an import string; no name of ours has a colon."""
    return ":" in text


def load(text: str, needs: Sequence[str] = (), makes: Sequence[str] = ()) -> Any:
    """Return what an import string names.

    The working directory is searched first, as `python -m` does it. Simulator processes are started
    so, and the trainer must find the same modules.

    Args:
        text: "module:attribute".
        needs: attributes that it must have.
        makes: it is called, and the result must have these; a class is looked at here, what a
            function returns must be given to `require`.

    Raises:
        ConfigError: it cannot be imported, or lacks something.
    """
    module, _, name = text.partition(":")
    if not (module and name):
        raise ConfigError(f'expected "{FORM}", got {text!r}')
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # the module is the user's and may raise anything
        raise ConfigError(
            f"cannot import {text!r} (looked in {here} and in PYTHONPATH): "
            f"{type(error).__name__}: {error}"
        ) from error
    if makes and not callable(found):
        raise ConfigError(f"expected {text!r} to be a function or a class, got {found!r}")
    require(found, (*needs, *(makes if isinstance(found, type) else ())), text)
    return found


def require(found: object, needs: Sequence[str], text: str) -> None:
    """Refuse an object that lacks attributes.

    Args:
        text: the import string that it comes from, for the message.

    Raises:
        ConfigError: names what is missing.
    """
    if missing := [name for name in needs if not hasattr(found, name)]:
        raise ConfigError(
            f"{text!r} lacks {', '.join(missing)}; expected {', '.join(needs)} (docs/plug_in.md)"
        )
