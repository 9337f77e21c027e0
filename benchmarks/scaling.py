"""Measures how the miniature's time and memory grow with environments, episode length, devices.

    python -m benchmarks.scaling [--parts environments length devices] [--out FILE]

environments  a chunk of the shipped world model for 1 to 64 environments: time, memory
length        episodes of 1 to 32 chunks: time per chunk and memory must not grow
devices       the learner's update on 1 to 8 virtual devices: on one machine only overhead shows

Pipeline stages have their own command, `benchmarks.pipeline`.

Each part has its own processes with one thread each; figures are medians after a warm-up. The last
line is for programs: flat_time and flat_memory are the values of the last quarter of the longest
episode over those of its second quarter.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from evac_jax.tools.command_line import KINDS

ROOT = Path(__file__).parents[1]
PARTS = ("environments", "length", "devices")
ENVIRONMENTS = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (1, 2, 4, 8, 16, 32)
LENGTH_ENVS = 4
LAYOUTS = ("1p-1x1", "1p-1x2", "1p-1x4", "1p-1x8")


def miniature_config(num_envs: int, chunks: int, stages: int = 1):
    """Return the shipped miniature's configuration at another size; episodes never end early."""
    from configs import grpo
    from evac_jax.config.build import from_config_dict

    values = grpo.get_config("miniature").to_dict()
    values["env"] |= {"num_envs": num_envs, "max_episode_steps": 8 * chunks}
    values["algo"] |= {"group_size": min(num_envs, 8), "ignore_terminations": True}
    values["algo"] |= {"global_batch": num_envs * chunks, "micro_batch": num_envs * chunks}
    values["simulator"] |= {"processes": 1}
    values["rollout"] |= {"pipeline_stages": stages}
    values["video"] |= {"save": False}
    return from_config_dict(values)


def _memory_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(name)) / 1024


def play_chunks(num_envs: int, chunks: int) -> dict[str, list[float]]:
    """Imagine one episode in every environment; return seconds and resident MB of each chunk."""
    import torch

    from evac_jax.bridge.server import build_environments
    from evac_jax.simulators import world_model_specs

    # A single environment cannot form a group; that matters to the trainer, not to the simulator.
    spec = world_model_specs(miniature_config(max(num_envs, 2), chunks))[0]
    spec["config"] = spec["config"] | {"num_envs": num_envs}
    torch.set_num_threads(1)
    (env,) = build_environments(spec)
    frames = torch.zeros(num_envs, *env.spec.image_shape, dtype=torch.uint8)
    clip = torch.zeros(0, env.spec.action.chunk, *env.spec.image_shape, dtype=torch.uint8)
    random, told = np.random.default_rng(0), {"seconds": [], "cpu": [], "mb": []}
    env.reset(np.arange(num_envs), 0, frames, clip)
    for _ in range(chunks):
        moves = random.uniform(-0.5, 0.5, (num_envs, env.spec.action.chunk, env.spec.action.dim))
        wall, cpu = time.perf_counter(), time.process_time()
        env.step(moves.astype(np.float32), frames, clip)
        told["seconds"].append(time.perf_counter() - wall)
        told["cpu"].append(time.process_time() - cpu)
        told["mb"].append(_memory_mb("VmRSS"))
    env.close()
    return told


def _row(value: int, told: dict[str, list[float]]) -> dict[str, Any]:
    """Return the medians of an episode without its first chunk, which uses another image."""
    kept = slice(1 if len(told["mb"]) > 1 else 0, None)
    return {
        "value": value,
        "chunk_ms": statistics.median(told["seconds"][kept]) * 1e3,
        "cpu_ms": statistics.median(told["cpu"][kept]) * 1e3,
        "mb": max(told["mb"]),
    }


def environments(counts: list[int]) -> dict[str, Any]:
    """Return time and memory of a chunk by the number of environments, fewest first."""
    play_chunks(min(counts), 2)  # warm-up
    return {"rows": [_row(count, play_chunks(count, 4)) for count in sorted(counts)]}


def length(counts: list[int]) -> dict[str, Any]:
    """Return time per chunk and memory by the length of an episode."""
    play_chunks(LENGTH_ENVS, 2)
    rows, told = [], {}
    for count in sorted(counts):
        told = play_chunks(LENGTH_ENVS, count)
        rows.append(_row(count, told))
    quarter = max(len(told["mb"]) // 4, 1)
    early, late = slice(quarter, 2 * quarter), slice(-quarter, None)
    # CPU time, because wall time depends on other processes of a busy machine.
    flat = {
        name: statistics.median(told[key][late]) / statistics.median(told[key][early])
        for name, key in (("flat_time", "cpu"), ("flat_memory", "mb"))
    }
    return {"rows": rows} | flat


def devices(layouts: list[str]) -> dict[str, Any]:
    """Return time of the learner's second update by the number of virtual devices."""
    from benchmarks import sharding

    chosen = [sharding.Layout.parse(name) for name in layouts]
    rows = []
    for row in sharding.measure(chosen, ("grpo",)):
        told = row["figures"]
        received = sum(told["received"].values())
        rows.append(
            {
                "value": row["devices"],
                "update_ms": told["wall_s"] * 1e3,
                "cpu_ms": told["cpu_s"] * 1e3,
                "received_mb": received / 1e6,
            }
        )
    return {"rows": rows}


def run_child(part: str, values: list) -> dict[str, Any]:
    """Measure one part in a separate process, on the CPU with one thread."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        command = [sys.executable, "-m", "benchmarks.scaling", "--here", "--parts", part]
        command += ["--values", *map(str, values), "--out", str(out)]
        settings = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=os.environ | settings, check=True)
        return json.loads(out.read_text())


def _show(part: str, told: dict[str, Any]) -> None:
    names = list(told["rows"][0])
    print("\n" + "".join(f"{part if n == 'value' else n:>14}" for n in names))
    for row in told["rows"]:
        print("".join(f"{row[n]:>14}" if n == "value" else f"{row[n]:14.2f}" for n in names))
    sys.stdout.flush()


def main() -> None:
    """Print a table per part; the last line is for programs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--environments", type=KINDS["count"], nargs="+", default=ENVIRONMENTS)
    parser.add_argument("--lengths", type=KINDS["count"], nargs="+", default=LENGTHS)
    parser.add_argument("--out", type=Path, help="also write the numbers to this file, JSON")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--values", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    measures = {"environments": environments, "length": length, "devices": devices}
    if args.here:
        (part,) = args.parts
        values = args.values if part == "devices" else [int(v) for v in args.values]
        args.out.write_text(json.dumps(measures[part](values)))
        return
    facts = machine.describe()
    machine.show(facts)
    values = {"environments": args.environments, "length": args.lengths}
    values["devices"] = LAYOUTS
    told = {}
    for part in args.parts:
        told[part] = run_child(part, values[part])
        _show(part, told[part])
    if args.out:
        args.out.write_text(json.dumps({"machine": facts} | told, indent=2) + "\n")
    flat = told.get("length", {})
    shown = [f"{name}={flat[name]:.3f}" for name in ("flat_time", "flat_memory") if name in flat]
    print("\n" + " ".join(shown))


if __name__ == "__main__":
    main()
