"""Runs the checkers over golden folders and tells what was covered.

A checker is a module with `check(folder, manifest) -> Iterator[VectorResult]` and
`vectors(folder, manifest) -> set[str]`, the names that must be covered. The folder's format is
recognised from the keys of its manifest.
"""

import importlib
import json
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CHECKERS = {
    "rl": "tests.parity.rl",
    "evac": "tests.parity.evac",
    "openvla_oft": "tests.parity.openvla",
}


@dataclass(frozen=True)
class VectorResult:
    """One golden vector against ours.

    Attributes:
        name: name of the vector as the manifest has it.
        error: largest absolute difference; inf for a wrong shape or a NaN on one side only.
        tolerance: largest absolute difference allowed (the tightest entry's, under rtol).
        ok: whether every entry lies within tolerance.
        note: shapes on mismatch, or why the vector is only partly comparable.
    """

    name: str
    error: float
    tolerance: float
    ok: bool
    note: str = ""


def compare(name: str, ours, golden, *, atol: float, rtol: float = 0.0) -> VectorResult:
    """Compare entry by entry; equal NaN and equal infinities count as equal."""
    ours, golden = np.asarray(ours), np.asarray(golden)
    if ours.shape != golden.shape:
        return VectorResult(name, np.inf, atol, False, f"shape {ours.shape}, golden {golden.shape}")
    if golden.dtype == bool or ours.dtype == bool:
        ours, golden = ours.astype(np.int8), golden.astype(np.int8)
    ours, golden = ours.astype(np.float64), golden.astype(np.float64)
    same = (ours == golden) | (np.isnan(ours) & np.isnan(golden))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(ours - golden))
    difference = np.where(np.isnan(difference), np.inf, difference)
    allowed = atol + rtol * np.abs(np.where(np.isfinite(golden), golden, 0.0))
    error = float(difference.max(initial=0.0))
    tolerance = float(allowed.flat[int(np.argmax(difference - allowed))]) if allowed.size else atol
    return VectorResult(name, error, tolerance, bool((difference <= allowed).all()))


def folder_format(manifest: dict) -> str:
    """Name of the format of a manifest, a key of `CHECKERS`."""
    if "cases" in manifest:
        return "rl"
    if "tiny_config" in manifest:
        return "evac"
    if "settings" in manifest and "tensors" in manifest:
        return "openvla_oft"
    raise ValueError(f"unknown golden format; manifest keys: {sorted(manifest)}")


def run_folder(folder: Path) -> Iterator[VectorResult]:
    """Yield a result for every vector of `folder`, uncovered ones included (as failures)."""
    manifest = json.loads((folder / "manifest.json").read_text())
    checker = importlib.import_module(CHECKERS[folder_format(manifest)])
    expected = checker.vectors(folder, manifest)
    seen = set()
    try:
        for result in checker.check(folder, manifest):
            seen.add(result.name)
            yield result
    except Exception:  # noqa: BLE001 - a crash is reported as such, with its vectors as not covered
        traceback.print_exc()
    for name in sorted(expected - seen):
        yield VectorResult(name, np.inf, 0.0, False, "not covered")


def main(folders: list[Path]) -> int:
    """Print one line per vector and a total; return the exit status."""
    if not folders:
        print("usage: python -m tests.parity DIR [DIR ...]", file=sys.stderr)
        return 2
    total = failed = 0
    for folder in folders:
        for result in run_folder(folder):
            total += 1
            failed += not result.ok
            verdict = "ok" if result.ok else "FAIL"
            note = f"  ({result.note})" if result.note else ""
            print(
                f"{folder.name}/{result.name}  error={result.error:.3g}  "
                f"tolerance={result.tolerance:.3g}  {verdict}{note}",
                flush=True,
            )
    print(f"total: {total} vectors, {total - failed} ok, {failed} failed")
    return int(failed > 0 or total == 0)
