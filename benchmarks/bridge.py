"""Times one exchange of frames between a simulator process and the trainer.

    python -m benchmarks.bridge [--out FILE]

An exchange is a request and an answer with 64 x 256 x 256 x 3 bytes of frames (12.6 MB). There are
four ways:

    zero copy   `SimulatorClient`: slots in shared memory, imported by DLPack
    owned       the same, plus one copy that the trainer keeps
    pipe        `multiprocessing.Pipe`, raw bytes, then copied into JAX
    queue       `multiprocessing.Queue`, pickled NumPy, then copied into JAX: the usual baseline

and, as a lower bound:

    wake        one byte there and one back through a pipe: the cost of waking two processes

The simulator only marks the frames, so that only their transfer is timed; every way checks the
mark. The ways take turns with several exchanges each, so that a busy machine slows all of them
equally. The first exchanges of a turn are not timed, because the caches then belong to another way.
The ratio is that of medians. The fastest exchange shows the cost if no other process uses the
cores; median and 95th percentile show what a run on this machine gets. The last line has medians.
JAX is imported inside functions, because child processes import this file.
"""

import argparse
import contextlib
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from evac_jax.bridge.types import EnvSpec, StepResult
from evac_jax.tools.command_line import KINDS
from policies.spec import ActionSpec

WARMUP, TURN = 5, 20


class MarkingEnv:
    """An environment that writes the chunk's number into the corner of its frames."""

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
            answers.send_bytes(frames.data.cast("B"))
        else:
            answers.put(frames)


def mark_of(frames) -> int:
    """Return the mark in a JAX array; it is read in place, without a computation to wait for."""
    return int(np.asarray(frames)[-1, -1, -1, -1, -1])


Exchange = Callable[[], Callable[[], int]]


class Way:
    """One way to exchange frames, with the times of its exchanges so far.

    Args:
        exchange: does one exchange and returns a function that reads the mark in the frames.
    """

    def __init__(self, exchange: Exchange):
        self._exchange, self._count, self.times = exchange, 0, []

    def turn(self, repeats: int, *, timed: bool = True) -> None:
        """Do `repeats` exchanges and record their times, in milliseconds.

        Raises:
            RuntimeError: an exchange returned the frames of another one.
        """
        for _ in range(repeats):
            self._count += 1
            began = time.perf_counter()
            mark = self._exchange()
            took = (time.perf_counter() - began) * 1e3
            if mark() != self._count % 256:
                raise RuntimeError(f"exchange {self._count} brought the frames of another one")
            if timed:
                self.times.append(took)


@contextlib.contextmanager
def bridge(num_envs: int, size: int, *, owned: bool, device: str = "cpu") -> Iterator[Exchange]:
    """Yield an exchange through the bridge.

    Args:
        num_envs, size: of the frames, `size` pixels per side.
        owned: also copy the frames.
        device: torch device of the simulator; frames stay on it if JAX can use it too.
    """
    from evac_jax.bridge.client import SimulatorClient

    spec = {
        "environment": "benchmarks.bridge:MarkingEnv",
        "config": {"num_envs": num_envs, "size": size},
        "device": device,
    }
    actions = np.zeros((num_envs, 8, 7), np.float32)
    with SimulatorClient(spec) as client:
        client.reset(np.zeros(num_envs, np.int64), 0).release()
        previous = []

        def zero_copy():
            # Released here, so that the time for releasing a slot is included.
            while previous:
                previous.pop().release()
            exchange = client.step(actions)
            exchange.frames.block_until_ready()
            previous.append(exchange)
            return lambda: mark_of(exchange.frames)

        def with_copy():
            frames = client.step(actions).owned()
            return lambda: mark_of(frames)

        yield with_copy if owned else zero_copy


def time_bridge(num_envs: int, size: int, repeats: int, device: str = "cpu") -> list[float]:
    """Return milliseconds per exchange through the bridge, without a copy."""
    with bridge(num_envs, size, owned=False, device=device) as exchange:
        way = Way(exchange)
        way.turn(WARMUP, timed=False)
        way.turn(repeats)
    return way.times


