"""On a CPU: memory that one computation frees is the next one's.

XLA asks malloc for the buffers of every computation. glibc returns pieces of that size to the
system when they are freed, which clears their pages before it hands them out again: a tenth to a
quarter of a training step's time (docs/policy_speed.md).
"""

import ctypes
import os

import jax
from absl import logging

# Of glibc's malloc.h: bytes free at the heap's end that go back; allocations outside the heap.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let this process keep what it frees, if JAX computes on a CPU here.

    Computations then run in the thread that calls them: of the heaps that malloc has for threads
    only the main thread's holds large pieces. Call before anything asks JAX for its devices. malloc
    stays as it is where MALLOC_... variables say what it shall do, and where it is not glibc's.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # of computations on one device
    if jax.default_backend() != "cpu" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1)):
        logging.info("freed memory goes back to the system: this is not glibc's malloc")
