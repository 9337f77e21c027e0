"""Compares the speed of the policy with plain PyTorch: rollout forward, forward + backward.

    python -m benchmarks.policy [--threads 2 1] [--repeats 7] [--batch 8] [--out FILE] [--remat]

The policy has hidden size 512, 6 layers, two towers of depth 4 and width 256, 440 tokens and 61.9 M
parameters. The baseline (`baselines/policy_torch.py`) has the same weights and does the work of the
public references. Both get the same uint8 frames and prompts of different lengths, in float32. Each
side runs in a separate process, bound to as many cores as threads. The sides take turns, and a
ratio is the median over the turns, so that a busy machine slows both equally. CPU time is shown
too. Before the timing, log-probs, entropies, values and all gradients of both are compared. Our
side keeps freed memory, as a trainer does (`evac_jax/devices/malloc.py`); MALLOC_... variables set
for the command apply to both sides. --remat instead times only our side, by what its backward pass
recomputes, scanned and unrolled.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from benchmarks import machine
from evac_jax.devices.malloc import keep_freed_memory
from evac_jax.evac.lean_imports import ensure_torchvision
from evac_jax.tools.command_line import KINDS
from policies.openvla_oft import hf_keys
from policies.openvla_oft.config import REMAT_POLICIES, OpenVLAOFTConfig, VisionTowerConfig
from policies.openvla_oft.model import OpenVLAOFT
from policies.types import ObsBatch

ensure_torchvision()  # timm and transformers import it, and its build may not fit torch's

from benchmarks.baselines.policy_torch import TorchOpenVLAOFT  # noqa: E402

TEMPERATURE = 1.6
GROUP = 8
CONFIG = OpenVLAOFTConfig(
    dinov2=VisionTowerConfig(256, 4, 8, 1024, True, 4, layer_scale=True),
    siglip=VisionTowerConfig(256, 4, 8, 1024, attention_pool=True),
    hidden_size=512,
    intermediate_size=1376,
    num_layers=6,
    num_heads=8,
    num_kv_heads=8,
    value_type="chunk_level",
    scan_layers=False,
)
# Largest allowed differences, about ten times the float32 error: absolute for log-probs, entropies
# and values; |ours - theirs| / |theirs| over all parameters for gradients.
TOLERANCES = {"log_probs": 1e-4, "entropy": 1e-4, "values": 1e-4, "gradients": 1e-4}
Side = dict[str, Callable[[], Any]]


def checkpoint_arrays(state: nnx.State, config: OpenVLAOFTConfig) -> dict[str, np.ndarray]:
    """Return parameters, or arrays of the same shapes, with the checkpoint's names and axes."""
    arrays = {}
    for path, variable in hf_keys.parameters(state):
        source, array = hf_keys.source_of(path, config), np.asarray(variable[...])
        layers = array if source.stacked else [array]
        arrays |= {k: source.to_hf(x) for k, x in zip(source.keys, layers, strict=True)}
    return arrays


def make_inputs(config: OpenVLAOFTConfig, batch: int) -> dict[str, np.ndarray]:
    """Return frames, prompts with 0 to 90 pads, random bins, advantages and returns."""
    rng = np.random.default_rng(0)
    length = config.max_prompt_length
    tokens = rng.integers(3, config.first_action_token, (batch, length))
    mask = np.ones((batch, length), bool)
    for row, padding in enumerate(np.linspace(0, 90, batch).astype(int)):
        mask[row, 1 : 1 + padding] = False
    tokens[:, 0], tokens[~mask] = 1, config.pad_token_id
    size, chunk = config.image_size, (batch, config.chunk, config.action_dim)
    return {
        "images": rng.integers(0, 256, (batch, size, size, 3), np.uint8),
        "tokens": tokens,
        "mask": mask,
        "bins": rng.integers(0, config.num_bins, chunk),
        "advantages": rng.standard_normal(batch).astype(np.float32),
        "returns": rng.standard_normal((batch, 1)).astype(np.float32),
    }


