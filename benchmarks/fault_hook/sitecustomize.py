"""Makes one process of a run fail at one call: benchmarks.faults puts this folder on PYTHONPATH.

Python imports `sitecustomize` before anything else. The environment variable EVAC_JAX_FAULT holds
JSON: `role` (the process), `at` ("module:Class.method"), `call` (which call of it, from 1), `do`
(what happens then) and `stamp` (a file that is written at that moment). The product knows nothing
of this.
"""

import contextlib
import importlib.abc
import importlib.util
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

ROLES = {
    "trainer": "launch.py",
    "simulator": "--name=evac_jax.sim.env:make",
    "ground_truth": "--name=evac_jax.miniature.env:make",
}


def children(role: str) -> list[int]:
    """Return the process ids of this process's children in a role."""
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        for pid in path.read_text().split():
            with contextlib.suppress(OSError):
                if ROLES[role] in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                    found.append(int(pid))
    return found


def act(do: str) -> None:
    """Do what the fault says; `kill:simulator` and `stop:ground_truth` mean children."""
    do, _, role = do.partition(":")
    numbers = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
    if do in numbers:
        for pid in children(role) if role else [os.getpid()]:
            os.kill(pid, numbers[do])
    elif do == "error":
        raise RuntimeError("a fault that benchmarks.faults put here")
    elif do == "memory":  # what is mapped stays, nothing can be added
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    elif do == "clock":
        real = time.time
        time.time = lambda: real() - 3600.0
    elif do == "remove":
        shutil.rmtree(os.environ["EVAC_JAX_FAULT_FOLDER"])
    elif do == "readonly":
        folder = os.environ["EVAC_JAX_FAULT_FOLDER"]
        os.system(f"mount -o remount,ro {folder}")
    elif do == "fill":
        with (
            contextlib.suppress(OSError),
            open(Path(os.environ["EVAC_JAX_FAULT_FOLDER"], "filler"), "wb", buffering=0) as file,
        ):
            while True:
                file.write(bytes(2**20))
    else:
        raise ValueError(f"unknown fault {do!r}")


class Hook(importlib.abc.MetaPathFinder):
    """Wraps the fault's function when its module is imported."""

    def __init__(self, fault: dict):
        self.fault, self.calls = fault, 0
        self.module, _, self.name = fault["at"].partition(":")

    def find_spec(self, name, path=None, target=None):
        """Find the module as others do, and wrap its loader."""
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            self.wrap(module)

        spec.loader.exec_module = exec_module
        return spec

    def wrap(self, module) -> None:
        """Put the fault in front of the function's chosen call."""
        *holders, name = self.name.split(".")
        for holder in holders:
            module = getattr(module, holder)
        original = getattr(module, name)

        def wrapped(*args, **options):
            self.calls += 1
            if self.calls == self.fault["call"]:
                Path(self.fault["stamp"]).write_text(str(time.time()))
                act(self.fault["do"])
            return original(*args, **options)

        setattr(module, name, wrapped)


def _install() -> None:
    fault = json.loads(os.environ["EVAC_JAX_FAULT"])
    words = [
        word.rpartition("/")[2] if word.endswith("launch.py") else word for word in sys.orig_argv
    ]
    if ROLES[fault["role"]] in words and all(word in words for word in fault.get("flags", ())):
        sys.meta_path.insert(0, Hook(fault))


if "EVAC_JAX_FAULT" in os.environ:
    _install()
