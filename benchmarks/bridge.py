"""Time one exchange of frames between the simulator process and the trainer.

    python -m benchmarks.bridge [--json FILE]

Request and answer with 64 x 256 x 256 x 3 bytes of frames (12.6 MB), four ways:

    zero copy   `SimulatorClient`: slots in shared memory, imported by DLPack
    owned       the same, plus one copy that the trainer keeps
    pipe        `multiprocessing.Pipe`, raw bytes, then copied into JAX
    queue       `multiprocessing.Queue`, pickled NumPy, then copied into JAX: the usual baseline

The simulator only marks the frames, so that moving them is all that is timed; every way checks the
mark. JAX is imported inside functions, because child processes import this file.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np

from evac_jax.bridge.types import EnvSpec, StepResult
from policies.spec import ActionSpec

PACKAGES = ("jax", "torch", "numpy")


class MarkingEnv:
    """An environment that writes the number of the chunk into the corner of its frames."""

    def __init__(self, config: dict):
        self.spec = EnvSpec(
            num_envs=config["num_envs"],
            image_shape=(1, config["size"], config["size"], 3),
            proprio_dim=7,
            action=ActionSpec(),
            instructions=("wait",),
            num_starts=1,
            max_episode_steps=2**31,
        )

    def reset(self, starts, seed, frames, clip):
        """Start counting."""
        frames.zero_()
        self._steps = 0
        return self._result()

    def step(self, actions, frames, clip):
        """Count."""
        self._steps += 1
        frames[-1, -1, -1, -1, -1] = self._steps % 256
        return self._result()

    def _result(self) -> StepResult:
        num_envs, no = self.spec.num_envs, np.zeros(self.spec.num_envs, bool)
        return StepResult(
            task=np.zeros(num_envs, np.int32),
            proprio=np.zeros((num_envs, 7), np.float32),
            rewards=np.zeros((num_envs, self.spec.action.chunk), np.float32),
            terminated=no,
            truncated=no,
            success=no,
        )

    def close(self):
        """Nothing to release."""


def _child(requests, answers, shape, raw: bool) -> None:
    """Answer requests through a queue (pickled) or a pipe (raw bytes) until a None comes."""
    frames, steps = np.zeros(shape, np.uint8), 0
    receive = requests.recv if raw else requests.get
    while receive() is not None:
        steps += 1
        frames.reshape(-1)[-1] = steps % 256
        if raw:
            answers.send_bytes(memoryview(frames).cast("B"))
        else:
            answers.put(frames)


def _time(exchange, repeats: int, warmup: int = 5) -> list[float]:
    """Return milliseconds of each call; `exchange` returns the mark it found."""
    times = []
    for i in range(1, warmup + repeats + 1):
        began = time.perf_counter()
        mark = exchange()
        times.append((time.perf_counter() - began) * 1e3)
        if mark() != i % 256:
            raise RuntimeError(f"exchange {i} brought the frames of another one")
    return times[warmup:]


def time_bridge(num_envs: int, size: int, repeats: int, owned: bool) -> list[float]:
    """Return milliseconds per exchange through the bridge."""
    from evac_jax.bridge.client import SimulatorClient

    spec = {
        "environment": "benchmarks.bridge:MarkingEnv",
        "config": {"num_envs": num_envs, "size": size},
    }
    actions = np.zeros((num_envs, 8, 7), np.float32)
    with SimulatorClient(spec) as client:
        client.reset(np.zeros(num_envs, np.int64), 0).release()
        previous = []

        def zero_copy():
            # Released here, so that the time to give a slot back counts.
            while previous:
                previous.pop().release()
            exchange = client.step(actions)
            exchange.frames.block_until_ready()
            previous.append(exchange)
            return lambda: int(exchange.frames[-1, -1, -1, -1, -1])

        def with_copy():
            frames = client.step(actions).owned()
            return lambda: int(frames[-1, -1, -1, -1, -1])

        return _time(with_copy if owned else zero_copy, repeats)


def time_baseline(num_envs: int, size: int, repeats: int, raw: bool) -> list[float]:
    """Return milliseconds per exchange through a pipe (`raw`) or a queue."""
    import jax.numpy as jnp

    context = multiprocessing.get_context("spawn")
    shape = (num_envs, 1, size, size, 3)
    actions = np.zeros((num_envs, 8, 7), np.float32)
    if raw:
        theirs_in, ours_out = context.Pipe(duplex=False)
        ours_in, theirs_out = context.Pipe(duplex=False)
        buffer = np.empty(shape, np.uint8)
    else:
        theirs_in = ours_out = context.Queue()
        theirs_out = ours_in = context.Queue()
    child = context.Process(target=_child, args=(theirs_in, theirs_out, shape, raw), daemon=True)
    child.start()

    def exchange():
        if raw:
            ours_out.send(actions)
            ours_in.recv_bytes_into(buffer.reshape(-1))
            frames = jnp.array(buffer)  # the buffer is written again
        else:
            ours_out.put(actions)
            frames = jnp.asarray(ours_in.get())
        frames.block_until_ready()
        return lambda: int(frames[-1, -1, -1, -1, -1])

    times = _time(exchange, repeats)
    (ours_out.send if raw else ours_out.put)(None)
    child.join()
    return times


def main() -> None:
    """Print the table; the last line is for programs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    shape = (args.num_envs, args.size, args.repeats)
    times = {
        "zero_copy": time_bridge(*shape, owned=False),
        "owned": time_bridge(*shape, owned=True),
        "pipe": time_baseline(*shape, raw=True),
        "queue": time_baseline(*shape, raw=False),
    }
    import jax

    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, JAX on {jax.devices()[0]}",
        "load": os.getloadavg()[0],
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "frames": [args.num_envs, 1, args.size, args.size, 3],
        "repeats": args.repeats,
        "median_ms": {name: statistics.median(values) for name, values in times.items()},
        "p95_ms": {name: float(np.percentile(values, 95)) for name, values in times.items()},
    }
    report["ratio"] = report["median_ms"]["queue"] / report["median_ms"]["zero_copy"]
    print(f"machine: {report['machine']}; load average {report['load']:.1f}")
    print("versions: " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()))
    print(f"frames: {report['frames']} uint8, {args.repeats} exchanges")
    print(f"{'way':12}{'median ms':>12}{'p95 ms':>12}")
    for name in times:
        print(f"{name:12}{report['median_ms'][name]:12.3f}{report['p95_ms'][name]:12.3f}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    print(f"zero_copy_ms={report['median_ms']['zero_copy']:.3f} ratio={report['ratio']:.1f}")


if __name__ == "__main__":
    main()