def make_ours(model: OpenVLAOFT, inputs: dict[str, np.ndarray]) -> Side:
    """Return the timed calls of our policy, which are compiled at their first use.

    "memory" returns the bytes that XLA needs for a training step besides its arguments.
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    obs = ObsBatch(
        images=jnp.asarray(inputs["images"][:, None]),
        prompt_tokens=jnp.asarray(inputs["tokens"], jnp.int32),
        prompt_mask=jnp.asarray(inputs["mask"]),
    )
    actions = jnp.asarray(inputs["bins"] + model.config.first_action_token, jnp.int32)
    advantages, returns = (jnp.asarray(inputs[name]) for name in ("advantages", "returns"))

    def sample(params, rest, obs, key):
        return nnx.merge(graphdef, params, rest).sample(obs, key, temperature=TEMPERATURE)

    def objective(params, rest, obs, actions):
        policy = nnx.merge(graphdef, params, rest)
        out = policy.evaluate(obs, actions, temperature=TEMPERATURE)
        gain = jnp.mean(out.log_probs * advantages[:, None, None])
        return 0.5 * jnp.mean((out.values - returns) ** 2) - gain, out

    sample = jax.jit(sample)
    step = jax.jit(jax.grad(objective, has_aux=True))
    key = jax.random.key(0)
    return {
        "forward": lambda: jax.block_until_ready(sample(params, rest, obs, key)),
        "train": lambda: jax.block_until_ready(step(params, rest, obs, actions)),
        "memory": lambda: (
            step.lower(params, rest, obs, actions).compile().memory_analysis().temp_size_in_bytes
        ),
    }


def make_theirs(net: TorchOpenVLAOFT, inputs: dict[str, np.ndarray]) -> Side:
    """Return the timed calls of the baseline."""
    obs = [torch.from_numpy(inputs[name]) for name in ("images", "tokens", "mask")]
    first = net.config.first_action_token
    actions = torch.from_numpy(inputs["bins"].reshape(len(inputs["bins"]), -1) + first)
    advantages, returns = (torch.from_numpy(inputs[name]) for name in ("advantages", "returns"))

    def train():
        net.zero_grad(set_to_none=True)
        log_probs, entropy, values = net.evaluate(*obs, actions, TEMPERATURE)
        gain = (log_probs * advantages[:, None]).mean()
        (0.5 * ((values - returns) ** 2).mean() - gain).backward()
        return log_probs, entropy, values

    return {"forward": lambda: net.sample(*obs, TEMPERATURE), "train": train}


def compare(config: OpenVLAOFTConfig, ours: Side, theirs: Side, net) -> dict[str, float]:
    """Return the largest differences between the two sides.

    Raises:
        SystemExit: a difference exceeds its tolerance, so the two do not compute the same.
    """
    gradient, out = ours["train"]()
    log_probs, entropy, values = (x.detach().numpy() for x in theirs["train"]())
    golden = {n: p.grad.numpy() for n, p in net.named_parameters() if p.grad is not None}
    mine = checkpoint_arrays(gradient, config)
    mine = {name.replace(".scale_factor", ".gamma"): array for name, array in mine.items()}
    if set(mine) != set(golden):
        raise SystemExit(f"gradients of different tensors: {sorted(set(mine) ^ set(golden))}")
    square = sum(np.sum((mine[n] - g).astype(np.float64) ** 2) for n, g in golden.items())
    total = sum(np.sum(g.astype(np.float64) ** 2) for g in golden.values())
    found = {
        "log_probs": float(np.abs(out.log_probs.reshape(log_probs.shape) - log_probs).max()),
        "entropy": float(np.abs(out.entropy.reshape(entropy.shape) - entropy).max()),
        "values": float(np.abs(out.values - values).max()),
        "gradients": float(np.sqrt(square / total)),
    }
    for name, limit in TOLERANCES.items():
        if not found[name] <= limit:
            raise SystemExit(f"the two sides differ: {name} by {found[name]:.2g}, limit {limit}")
    return found


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Return (wall seconds, CPU seconds of this process) of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def make_sides(batch: int) -> tuple[dict[str, Callable[[], Side]], TorchOpenVLAOFT, int]:
    """Return functions that make each side, the baseline's network, the number of parameters."""
    model = OpenVLAOFT(CONFIG, rngs=nnx.Rngs(0))
    weights = checkpoint_arrays(nnx.state(model), CONFIG)
    net, inputs = TorchOpenVLAOFT(CONFIG, weights), make_inputs(CONFIG, batch)
    sides = {"theirs": lambda: make_theirs(net, inputs), "ours": lambda: make_ours(model, inputs)}
    return sides, net, sum(array.size for array in weights.values())


def bind(threads: int) -> int:
    """Bind this process to as many cores as threads; return how many it has.

    Call it before JAX starts its devices, because JAX makes one thread per core that it may use.
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    return len(os.sched_getaffinity(0))


def serve(name: str, threads: int, batch: int, pipe: Connection) -> None:
    """Time the requested stages of one side; the first time of each stage is its warm-up."""
    bind(threads)
    if name == "ours":
        keep_freed_memory()  # as a trainer does
    sides, _, _ = make_sides(batch)
    side = sides[name]()
    del sides
    while stage := pipe.recv():
        pipe.send(timed(side[stage]))


def measure(threads: int, batch: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Let the sides take turns; return for each stage the medians of both and of their ratio."""
    context, results, sides = multiprocessing.get_context("spawn"), {}, {}
    for name in ("theirs", "ours"):
        sides[name], other = context.Pipe()
        context.Process(target=serve, args=(name, threads, batch, other), daemon=True).start()
    for stage in ("forward", "train"):
        times = {name: [] for name in sides}
        for turn in range(repeats + 1):
            for name, pipe in sides.items():
                pipe.send(stage)
                seconds = pipe.recv()
                times[name] += [seconds] if turn else []
        ratios = np.divide(times["theirs"], times["ours"])
        results[stage] = {
            "wall_s": {name: statistics.median(w for w, _ in times[name]) for name in sides},
            "cpu_s": {name: statistics.median(c for _, c in times[name]) for name in sides},
            "ratio": float(np.median(ratios[:, 0])),
            "cpu_ratio": float(np.median(ratios[:, 1])),
        }
    for pipe in sides.values():
        pipe.send("")
    return results


