"""Golden vectors of EVAC: networks, model and environment, merged."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.parity.report import VectorResult

PARTS = ("tests.parity.evac_networks", "tests.parity.evac_model", "tests.parity.evac_env")


def vectors(folder: Path, manifest: dict) -> set[str]:
    """Union over the parts, and one name for every file that no part claims."""
    parts = [importlib.import_module(part) for part in PARTS]
    names = set().union(*(part.vectors(folder, manifest) for part in parts))
    return names | {f"{file}/unclaimed" for file in _unclaimed(parts, manifest)}


def check(folder: Path, manifest: dict) -> Iterator[VectorResult]:
    """The parts' results one after the other; a crash of one does not silence the next."""
    parts = [importlib.import_module(part) for part in PARTS]
    for file in _unclaimed(parts, manifest):
        yield VectorResult(f"{file}/unclaimed", np.inf, 0.0, False, "no checker knows this file")
    for part in parts:
        try:
            yield from part.check(folder, manifest)
        except Exception as error:  # noqa: BLE001 - shown here, its vectors count as not covered
            note = f"{type(error).__name__}: {error}"
            yield VectorResult(f"{part.__name__}/crashed", np.inf, 0.0, False, note)


def _unclaimed(parts, manifest: dict) -> list[str]:
    return [file for file in manifest["files"] if not any(part.claims(file) for part in parts)]
