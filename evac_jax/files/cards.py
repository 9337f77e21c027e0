"""Data cards: how a weight file came to be, as JSON beside it. No JAX, no PyTorch."""

import hashlib
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

from evac_jax.errors import DataError
from evac_jax.files.atomic import replacing


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file that is whole or not there."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_object(text: str | bytes) -> dict[str, Any]:
    """Return the object that a JSON text holds.

    Raises:
        ValueError: it is no UTF-8, no JSON, or no object; a list is not taken for its pairs.
    """
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}")
    return values


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        DataError: it holds something else, or bytes that are no text.
    """
    try:
        return json_object(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: expected a JSON object ({error}); restore the file") from error


def read(folder: Path) -> dict[str, Any]:
    """Return the data card of a folder, {} if it has none.

    Raises:
        DataError: the card is damaged.
    """
    path = folder / "card.json"
    return read_json(path) if path.is_file() else {}


def card(**facts: Any) -> dict[str, Any]:
    """Return a data card: the command that ran, the versions it ran with, and `facts`."""
    command = " ".join(["python", _program(), *map(_without_folders, sys.argv[1:])])
    packages = ("numpy", "torch", "jax", "flax")
    versions = {name: importlib.metadata.version(name) for name in packages}
    versions["python"] = platform.python_version()
    return {"command": command, "versions": versions, **facts}


def _program() -> str:
    spec = sys.modules["__main__"].__spec__
    return f"-m {spec.name}" if spec is not None else Path(sys.argv[0]).name


def _without_folders(argument: str) -> str:
    """Return an argument with a folder's name alone: its path is private to the machine."""
    flag, equals, value = argument.rpartition("=")
    return f"{flag}{equals}{Path(value).name if value.startswith('/') else value}"
