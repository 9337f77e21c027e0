"""Compares the speed of the world model with the naive path; weights and noise are the same.

    python -m benchmarks.world_model [--px 64 128] [--chunks 4] [--threads N] [--processes N]
        [--flat 34] [--out F] [--compile]

The UNet has 60.6 M parameters and the autoencoder 21 M, with random weights. There are chunks of 8
frames after 4 of history, 4 environments, 10 DDIM steps, eta 1, float32, and the full-size success
classifier on every new frame. The naive path (`baselines/evac_model.py`, `evac_unet.py`) does the
work of the public code in one process with a thread per core. Our path divides its environments
among one process per core with one thread each, as the simulators of `configs/miniature.py` do.
With `--processes 1` it runs in the process of the naive path, with the same threads. Both imagine
the same episodes and take turns chunk by chunk, after a warm-up. The frames of every chunk are
compared. With --compile our path is compiled (`world_model.compile`), which takes minutes of the
warm-up. Then our path alone, packed and in one process, imagines 34 chunks in a row with fewer DDIM
steps, to measure the growth of time and memory. Its last chunks take turns with the first chunks of
another episode.

Ratios of wall time and CPU time are medians over the turns; the last line has those of wall time.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.world_model_sides import (
    STAGES,
    EpisodeInputs,
    Ours,
    OursInProcesses,
    Stopwatch,
    Theirs,
    make_config,
    make_model,
)
from evac_jax.files import cards
from evac_jax.tools.command_line import KINDS

ENVS, STEPS = 4, 10
TOLERANCE = 1e-3  # largest difference of a pixel in [-1, 1]; the float32 error is about a tenth
FLAT_STEPS, FLAT_WARM_UP, FLAT_SPAN = 2, 2, 16


def timed(call: Callable[[], tuple[Tensor, float]]) -> tuple[Tensor, float, float]:
    """Return the frames of the call, its wall seconds and the CPU seconds that it reports."""
    began = time.perf_counter()
    frames, cpu = call()
    return frames, time.perf_counter() - began, cpu


@torch.no_grad()
def compare(px: int, chunks: int, processes: int, compiled: bool) -> dict[str, Any]:
    """Let both paths imagine one episode; return times by path and chunk.

    Args:
        processes: number of processes of our path; with 1 it runs in this process.

    Raises:
        SystemExit: their frames differ by more than the tolerance.
    """
    config, watch = make_config(px), Stopwatch()
    model = make_model(config)
    # The baseline comes first, because it copies the weights; then ours are packed permanently.
    sides: dict[str, Any] = {"naive": Theirs(model, watch)}
    if processes > 1:
        sides["ours"] = OursInProcesses(px, watch, compiled, processes)
    else:
        sides["ours"] = Ours(model, watch, compiled)
    largest, rows = 0.0, []
    for seed, turns, turn_steps in ((1, 1, 1), (2, chunks, STEPS)):  # the first one warms up
        episode = EpisodeInputs(config, ENVS, seed)
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
    """Return the peak memory of this process since the last reset, bytes."""
    status = Path("/proc/self/status").read_text()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


@torch.no_grad()
def flatness(px: int, chunks: int) -> dict[str, Any]:
    """Let our path imagine a long episode; return how its last chunks differ from first ones.

    For time, they are compared with the first chunks of another episode, which starts late and
    takes turns with it (median of the turns), so that a change of the machine's speed does not look
    like growth. For memory, they are compared with the first chunks of the same episode.
    """
    config = make_config(px)
    side, episode = Ours(make_model(config), Stopwatch()), EpisodeInputs(config, ENVS, 3)
    span = min(FLAT_SPAN, (chunks - FLAT_WARM_UP) // 2)
    states, rows = {"long": None, "late": None}, {"long": [], "late": []}
    for turn in range(chunks):
        both = ("long", "late") if turn % 2 else ("late", "long")
        for name in both if turn >= chunks - span - FLAT_WARM_UP else ("long",):
            poses, noise = episode.chunk(FLAT_STEPS)
            peak_bytes(reset=True)
            start, side.state = None if rows[name] else episode.start, states[name]
            _, wall, cpu = timed(partial(side.play, start, chunks, poses, episode.camera, noise))
            states[name] = side.state
            rows[name].append({"wall_s": wall, "cpu_s": cpu, "peak_bytes": peak_bytes()})

    last, first = rows["long"][-span:], rows["long"][FLAT_WARM_UP:][:span]

    def growth(kind: str, others: list[dict[str, float]]) -> float:
        pairs = zip(last, others, strict=True)
        return abs(statistics.median(row[kind] / other[kind] for row, other in pairs) - 1)

    deviations = {kind: growth(kind, rows["late"][-span:]) for kind in ("wall_s", "cpu_s")}
    deviations["peak_bytes"] = growth("peak_bytes", first)
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
    parser.add_argument(
        "--px", type=KINDS["count"], nargs="*", default=[64, 128], help="picture sizes"
    )
    parser.add_argument(
        "--chunks", type=KINDS["count"], default=4, help="of an episode, the first included"
    )
    cores = len(os.sched_getaffinity(0))
    dealt = max(n for n in range(1, ENVS + 1) if ENVS % n == 0 and n <= cores)
    parser.add_argument("--threads", type=KINDS["count"], default=cores, help="of this process")
    parser.add_argument("--processes", type=KINDS["count"], default=dealt, help="of our path")
    parser.add_argument(
        "--flat", type=KINDS["natural"], default=34, help="chunks of the long episode, 0: none"
    )
    parser.add_argument("--flat_px", type=KINDS["count"], default=64)
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
            f"{flat['span']} differ from as many of an episode begun beside them, after "
            f"{FLAT_WARM_UP}, by {found['wall_s']:.1%} in wall time and {found['cpu_s']:.1%} "
            f"in CPU time, from the first of their own by {found['peak_bytes']:.1%} in memory"
        )
        words += [f"flat_time={found['cpu_s']:.3f}", f"flat_memory={found['peak_bytes']:.3f}"]
    if args.out:
        cards.write_json(args.out, report)
    print(" ".join(words))


if __name__ == "__main__":
    main()
