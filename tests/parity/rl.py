"""Checks `algos` against golden vectors of the RL algorithms (manifests with "cases").

A name under `recommended` replaces the same name in `out`: it is computed with the corrected
behaviour, every other name with the reference switches on, so both sides of a switch are tested.
Names ending in "_float64", and cases whose float32 numbers are rounding noise ("finite_only"), are
computed in float64.
"""

import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.report import VectorResult, compare
from tests.parity.rl_ops import OPS

FLOAT64_SUFFIX = "_float64"
FLOAT64_RTOL = 1e-9
# Relative tolerances alone would ask for exact zeros where float64 leaves rounding noise.
FLOAT64_ATOL = 1e-12

# Every case is compiled once and run once.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def vectors(folder: Path, manifest: dict) -> set[str]:
    """Names of all outputs: "<case id>/<output>"."""
    return {f"{case['id']}/{name}" for case in manifest["cases"] for name in goals(case)}


def goals(case: dict) -> dict[str, str]:
    """Return {output: kind of array that holds its goal, "out" or "rec"}."""
    kinds = dict.fromkeys(case["outputs"], "out")
    return kinds | dict.fromkeys(case.get("recommended", {}), "rec")


def check(folder: Path, manifest: dict) -> Iterator[VectorResult]:
    """Yield a result for every output of every case."""
    archives: dict[str, np.lib.npyio.NpzFile] = {}
    for case in manifest["cases"]:
        archive = archives.setdefault(case["file"], np.load(folder / case["file"]))
        try:
            yield from list(check_case(case, partial(_load, archive, case["id"])))
        except Exception:  # one case that cannot run must not hide the others
            traceback.print_exc()
            for name in goals(case):
                yield VectorResult(f"{case['id']}/{name}", np.inf, 0.0, False, "op crashed")


def _load(archive, case_id: str, kind: str, name: str) -> np.ndarray:
    return archive[f"{case_id}/{kind}/{name}"]


def check_case(case: dict, load) -> Iterator[VectorResult]:
    """Yield the results of one case; `load(kind, name)` reads its arrays."""
    inputs = {name: load("in", name) for name in case["inputs"]}
    kinds = goals(case)
    noisy = case.get("compare") == "finite_only"
    run = partial(outputs_of, case, inputs)
    ours = {kind: run(corrected=kind == "rec") for kind in set(kinds.values())}
    wide = {}
    if noisy or any(name.endswith(FLOAT64_SUFFIX) for name in kinds):
        wide = {kind: run(corrected=kind == "rec", wide=True) for kind in ours}
    for name, kind in kinds.items():
        vector = f"{case['id']}/{name}"
        golden = load(kind, name)
        plain = name.removesuffix(FLOAT64_SUFFIX)
        if plain not in ours[kind]:
            yield VectorResult(vector, np.inf, 0.0, False, f"op {case['op']!r} returned no {plain}")
        elif plain != name:
            yield compare(vector, wide[kind][plain], golden, atol=FLOAT64_ATOL, rtol=FLOAT64_RTOL)
        elif noisy:
            result = finite(vector, ours[kind][name], golden)
            if result.ok and name in case.get("outputs_float64", {}):
                exact = load("out64", name)
                result = compare(
                    vector, wide[kind][name], exact, atol=FLOAT64_ATOL, rtol=FLOAT64_RTOL
                )
            yield result
        else:
            yield compare(vector, ours[kind][name], golden, **case["tolerance"])


def finite(name: str, ours: np.ndarray, golden: np.ndarray) -> VectorResult:
    """Check shape and finiteness only, for values that rounding dominates."""
    ours = np.asarray(ours)
    ok = ours.shape == golden.shape and bool(np.isfinite(ours).all())
    return VectorResult(name, 0.0 if ok else np.inf, np.inf, ok, "finite only")


def outputs_of(
    case: dict, inputs: dict[str, np.ndarray], *, corrected: bool, wide: bool = False
) -> dict[str, np.ndarray]:
    """Run a case's op; `wide` in float64, `corrected` without the reference switches."""
    op, wants_wide = OPS[case["op"]]
    with jax.enable_x64(wide or wants_wide):
        if wide or wants_wide:
            inputs = {
                name: x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x
                for name, x in inputs.items()
            }
        arrays = {name: jnp.asarray(x) for name, x in inputs.items()}
        run = jax.jit(
            lambda x: op(case["params"], x, reference=not corrected), compiler_options=FAST_COMPILE
        )
        outputs = run(arrays)
        return {name: np.asarray(x) for name, x in outputs.items()}
