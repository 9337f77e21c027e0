"""Compares fewer denoising steps with 50 steps on the shipped miniature: rewards and frames.

    python -m benchmarks.samplers [--per_kind 24] [--out FILE]

The actions of new ground-truth episodes of four kinds (expert, noisy, start policy, trained policy)
are played in imagination: with 50 deterministic DDIM steps, and with every other solver and number
of steps, from the same start noise. One thread; seconds are medians over the chunks.

same       share of episodes with the same verdict as 50 steps
truth      share of episodes with the same verdict as the ground truth
vs 50      PSNR of the frames of chunk 1 and chunk 4 against those of the 50 steps, dB
vs truth   the same against the ground truth

The last line is for programs: the cheapest solver whose agreement with the truth is not lower than
that of 50 steps, within TOLERANCE, its agreement with both, and the speed-up of a chunk.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from evac_jax.bridge.environment import IDLE
from evac_jax.files.recordings import Episodes
from evac_jax.sim.env import WorldModelEnv
from evac_jax.sim.recorded_starts import RecordedStarts
from evac_jax.tools.command_line import KINDS
from evac_jax.tools.trust import __main__ as trust
from evac_jax.tools.trust.replay import make_environment
from evac_jax.tools.trust.scores import psnr

REFERENCE = ("ddim", 0.0, 50)  # solver, eta, steps
OTHERS = (
    *(("ddim", 0.0, steps) for steps in (1, 2, 4, 8, 16)),
    *(("dpm++", 0.0, steps) for steps in (2, 4, 8)),
    *(("unipc", 0.0, steps) for steps in (2, 4, 8)),
    *(("ddim", 1.0, steps) for steps in (2, 8, 50)),
    *(("dpm++", 1.0, steps) for steps in (2, 8)),
)
TOLERANCE = 0.02
BATCH = 16
CHUNKS = (0, 3)  # whose frames are compared: the first and the fourth


@dataclasses.dataclass(frozen=True)
class Imagined:
    """N episodes: success at the recording's end [N], frames uint8 [N T V H W 3], s per chunk."""

    success: np.ndarray
    frames: np.ndarray
    seconds: float


def imagine(env: WorldModelEnv, data: Episodes, seed: int) -> Imagined:
    """Play the actions of all episodes from their first frames; noise depends on `seed` only."""
    spec, chunk = env.spec, env.spec.action.chunk
    steps = int(data.length.max())
    success = np.zeros(data.num_episodes, bool)
    pictures = np.zeros((data.num_episodes, steps, *spec.image_shape), np.uint8)
    frames = torch.zeros(spec.num_envs, *spec.image_shape, dtype=torch.uint8)
    clip = torch.zeros(spec.num_envs, chunk, *spec.image_shape, dtype=torch.uint8)
    seconds = []
    for first in range(0, data.num_episodes, spec.num_envs):
        episodes = np.arange(first, min(first + spec.num_envs, data.num_episodes))
        length = data.length[episodes]
        starts = np.full(spec.num_envs, IDLE, np.int64)
        starts[: len(episodes)] = episodes
        env.reset(starts, seed + first, frames, clip)
        for begin in range(0, steps, chunk):
            reached = begin + np.arange(chunk)
            alive = reached < length[:, None]  # [n K]
            actions = np.zeros((spec.num_envs, chunk, spec.action.dim), np.float32)
            rows = data.rows(episodes[:, None], np.minimum(reached, length[:, None]))
            actions[: len(episodes)] = data.actions[rows] * alive[..., None]
            began = time.perf_counter()
            result = env.step(actions, frames, clip)
            seconds.append(time.perf_counter() - began)
            pictures[episodes, begin : begin + chunk] = clip[: len(episodes)].numpy()
            inside = begin < length
            success[episodes[inside]] = result.success[: len(episodes)][inside]
    return Imagined(success, pictures, statistics.median(seconds))


