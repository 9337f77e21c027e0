"""On a CPU: memory that one computation frees is the next one's.

XLA and PyTorch ask malloc for the buffers of every computation. glibc returns pieces of that size
to the system when they are freed, which clears their pages before it hands them out again: a tenth
to a quarter of a training step's time, up to a fifth of an imagined chunk's; the peak is the same
(docs/policy_speed.md, docs/world_model_speed.md). A process gets the settings by its environment
when it starts, or makes them itself.
"""

import ctypes
import os

from absl import logging

# Setting of glibc -> its number in malloc.h, and the value: nothing is allocated outside the heap,
# and no free bytes at the heap's end go back.
_SETTINGS = {"MMAP_MAX": (-4, 0), "TRIM_THRESHOLD": (-1, -1)}
# The same as variables of a process that computes in PyTorch on a CPU.
KEEP_FREED_MEMORY = {f"MALLOC_{name}_": str(value) for name, (_, value) in _SETTINGS.items()}


def keep_freed_memory() -> None:
    """Let this process keep what it frees, if JAX computes on a CPU here.

    Computations then run in the thread that calls them: of the heaps that malloc has for threads
    only the main thread's holds large pieces. Call before anything asks JAX for its devices. malloc
    stays as it is where MALLOC_... variables say what it shall do, and where it is not glibc's.
    """
    # Those that start PyTorch processes take the variables from here, and have no need of JAX.
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)  # of computations on one device
    if jax.default_backend() != "cpu" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not all(mallopt(number, value) for number, value in _SETTINGS.values()):
        logging.info("freed memory goes back to the system: this is not glibc's malloc")


def give_back() -> None:
    """Return the heap's free pages to the system, for once; they are cleared when used again.

    After work of other sizes, such as an evaluation, the pieces that training asks for no longer
    fit into those that it freed. The heap then grows, time after time, and what is free between
    would stay resident. Does nothing where malloc is not glibc's.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