@contextlib.contextmanager
def baseline(num_envs: int, size: int, kind: str) -> Iterator[Exchange]:
    """Yield an exchange through a "pipe" of raw bytes or a "queue"; "wake" sends one byte."""
    import jax.numpy as jnp

    context = multiprocessing.get_context("spawn")
    shape = (num_envs, 1, size, size, 3) if kind != "wake" else (1, 1, 1, 1, 1)
    actions = np.zeros((num_envs, 8, 7), np.float32) if kind != "wake" else 0
    raw, buffer = kind != "queue", np.empty(shape, np.uint8)
    if raw:
        theirs_in, ours_out = context.Pipe(duplex=False)
        ours_in, theirs_out = context.Pipe(duplex=False)
    else:
        theirs_in = ours_out = context.Queue()
        theirs_out = ours_in = context.Queue()
    child = context.Process(target=_child, args=(theirs_in, theirs_out, shape, raw), daemon=True)
    child.start()

    def exchange():
        if raw:
            ours_out.send(actions)
            ours_in.recv_bytes_into(buffer.reshape(-1))
            if kind == "wake":
                return lambda: int(buffer[-1, -1, -1, -1, -1])
            frames = jnp.array(buffer)  # a copy, because the buffer is written again
        else:
            ours_out.put(actions)
            frames = jnp.asarray(ours_in.get())
        frames.block_until_ready()
        return lambda: mark_of(frames)

    try:
        yield exchange
    finally:
        (ours_out.send if raw else ours_out.put)(None)
        child.join()


def measure(num_envs: int, size: int, repeats: int) -> dict[str, list[float]]:
    """Return milliseconds per exchange by way; the ways take turns of `TURN` exchanges."""
    with contextlib.ExitStack() as stack:
        shape = (num_envs, size)
        ways = {
            "wake": baseline(*shape, "wake"),
            "zero_copy": bridge(*shape, owned=False),
            "owned": bridge(*shape, owned=True),
            "pipe": baseline(*shape, "pipe"),
            "queue": baseline(*shape, "queue"),
        }
        ways = {name: Way(stack.enter_context(way)) for name, way in ways.items()}
        for way in ways.values():
            way.turn(WARMUP, timed=False)
        for _ in range(-(-repeats // TURN)):
            for way in ways.values():
                way.turn(WARMUP, timed=False)  # refill the caches after the turns of the others
                way.turn(TURN)
    return {name: way.times for name, way in ways.items()}


def main() -> None:
    """Print the table; the last line is for programs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-envs", type=KINDS["count"], default=64)
    parser.add_argument("--size", type=KINDS["count"], default=256)
    parser.add_argument("--repeats", type=KINDS["count"], default=100)
    parser.add_argument("--out", type=Path, help="also write the numbers to this file, JSON")
    args = parser.parse_args()
    from benchmarks import machine  # imports torch, which the baselines' children do not need

    facts = machine.describe()
    machine.show(facts)
    times = measure(args.num_envs, args.size, args.repeats)
    figures = {
        name: {
            "median_ms": statistics.median(values),
            "fastest_ms": min(values),
            "p95_ms": float(np.percentile(values, 95)),
        }
        for name, values in times.items()
    }
    print(
        f"frames: {args.num_envs} x {args.size} x {args.size} x 3 uint8; {args.repeats} exchanges"
    )
    print(f"{'way':12}{'median ms':>12}{'fastest ms':>12}{'p95 ms':>12}")
    for name, row in figures.items():
        print(f"{name:12}" + "".join(f"{value:12.3f}" for value in row.values()))
    ratio = figures["queue"]["median_ms"] / figures["zero_copy"]["median_ms"]
    if args.out:
        report = {"machine": facts, "num_envs": args.num_envs, "size": args.size, "ways": figures}
        args.out.write_text(json.dumps(report | {"ratio": ratio}, indent=2) + "\n")
    print(f"zero_copy_ms={figures['zero_copy']['median_ms']:.3f} ratio={ratio:.1f}")


if __name__ == "__main__":
    main()
