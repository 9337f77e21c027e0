"""Freed memory is kept for the next computation, unless a user or a GPU says otherwise."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from evac_jax.devices import malloc

ROOT = Path(__file__).parents[3]
MEGABYTES = 64  # more than malloc's own threshold for mmap ever grows to, 32
PROGRAM = """
import ctypes, resource
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: every fault is one small page
import jax, jax.numpy as jnp
from evac_jax.devices.malloc import keep_freed_memory

{before}
keep_freed_memory()
wide = jax.jit(lambda x: jnp.sin(x[:, None] + x) @ x)  # the product needs all of the sines
x = jnp.ones(({side},))
for _ in range(10):  # the heap grows for a few runs, as small pieces split the first large ones
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    wide(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_cleared(before: str = "", program: str = PROGRAM, **environment: str) -> float:
    """Return the share of a computation's pages that the system cleared at its tenth run."""
    side = int((MEGABYTES * 2**20 / 4) ** 0.5)
    keep = {name: text for name, text in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", program.format(side=side, before=before)],
        cwd=ROOT,
        env=keep | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout) * resource.getpagesize() / (MEGABYTES * 2**20)


def test_memory_that_a_computation_freed_is_used_again():
    assert pages_cleared() < 0.05


@pytest.mark.parametrize(
    "told",
    [{"MALLOC_ARENA_MAX": "8"}, {"before": 'jax.default_backend = lambda: "gpu"'}],
    ids=["user", "gpu"],
)
def test_malloc_stays_as_it_is_where_it_was_told_or_computes_nothing(told):
    assert pages_cleared(**told) > 0.9


OTHERS = """
import ctypes, resource, sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
import numpy as np
from evac_jax.devices import malloc

assert "jax" not in sys.modules
for _ in range(10):  # the heap grows for a few runs, as small pieces split the first large ones
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(({side}, {side}), np.float32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(
    ("environment", "low", "high"), [({}, 0.9, 1.2), (malloc.KEEP_FREED_MEMORY, 0, 0.05)]
)
def test_a_process_without_jax_keeps_what_it_frees_when_its_environment_says_so(
    environment, low, high
):
    assert low <= pages_cleared(program=OTHERS, **environment) <= high


BETWEEN = """
from pathlib import Path
import numpy as np
from evac_jax.devices import malloc

def resident():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0])

free, used = np.ones(({side}, {side}), np.float32), np.ones(100)
del free
before = resident()
malloc.give_back()
print(before - resident())
"""


def test_free_memory_between_used_pieces_goes_back_when_asked_for():
    done = subprocess.run(
        [sys.executable, "-c", BETWEEN.format(side=int((MEGABYTES * 2**20 / 4) ** 0.5))],
        cwd=ROOT,
        env=os.environ | malloc.KEEP_FREED_MEMORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) > 0.9 * MEGABYTES * 1024  # kilobytes
