"""Time the world model beside the naive path with the same weights and the same noise.

    python -m benchmarks.world_model [--px 64 128] [--chunks 4] [--threads N] [--processes N]
        [--flat 34] [--out F] [--compile]

UNet of 60.6 M parameters, autoencoder of 21 M, random weights; chunks of 8 frames behind 4 of
history, 4 environments, 10 DDIM steps, eta 1, float32, the full-size success classifier on every
new frame. The naive path (`baselines/evac_model.py`, `evac_unet.py`) does the work of the public
code in one process with a thread per core. Ours deals its environments to a process per core with
one thread each, as `configs/common.py` deals them to its simulators; `--processes 1` keeps all in
the process of the naive path, with its threads. Both imagine the same episodes, taking turns
chunk by chunk, after a warm-up and a comparison of their frames; every later chunk is compared
too. With --compile ours is compiled (`world_model.compile`), which takes minutes of the warm-up.
Then our path alone, packed and in one process, imagines 34 chunks in a row, with fewer DDIM steps,
for the growth of time and memory.

Ratios are medians over the turns of wall time and of CPU time; the last line gives wall time's.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.baselines.evac_model import NaiveEvac
from evac_jax.evac.config import (
    AutoencoderConfig,
    EvacConfig,
    ImageTowerConfig,
    MapConfig,
    ResamplerConfig,
    UNetConfig,
)
from evac_jax.evac.model import Camera, EvacModel
from evac_jax.evac.packed import accelerate
from evac_jax.sim.reward import RewardConfig, RewardNet

ENVS, STEPS, ETA = 4, 10, 1.0
TOLERANCE = 1e-3  # largest difference of a pixel in [-1, 1]; float32 leaves about a tenth of it
STAGES = ("tower", "encode", "unet", "decode", "classifier")
FLAT_STEPS, FLAT_WARM_UP, FLAT_SPAN = 2, 2, 8
# What `bridge/process.py` sets for a simulator on a CPU.
SIMULATOR_ENVIRON = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "-1",
}


def make_config(px: int) -> EvacConfig:
    """Return the sizes at which figures compare with the public references."""
    resampler = ResamplerConfig(dim=256, depth=4, heads=4, dim_head=64, output_dim=256)
    return EvacConfig(
        image_size=(px, px),
        unet=UNetConfig(model_channels=64, num_head_channels=32, context_dim=256),
        autoencoder=AutoencoderConfig(channels=64),
        action_resampler=resampler.replace(embedding_dim=14),
        image_resampler=resampler.replace(embedding_dim=384),
        image_tower=ImageTowerConfig(width=384, layers=8, head_width=64),
        maps=MapConfig(renderer="upstream", radius=px // 8, thickness=max(px // 32, 1)),
    )


def make_model(config: EvacConfig) -> EvacModel:
    """Return a model of random weights, none of them zero, so that every input matters."""
    torch.manual_seed(0)
    model = EvacModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


class Episode:
    """Start frames, poses, camera and noise of the environments, the same for both paths."""

    def __init__(self, config: EvacConfig, envs: int, seed: int):
        self.config, self._generator = config, torch.Generator().manual_seed(seed)
        height, width = config.image_size
        self.start = self._draw(envs, 3, height, width).clamp(-1, 1)
        intrinsic = torch.tensor([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1.0]])
        c2w = torch.eye(4)
        c2w[2, 3] = -1.0  # a metre before the workspace
        self.camera = Camera(intrinsic.expand(1, 1, 3, 3), c2w.expand(1, 1, 4, 4))
        self._window = torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 0.5]).repeat(envs, config.frames, 1)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def chunk(self, steps: int) -> tuple[Tensor, list[Tensor]]:
        """Return the pose window [B, T, 16] of the next chunk and its draws of noise."""
        chunk, past = self.config.chunk, self.config.n_previous
        moves = 0.01 * self._draw(len(self._window), chunk, 8)
        ahead = self._window[:, -1:] + moves.cumsum(1)
        self._window = torch.cat((self._window[:, -past:], ahead), 1)
        shape = (len(self.start), 4, chunk, *self.config.latent_size)
        return self._window.repeat(1, 1, 2), [self._draw(*shape) for _ in range(steps + 1)]


class Stopwatch:
    """Sums the wall seconds of named functions."""

    def __init__(self):
        self.seconds = dict.fromkeys(STAGES, 0.0)

    def watch(self, owner: object, method: str, stage: str) -> None:
        """Time a method of an object from now on."""
        function = getattr(owner, method)

        def timed(*args, **kwargs):
            began = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[stage] += time.perf_counter() - began
            return result

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        """Return the sums and begin anew."""
        sums, self.seconds = self.seconds, dict.fromkeys(STAGES, 0.0)
        return sums


class Side:
    """One of the two paths; its frames go to a classifier of its own."""

    def __init__(self, watch: Stopwatch):
        self.watch = watch
        self.classifier = RewardNet(RewardConfig()).eval()

    def begin(self, start: Tensor, capacity: int) -> None:
        """Begin an episode of at most `capacity` chunks."""
        raise NotImplementedError

    def imagine(self, poses: Tensor, camera: Camera, noise: list[Tensor]) -> Tensor:
        """Return the frames [B, chunk, 3, H, W] of the next chunk."""
        raise NotImplementedError

    def play(self, start: Tensor | None, capacity: int, *chunk: Any) -> tuple[Tensor, float]:
        """Return the frames of a chunk and the CPU seconds that they took.

        Args:
            start: frames with which an episode begins, or None.
            capacity: see `begin`.
            chunk: see `imagine`.
        """
        began = time.process_time()
        if start is not None:
            self.begin(start, capacity)
        frames = self.imagine(*chunk)
        judging = time.perf_counter()
        self.classifier.probability(frames.flatten(0, 1).clamp(-1, 1))
        self.watch.seconds["classifier"] += time.perf_counter() - judging
        return frames, time.process_time() - began


class Ours(Side):
    """Our path: `EvacModel` as the simulator process uses it."""

    def __init__(self, model: EvacModel, watch: Stopwatch, compiled: bool = False):
        super().__init__(watch)
        self.model = accelerate(model, compiled)
        watch.watch(model.first_stage_model, "encode", "encode")
        watch.watch(model.first_stage_model, "decode", "decode")
        watch.watch(model, "velocity", "unet")
        watch.watch(model, "image_tokens", "tower")

    def begin(self, start: Tensor, capacity: int) -> None:
        """Encode the start frames."""
        self.state = self.model.start(start[:, None], capacity)

    def imagine(self, poses: Tensor, camera: Camera, noise: list[Tensor]) -> Tensor:
        """Return the frames [B, chunk, 3, H, W] of the next chunk."""
        steps = len(noise) - 1
        self.state, frames = self.model.imagine(
            self.state,
            poses,
            camera,
            steps=steps,
            eta=ETA,
            noise=noise[0][:, None],
            generator=lambda index: noise[steps - index],
        )
        return frames[:, 0]


@torch.no_grad()
def serve(connection: Connection, px: int, compiled: bool) -> None:
    """Be a process that imagines; ends when the other side hangs up."""
    torch.set_num_threads(1)
    watch = Stopwatch()
    side = Ours(make_model(make_config(px)), watch, compiled)
    with contextlib.suppress(EOFError):
        while True:
            frames, cpu = side.play(*connection.recv())
            connection.send((frames.numpy(), cpu, watch.take()))


class OursInProcesses:
    """Our path, its environments dealt to processes of one thread each."""

    def __init__(self, px: int, watch: Stopwatch, compiled: bool, processes: int):
        self.watch, context = watch, multiprocessing.get_context("spawn")
        before = os.environ.copy()
        os.environ.update(SIMULATOR_ENVIRON)  # a process reads them before its first import
        self._connections = []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            context.Process(target=serve, args=(theirs, px, compiled), daemon=True).start()
            theirs.close()  # so that the end of the process is the end of the pipe
            self._connections.append(ours)
        os.environ.clear()
        os.environ.update(before)

    def play(self, start: Tensor | None, capacity: int, *chunk: Any) -> tuple[Tensor, float]:
        """See `Side`; a stage takes as long as in the process that is slowest at it."""
        poses, camera, noise = chunk
        size = len(poses) // len(self._connections)
        for index, connection in enumerate(self._connections):
            own = slice(index * size, (index + 1) * size)
            begin = None if start is None else start[own]
            connection.send((begin, capacity, poses[own], camera, [draw[own] for draw in noise]))
        parts, cpu, stages = zip(*(c.recv() for c in self._connections), strict=True)
        for stage in STAGES:
            self.watch.seconds[stage] += max(seconds[stage] for seconds in stages)
        return torch.cat([torch.from_numpy(part) for part in parts]), sum(cpu)

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()


class Theirs(Side):
    """The naive path."""

    def __init__(self, model: EvacModel, watch: Stopwatch):
        super().__init__(watch)
        self.model = NaiveEvac(model, torch.zeros(0))
        watch.watch(self.model, "encode", "encode")
        watch.watch(self.model, "decode", "decode")
        watch.watch(self.model, "denoiser", "unet")
        watch.watch(self.model, "tower", "tower")

    def begin(self, start: Tensor, capacity: int) -> None:
        """Begin an episode; nothing is computed yet, and the history is not bounded."""
        del capacity
        self.model.restart(start)

    def imagine(self, poses: Tensor, camera: Camera, noise: list[Tensor]) -> Tensor:
        """Return the frames [B, chunk, 3, H, W] of the next chunk."""
        return self.model.imagine(poses, camera, noise, ETA)


def timed(call: Callable[[], tuple[Tensor, float]]) -> tuple[Tensor, float, float]:
    """Return the frames that the call returns, its wall seconds and the CPU seconds it tells."""
    began = time.perf_counter()
    frames, cpu = call()
    return frames, time.perf_counter() - began, cpu


@torch.no_grad()
def compare(px: int, chunks: int, processes: int, compiled: bool) -> dict[str, Any]:
    """Let both paths imagine one episode; return times by path and chunk.

    Args:
        processes: of our path; with 1 it shares this one.

    Raises:
        SystemExit: their frames differ by more than the tolerance.
    """
    config, watch = make_config(px), Stopwatch()
    model = make_model(config)
    # The baseline first: it copies the weights, and ours are then rearranged for good.
    sides: dict[str, Any] = {"naive": Theirs(model, watch)}
    if processes > 1:
        sides["ours"] = OursInProcesses(px, watch, compiled, processes)
    else:
        sides["ours"] = Ours(model, watch, compiled)
    largest, rows = 0.0, []
    for seed, turns, turn_steps in ((1, 1, 1), (2, chunks, STEPS)):  # the first one warms up
        episode = Episode(config, ENVS, seed)
        rows = []
        for turn in range(turns):
            poses, noise = episode.chunk(turn_steps)
            row, frames = {}, {}
            for name, side in sides.items():
                start = episode.start if turn == 0 else None
                call = partial(side.play, start, chunks, poses, episode.camera, noise)
                frames[name], wall, cpu = timed(call)
                row[name] = {"wall_s": wall, "cpu_s": cpu, "stages": watch.take()}
            largest = max(largest, float((frames["ours"] - frames["naive"]).abs().max()))
            if not largest <= TOLERANCE:
                raise SystemExit(
                    f"the two paths differ: chunk {turn + 1} at {px} px by {largest:.2g}, "
                    f"tolerance {TOLERANCE}"
                )
            rows.append(row)
    if processes > 1:
        sides["ours"].close()
    parameters = sum(p.numel() for p in sides["naive"].model.model.parameters())
    return {
        "px": px,
        "largest_difference": largest,
        "parameters": parameters,
        "load": os.getloadavg()[0],
        "first": summary(rows[:1]),
        "later": summary(rows[1:]),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians over the rows: times of each path and ratios of the turns."""

    def median(values) -> float:
        values = list(values)
        return statistics.median(values) if values else float("nan")

    def times(name: str) -> dict[str, float]:
        own = {key: median(row[name][key] for row in rows) for key in ("wall_s", "cpu_s")}
        return own | {stage: median(row[name]["stages"][stage] for row in rows) for stage in STAGES}

    def ratio(key: str) -> float:
        return median(row["naive"][key] / row["ours"][key] for row in rows)

    return {
        "chunks": len(rows),
        "naive": times("naive"),
        "ours": times("ours"),
        "ratio": ratio("wall_s"),
        "cpu_ratio": ratio("cpu_s"),
    }


