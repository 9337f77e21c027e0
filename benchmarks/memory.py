"""Compares the estimate of `evac_jax.tools.memory` for an update with the measured peak.

A random policy of the real depths at reduced width is trained on a made-up batch, with all weights
and with LoRA, in float32, each in a separate process on one CPU device. The measured value is the
peak resident size of the second update (VmHWM, reset before it), minus what the process holds
besides arrays. With --xla, XLA's own figure for the same program is shown too.

    python -m benchmarks.memory                       # 0.3 B parameters; minutes, 12 GiB
    python -m benchmarks.memory --parameters 5e6      # the machinery only
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import policy_import
from evac_jax.tools.command_line import KINDS

ROOT = Path(__file__).parents[1]
VARIANTS = {"full": {}, "lora": {"lora_rank": 32, "lora_alpha": 32.0}}
FRAME = 64


def train_config(folder: Path, variant: str, micro_batch: int, *, remat: str):
    """Return a run's configuration: an iteration of two micro-batches, episodes of one chunk."""
    from evac_jax.config.build import default_config
    from evac_jax.config.schema import PolicyConfig

    config = default_config("grpo")
    return dataclasses.replace(
        config,
        policy=PolicyConfig(
            checkpoint=str(folder),
            unnorm_key=policy_import.UNNORM_KEY,
            max_prompt_length=policy_import.MAX_PROMPT,
            remat=remat,
            **VARIANTS[variant],
        ),
        algo=dataclasses.replace(
            config.algo, group_size=2, global_batch=2 * micro_batch, micro_batch=micro_batch
        ),
        env=dataclasses.replace(config.env, num_envs=2 * micro_batch, max_episode_steps=8),
        simulator=dataclasses.replace(config.simulator, processes=1),
    )


def made_up_batch(config, sizes):
    """Return episodes of one chunk with noise as frames; every second one succeeds."""
    import numpy as np

    from algos.types import RolloutBatch

    random, episodes, chunk = np.random.default_rng(0), config.env.num_envs, sizes.chunk
    length, tokens = sizes.max_prompt_length, (episodes, 1, chunk, sizes.action_dim)
    rewards = np.zeros((episodes, 1, chunk), np.float32)
    rewards[::2, :, -1] = 1.0
    first = sizes.first_action_token
    return RolloutBatch(
        images=random.integers(0, 256, (episodes, 1, 1, FRAME, FRAME, 3), np.uint8),
        prompt_tokens=np.ones((episodes, length), np.int32),
        prompt_mask=np.ones((episodes, length), bool),
        tokens=random.integers(first, first + sizes.num_bins, tokens, np.int32),
        log_probs=np.full(tokens, -5.5, np.float32),
        values=None,
        rewards=rewards,
        terminated=rewards > 0,
        truncated=np.zeros(rewards.shape, bool),
    )


def measure(
    folder: Path, variant: str, micro_batch: int, *, remat: str, xla: bool
) -> dict[str, float]:
    """Return estimate, measured peak and, with `xla`, XLA's figure for an update, in bytes."""
    import gc

    import jax

    from evac_jax.devices import sharding
    from evac_jax.learner import Learner
    from evac_jax.memory import trainer
    from evac_jax.memory.parts import peak
    from evac_jax.policy_import import policy_sizes
    from evac_jax.shapes import EpisodeShapes
    from policies.openvla_oft.import_hf import load_config

    config = train_config(folder, variant, micro_batch, remat=remat)
    sizes = policy_sizes(config.policy, load_config(folder))
    episode = EpisodeShapes((1, FRAME, FRAME, 3), sizes.chunk, sizes.chunk)
    estimate, _ = peak(trainer.trainer_parts(config, sizes, episode, 1, "cpu"))
    told = {"estimate": estimate}
    if xla:
        told["xla"] = sum(trainer.compiled_bytes(config, sizes, episode))
        jax.clear_caches()

    learner = Learner(config, sharding.make_mesh(1, 1, jax.devices()[:1]), episode)
    batch = learner.put(made_up_batch(config, sizes))
    metrics = learner.update(batch, jax.random.key(0))
    if metrics["actor/skipped_updates"] or not metrics["actor/grad_norm"] > 0:
        raise SystemExit(f"the update is not sound: {metrics}")
    gc.collect()
    besides = _status("VmRSS") - sum(array.nbytes for array in jax.live_arrays())
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    learner.update(batch, jax.random.key(1))
    return told | {"measured": _status("VmHWM") - besides}


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    lines = dict(line.split(":", 1) for line in text.splitlines())
    return int(lines[name].split()[0]) * 1024


def _in_process(arguments: list[str]) -> dict:
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"status {done.returncode}: {' '.join(command)}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Print a line per variant; the last line is the variant with the largest error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--parameters", type=KINDS["positive"], default=3e8, help="at least so many"
    )
    parser.add_argument("--micro_batch", type=KINDS["count"], default=8)
    parser.add_argument("--remat", default="full", help="see config.policy.remat")
    parser.add_argument("--xla", action="store_true", help="compile once more, for XLA's account")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage == "make":
        print(json.dumps(policy_import.make(args.work, args.parameters)))
        return
    if args.stage:
        folder = args.work / "source"
        told = measure(folder, args.stage, args.micro_batch, remat=args.remat, xla=args.xla)
        print(json.dumps(told))
        return
    work = Path(tempfile.mkdtemp(prefix="memory."))
    same = ["--work", str(work), "--parameters", str(args.parameters)]
    same += ["--micro_batch", str(args.micro_batch), "--remat", args.remat]
    same += ["--xla"] * args.xla
    try:
        made = _in_process([*same, "--stage", "make"])
        print(f"{made['parameters']:,} parameters, micro-batch {args.micro_batch}", flush=True)
        told = {}
        for variant in VARIANTS:
            told[variant] = _in_process([*same, "--stage", variant])
            print(f"{variant:6} {_line(told[variant])}", flush=True)
    finally:
        shutil.rmtree(work)
    print(_line(max(told.values(), key=lambda t: abs(t["estimate"] / t["measured"] - 1))))


def _line(told: dict[str, float]) -> str:
    estimate, measured = told["estimate"] / 1e9, told["measured"] / 1e9
    xla = f"xla_gb={told['xla'] / 1e9:.3f} " if "xla" in told else ""
    ratio = estimate / measured
    return f"{xla}estimate_gb={estimate:.3f} measured_gb={measured:.3f} ratio={ratio:.3f}"


if __name__ == "__main__":
    main()