def likeness(ours: np.ndarray, theirs: np.ndarray, length: np.ndarray, chunk: int) -> list[float]:
    """Return the PSNR of each of CHUNKS in dB, over the steps that the recordings have.

    Args:
        ours, theirs: uint8 [N T V H W 3].
        length: actions of each episode, [N].
        chunk: frames of a chunk.
    """
    values = []
    for number in CHUNKS:
        steps = number * chunk + np.arange(chunk)
        episode, place = np.nonzero(steps < length[:, None])
        one, other = ours[episode, steps[place]], theirs[episode, steps[place]]
        error = (one.astype(np.float32) - other) ** 2
        value = psnr(error.mean((1, 2, 3, 4)))
        values.append(float("nan") if value is None else value)
    return values


def truth_of(data: Episodes) -> np.ndarray:
    """Return the recorded frames after each action, uint8 [N T V H W 3]; padded with the last."""
    steps = np.minimum(np.arange(int(data.length.max())) + 1, data.length[:, None])
    return np.asarray(data.frames[data.rows(np.arange(data.num_episodes)[:, None], steps)])


def measure(per_kind: int, seed: int) -> list[dict[str, Any]]:
    """Return a row per solver, the reference first."""
    config = trust.preset_config("miniature")
    data = trust.record(config, trust.TRAINED_POLICY, per_kind, trust.SEED + seed)
    settings = trust.settings_of(trust.parse(["--preset=miniature", "--device=cpu"]), config)
    source = RecordedStarts(data)
    real, frames, rows = data.success_once(), truth_of(data), []
    best = None
    for solver, eta, steps in (REFERENCE, *OTHERS):
        chosen = settings | {"solver": solver, "eta": eta, "steps": steps}
        env = make_environment(chosen, source, int(data.length.max()), BATCH, BATCH)
        ours = imagine(env, data, seed)
        env.close()
        best = best or ours
        chunk = env.spec.action.chunk
        rows.append(
            {
                "solver": solver,
                "eta": eta,
                "steps": steps,
                "chunk_s": ours.seconds,
                "same": float((ours.success == best.success).mean()),
                "truth": float((ours.success == real).mean()),
                "psnr_50": likeness(ours.frames, best.frames, data.length, chunk),
                "psnr_truth": likeness(ours.frames, frames, data.length, chunk),
            }
        )
        print(show(rows[-1]), flush=True)
    return rows


HEAD = f"{'solver':>7}{'eta':>5}{'steps':>7}{'chunk s':>9}{'same %':>8}{'truth %':>9}" + (
    f"{'vs 50, 1 and 4':>17}{'vs truth, 1 and 4':>19}"
)


def show(row: dict[str, Any]) -> str:
    """Return a line of the table."""
    against = "".join(
        f"{row[name][0]:{width}.1f}{row[name][1]:7.1f}"
        for name, width in (("psnr_50", 10), ("psnr_truth", 12))
    )
    return (
        f"{row['solver']:>7}{row['eta']:5g}{row['steps']:7}{row['chunk_s']:9.2f}"
        f"{100 * row['same']:8.1f}{100 * row['truth']:9.1f}{against}"
    )


def cheapest(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the row with the fewest steps that agrees as well as the reference, the first row."""
    enough = [row for row in rows if row["truth"] >= rows[0]["truth"] - TOLERANCE]
    return min(enough, key=lambda row: (row["steps"], -row["truth"]))


def main() -> None:
    """Print the table; the last line is for programs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--per_kind", type=KINDS["count"], default=24, help="episodes of each of four kinds"
    )
    parser.add_argument("--seed", type=KINDS["natural"], default=0)
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine.describe(threads=(1,))
    machine.show(facts)
    print(f"\n{4 * args.per_kind} episodes, {BATCH} side by side; PSNR in dB\n{HEAD}")
    rows = measure(args.per_kind, args.seed)
    if args.out:
        args.out.write_text(json.dumps({"machine": facts, "rows": rows}, indent=2) + "\n")
    found = cheapest(rows)
    print(
        f"\nsolver={found['solver']} eta={found['eta']:g} steps={found['steps']} "
        f"same={found['same']:.3f} truth={found['truth']:.3f} truth_50={rows[0]['truth']:.3f} "
        f"speedup={rows[0]['chunk_s'] / found['chunk_s']:.1f}"
    )


if __name__ == "__main__":
    main()