def peak_bytes(reset: bool = False) -> int:
    """Return the most memory this process held since the last reset."""
    status = Path("/proc/self/status").read_text()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


@torch.no_grad()
def flatness(px: int, chunks: int) -> dict[str, Any]:
    """Let our path imagine a long episode; return how its last chunks differ from its first."""
    config = make_config(px)
    side, episode = Ours(make_model(config), Stopwatch()), Episode(config, ENVS, 3)
    rows = {"wall_s": [], "cpu_s": [], "peak_bytes": []}
    for turn in range(chunks):
        poses, noise = episode.chunk(FLAT_STEPS)
        peak_bytes(reset=True)
        start = None if turn else episode.start
        _, wall, cpu = timed(partial(side.play, start, chunks, poses, episode.camera, noise))
        for name, value in (("wall_s", wall), ("cpu_s", cpu), ("peak_bytes", peak_bytes())):
            rows[name].append(value)
    span = min(FLAT_SPAN, (chunks - FLAT_WARM_UP) // 2)

    def deviation(values: list[float]) -> float:
        early = statistics.median(values[FLAT_WARM_UP : FLAT_WARM_UP + span])
        return abs(statistics.median(values[-span:]) / early - 1)

    deviations = {name: deviation(values) for name, values in rows.items()}
    return {"px": px, "steps": FLAT_STEPS, "span": span, "deviation": deviations, "chunks": rows}


def show(result: dict[str, Any]) -> None:
    """Print the table of one picture size."""
    print(
        f"\n{result['px']} px, {ENVS} environments, {STEPS} steps, "
        f"{result['parameters'] / 1e6:.1f} M parameters; load average {result['load']:.1f}; "
        f"largest difference of a pixel {result['largest_difference']:.1g}"
    )
    print(f"{'chunk':8}{'path':7}{'wall s':>8}{'CPU s':>8}" + "".join(f"{s:>11}" for s in STAGES))
    for kind in ("first", "later"):
        part = result[kind]
        for name in ("naive", "ours"):
            times = part[name]
            print(
                f"{kind:8}{name:7}{times['wall_s']:8.2f}{times['cpu_s']:8.2f}"
                + "".join(f"{times[stage]:11.3f}" for stage in STAGES)
            )
        print(
            f"{kind:8}ratio  {part['ratio']:8.2f}{part['cpu_ratio']:8.2f}  "
            f"(median of {part['chunks']} turns)",
            flush=True,
        )


def main() -> None:
    """Print a table per picture size; the last line is for programs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--px", type=int, nargs="*", default=[64, 128], help="picture sizes")
    parser.add_argument("--chunks", type=int, default=4, help="of an episode, the first included")
    cores = len(os.sched_getaffinity(0))
    dealt = max(n for n in range(1, ENVS + 1) if ENVS % n == 0 and n <= cores)
    parser.add_argument("--threads", type=int, default=cores, help="of this process")
    parser.add_argument("--processes", type=int, default=dealt, help="of our path")
    parser.add_argument("--flat", type=int, default=34, help="chunks of the long episode, 0: none")
    parser.add_argument("--flat_px", type=int, default=64)
    parser.add_argument("--compile", action="store_true", help="see world_model.compile")
    parser.add_argument("--out", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    if args.chunks < 2 or 0 < args.flat < FLAT_WARM_UP + 2:
        parser.error(f"--chunks must be at least 2, --flat 0 or at least {FLAT_WARM_UP + 2}")
    if args.processes < 1 or ENVS % args.processes:
        parser.error(f"--processes must divide the {ENVS} environments, got {args.processes}")
    torch.set_num_threads(args.threads)
    own_threads = args.threads if args.processes == 1 else 1
    report: dict[str, Any] = machine.describe(packages=("diffusers",))
    report |= {"threads": args.threads, "processes": args.processes}
    machine.show(report)
    print(
        f"naive: 1 process of {args.threads} threads; ours: {args.processes} of {own_threads}, "
        f"denoiser {'compiled' if args.compile else 'packed'}",
        flush=True,
    )
    report |= {"compiled": args.compile, "sizes": []}
    for px in args.px:
        report["sizes"].append(compare(px, args.chunks, args.processes, args.compile))
        show(report["sizes"][-1])
    words = [f"ratio_{size['px']}={size['later']['ratio']:.2f}" for size in report["sizes"]]
    if args.flat:
        report["flat"] = flat = flatness(args.flat_px, args.flat)
        found = flat["deviation"]
        print(
            f"\n{args.flat} chunks in a row at {args.flat_px} px, {flat['steps']} steps: the last "
            f"{flat['span']} differ from the first after {FLAT_WARM_UP} by {found['wall_s']:.1%} "
            f"in wall time, {found['cpu_s']:.1%} in CPU time, {found['peak_bytes']:.1%} in memory"
        )
        words += [f"flat_time={found['cpu_s']:.3f}", f"flat_memory={found['peak_bytes']:.3f}"]
    if args.out:
        temporary = args.out.with_name(args.out.name + ".part")
        temporary.write_text(json.dumps(report, indent=2) + "\n")
        temporary.replace(args.out)
    print(" ".join(words))


if __name__ == "__main__":
    main()
