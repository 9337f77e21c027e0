"""Facts that every benchmark prints: the machine, its speed and load, versions.

The calibration is the rate of torch's float32 product of two 2048 x 2048 matrices, by the number of
threads. To compare figures of two machines, divide them by this rate. On the idle 2-core machine on
which the references were measured it is 101 GFLOP/s on one thread and 201 on two.
"""

import os
import platform
import statistics
import time
from importlib.metadata import version
from typing import Any

import torch

SIZE = 2048
REPEATS = 5
PACKAGES = ("jax", "torch", "numpy")


def matmul_gflops(threads: int) -> float:
    """Return the median rate of a SIZE x SIZE product in GFLOP/s."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    a, b = torch.randn(2, SIZE, SIZE)
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - began)
    torch.set_num_threads(before)
    return 2e-9 * SIZE**3 / statistics.median(times[1:])


def describe(threads: tuple[int, ...] = (1, 2), packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the facts as JSON values; `threads` above the number of cores are left out."""
    cores = len(os.sched_getaffinity(0))
    return {
        "machine": f"{platform.machine()}, {cores} cores",
        "load": os.getloadavg()[0],
        "matmul_gflops": {n: round(matmul_gflops(n), 1) for n in threads if n <= cores},
        "versions": {name: version(name) for name in (*PACKAGES, *packages)},
    }


def show(facts: dict[str, Any]) -> None:
    """Print the facts."""
    rates = ", ".join(f"{rate} on {n}" for n, rate in facts["matmul_gflops"].items())
    print(f"machine: {facts['machine']}; load average {facts['load']:.1f}")
    print(f"torch matmul {SIZE}, GFLOP/s by threads: {rates}")
    print("versions: " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()), flush=True)