def check(threads: int, batch: int) -> dict[str, Any]:
    """Compare the results of both sides; return their differences and sizes."""
    cores = bind(threads)
    sides, net, parameters = make_sides(batch)
    differences = compare(CONFIG, sides["ours"](), sides["theirs"](), net)
    return {"threads": cores, "parameters": parameters, "differences": differences}


def run(threads: int, batch: int, repeats: int) -> dict[str, Any]:
    """Compare the sides, then measure them with this number of threads.

    The comparison runs in a separate process that ends before the timing, because its three
    gigabytes of memory slowed both sides, and ours more.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        told = pool.submit(check, threads, batch).result()
    return told | {
        "batch": batch,
        "repeats": repeats,
        "load": os.getloadavg()[0],
        "stages": measure(threads, batch, repeats),
    }


def run_remat(threads: int, batch: int, repeats: int) -> list[dict[str, Any]]:
    """Time our training step for each choice of remat, in this process, in turns."""
    bind(threads)
    keep_freed_memory()
    inputs, sides = make_inputs(CONFIG, batch), {}
    for scan in (True, False):
        for remat in REMAT_POLICIES:
            config = dataclasses.replace(CONFIG, remat=remat, scan_layers=scan)
            sides[scan, remat] = make_ours(OpenVLAOFT(config, rngs=nnx.Rngs(0)), inputs)
    times = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            wall, _ = timed(side["train"])
            times[name] += [wall] if turn else []  # the first one compiles
    return [
        {"scan": scan, "remat": remat, "wall_s": statistics.median(times[scan, remat]),
         "temp_mb": side["memory"]() / 1e6}
        for (scan, remat), side in sides.items()
    ]  # fmt: skip


def run_child(threads: int, batch: int, repeats: int, *more: str) -> Any:
    """Measure with this number of threads, in a separate process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        command = [sys.executable, "-m", "benchmarks.policy", "--here", "--threads", str(threads)]
        command += list(more)
        command += ["--batch", str(batch), "--repeats", str(repeats), "--out", str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, env=environment, check=True)
        return json.loads(out.read_text())


def show(result: dict[str, Any]) -> None:
    """Print the table of one number of threads."""
    found = ", ".join(f"{name} {value:.1g}" for name, value in result["differences"].items())
    print(f"\nthreads {result['threads']}, load average {result['load']:.1f}; differences: {found}")
    head = ("PyTorch s", "ours s", "ratio", "CPU s", "CPU s", "ratio")
    print(f"{'stage':10}" + "".join(f"{name:>10}" for name in head))
    for stage, row in result["stages"].items():
        wall, cpu = row["wall_s"], row["cpu_s"]
        print(
            f"{stage:10}{wall['theirs']:10.3f}{wall['ours']:10.3f}{row['ratio']:10.2f}"
            f"{cpu['theirs']:10.2f}{cpu['ours']:10.2f}{row['cpu_ratio']:10.2f}",
            flush=True,
        )


def show_remat(rows: list[dict[str, Any]]) -> None:
    """Print the table of what the backward pass recomputes; the last line is for programs."""
    print(f"\n{'layers':>9}{'remat':>7}{'train s':>9}{'temporary MB':>14}")
    for row in rows:
        kind = "scanned" if row["scan"] else "unrolled"
        print(f"{kind:>9}{row['remat']:>7}{row['wall_s']:9.3f}{row['temp_mb']:14.0f}")
    scanned = {row["remat"]: row for row in rows if row["scan"]}
    print(
        " ".join(
            f"{name}_{what}={scanned[name][key] / scanned['none'][key]:.2f}"
            for name in ("dots", "full")
            for what, key in (("time", "wall_s"), ("memory", "temp_mb"))
        )
    )


def main() -> None:
    """Print a table per number of threads; the last line is for programs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=KINDS["count"], nargs="+", default=[2, 1])
    parser.add_argument("--batch", type=KINDS["count"], default=8)
    parser.add_argument("--repeats", type=KINDS["count"], default=7)
    parser.add_argument("--out", type=Path, help="also write the numbers to this file")
    parser.add_argument("--remat", action="store_true", help="ours by what it recomputes")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        here = run_remat if args.remat else run
        args.out.write_text(json.dumps(here(args.threads[0], args.batch, args.repeats)))
        return
    report: dict[str, Any] = machine.describe(packages=("transformers", "timm"))
    machine.show(report)
    if args.remat:
        report["remat"] = run_child(args.threads[0], args.batch, args.repeats, "--remat")
        if args.out:
            args.out.write_text(json.dumps(report, indent=2) + "\n")
        show_remat(report["remat"])
        return
    report["runs"] = []
    for threads in args.threads:
        report["runs"].append(run_child(threads, args.batch, args.repeats))
        show(report["runs"][-1])
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    stages = report["runs"][0]["stages"]
    print(
        f"forward_ratio={stages['forward']['ratio']:.2f} train_ratio={stages['train']['ratio']:.2f}"
    )


if __name__ == "__main__":
    main()
