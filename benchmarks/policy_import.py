"""Measures the memory for your own policy: import, training, export and import of the export.

A random checkpoint with the 982 keys of the 7B one at reduced width, bfloat16 in three shards, is
processed by the same code as a real one: two GRPO updates on a made-up batch, with all weights and
with LoRA, a checkpoint of the run, `launch.py --mode=export`, and the import of the export.

    python -m benchmarks.policy_import                        # 0.3 B parameters; minutes, 24 GiB
    python -m benchmarks.policy_import --parameters 5e6       # the machinery only

Every stage is a separate process. Its peak is the largest resident size (`ru_maxrss`). This
includes the memory of the device, because on a CPU that is host memory. No file stays mapped while
weights are read, so the peak contains no page cache.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.public_weights import UNNORM_KEY, policy_shapes, write_policy
from evac_jax.miniature.tasks import INSTRUCTIONS
from evac_jax.tools.command_line import KINDS

ROOT = Path(__file__).parents[1]
MAX_PROMPT = 48
VARIANTS = {"full": {}, "lora": {"lora_rank": 8, "lora_alpha": 16.0}}
LIMIT_GIB = 24.0


def _gb(num_bytes: float) -> float:
    return num_bytes / 1e9


def peak_gb() -> float:
    """Largest resident size of this process so far, 1e9 bytes."""
    import resource

    return _gb(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def config_of(parameters: float):
    """Return the narrowest policy of the real depths with at least this number of parameters."""
    import dataclasses

    from policies.openvla_oft.config import DINOV2_LARGE, SIGLIP_SO400M, OpenVLAOFTConfig

    for width in range(64, 4097, 64):
        narrow = {"width": width // 2, "heads": 8, "mlp_width": 2 * width}
        config = OpenVLAOFTConfig(
            dinov2=dataclasses.replace(DINOV2_LARGE, **narrow),
            siglip=dataclasses.replace(SIGLIP_SO400M, **narrow),
            image_size=56,
            hidden_size=width,
            intermediate_size=width * 43 // 16,
            num_heads=8,
            num_kv_heads=8,
            param_dtype="bfloat16",
        )
        if sum(map(math.prod, policy_shapes(config).values())) >= parameters:
            return config
    raise ValueError(f"--parameters: at most the real model's, got {parameters:g}")


def make(work: Path, parameters: float) -> dict:
    """Write the random checkpoint to WORK/source."""
    return write_policy(work / "source", config_of(parameters))


def train_config(work: Path, variant: str):
    """Return a run's configuration: GRPO, groups of two, one sample at a time."""
    import dataclasses

    from evac_jax.config.build import default_config
    from evac_jax.config.schema import PolicyConfig

    config = default_config("grpo")
    return dataclasses.replace(
        config,
        policy=PolicyConfig(
            checkpoint=str(work / "source"),
            unnorm_key=UNNORM_KEY,
            max_prompt_length=MAX_PROMPT,
            param_dtype="bfloat16",
            remat="full",
            **VARIANTS[variant],
        ),
        algo=dataclasses.replace(config.algo, group_size=2, global_batch=2, micro_batch=1),
        # In bfloat16 small steps would be lost to rounding.
        optim=dataclasses.replace(config.optim, lr=1e-3),
    )


def import_only(work: Path, parameters: float) -> dict:
    """Import the checkpoint as the trainer does and compare the memory with what is allowed."""
    from functools import partial

    import jax

    from evac_jax.devices import sharding
    from evac_jax.policy_import import import_policy

    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    before = peak_gb()
    loaded = import_policy(
        train_config(work, "full").policy, seed=0, shardings=partial(sharding.leaf_sharding, mesh)
    )
    arrays = jax.tree.leaves(jax.block_until_ready(_state(loaded.model)))
    shards = _gb(sum(array.nbytes for array in arrays))
    largest = _gb(max(path.stat().st_size for path in (work / "source").glob("*.safetensors")))
    return {"added_gb": peak_gb() - before, "allowed_gb": 1.15 * largest + shards}


def _state(model):
    from flax import nnx

    return nnx.state(model)


def train(work: Path, variant: str) -> dict:
    """Make two GRPO updates; the run is written to WORK/<variant>."""
    import jax
    import numpy as np

    from evac_jax import checkpoint
    from evac_jax.config.build import to_dict
    from evac_jax.devices import sharding
    from evac_jax.learner import Learner
    from evac_jax.shapes import EpisodeShapes

    config = train_config(work, variant)
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    learner = Learner(config, mesh, EpisodeShapes((1, 64, 64, 3), 8, 8))
    for iteration in range(2):
        batch = _made_up_batch(learner, work / "source", iteration)
        metrics = learner.update(learner.put(batch), jax.random.key(iteration))
        broken = {k: v for k, v in metrics.items() if k.startswith("actor/") and not np.isfinite(v)}
        if broken or metrics["actor/skipped_updates"] or not metrics["actor/grad_norm"] > 0:
            raise SystemExit(f"update {iteration} of {variant} is not sound: {metrics}")
    trained = peak_gb()
    run = work / variant
    run.mkdir()
    (run / checkpoint.CONFIG_FILE).write_text(json.dumps(to_dict(config)))
    checkpoints = checkpoint.Checkpoints(run / "checkpoints", keep=1)
    checkpoints.save(2, learner.state, {})
    checkpoints.close()
    return {"trained_gb": trained}


def _made_up_batch(learner, policy: Path, seed: int):
    """Two episodes of one chunk with noise as frames; one of them succeeds."""
    import jax
    import numpy as np

    from algos.types import RolloutBatch
    from policies.openvla_oft.prompt import PromptTokenizer
    from policies.types import ObsBatch

    images = np.random.default_rng(seed).integers(0, 256, (2, 1, 64, 64, 3)).astype(np.uint8)
    encoded = PromptTokenizer(policy, MAX_PROMPT).encode([INSTRUCTIONS[0]] * 2)
    tokens, mask = map(jax.numpy.asarray, encoded)
    obs = ObsBatch(images=jax.numpy.asarray(images), prompt_tokens=tokens, prompt_mask=mask)
    output = learner.sample(obs, jax.random.key(seed), np.arange(len(obs.images)))
    rewards = np.zeros((2, 1, output.tokens.shape[1]), np.float32)
    rewards[0, 0, -1] = 1.0
    return RolloutBatch(
        images=images[:, None],
        prompt_tokens=tokens,
        prompt_mask=mask,
        tokens=output.tokens[:, None],
        log_probs=output.log_probs[:, None],
        values=None,
        rewards=rewards,
        terminated=rewards > 0,
        truncated=np.zeros(rewards.shape, bool),
    )


def verify(work: Path, variant: str) -> dict:
    """Import the export of WORK/<variant> and compare every bit with the run and the source."""
    import numpy as np

    from evac_jax.files import cards
    from evac_jax.tools.policy import export as export_policy
    from policies.openvla_oft import hf_keys, lora
    from policies.openvla_oft.checkpoint_files import CheckpointFiles

    source, out, again = work / "source", work / f"{variant}_out", work / f"{variant}_again"
    run = export_policy.find_run(work / variant)
    trained, _, _ = export_policy.trained_policy(run)
    imported = export_policy.stored_model(out)
    ours = dict(hf_keys.parameters(trained))
    same = True
    for path, variable in hf_keys.parameters(imported):
        expected = lora.merged(trained, ours, path, None)
        array = np.asarray(variable[...])
        same &= array.dtype == expected.dtype and array.tobytes() == expected.tobytes()
    export_policy.export(out, again)
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    hashes = [[cards.sha256(f / name) for name in shards] for f in (source, out, again)]
    entries = [CheckpointFiles(folder).entries for folder in (source, out, again)]
    return {
        "bit_equal": bool(same and hashes[1] == hashes[2]),
        "same_layout": entries[0] == entries[1] == entries[2],
        "changed": hashes[0] != hashes[1],
    }


def _stage(args: argparse.Namespace) -> dict:
    name, _, variant = args.stage.partition(":")
    if variant:
        return {"train": train, "verify": verify}[name](args.work, variant)
    return {"make": make, "import": import_only}[name](args.work, args.parameters)


def run_process(command: list[str]) -> tuple[str, float]:
    """Run a command in the repository; return its last line of output and its peak in GB.

    Raises:
        SystemExit: the command failed.
    """
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        lines = output.read().strip().splitlines()
    if process.returncode:
        raise SystemExit(f"status {process.returncode}: {' '.join(command)}")
    return (lines[-1] if lines else ""), _gb(usage.ru_maxrss * 1024)


def measure(work: Path, parameters: float) -> dict[str, dict]:
    """Run all stages; return the figures and the peak of each."""
    this = [sys.executable, "-m", "benchmarks.policy_import", "--work", str(work)]
    told: dict[str, dict] = {}

    def stage(name: str) -> None:
        line, peak = run_process([*this, "--parameters", str(parameters), "--stage", name])
        told[name] = json.loads(line) | {"peak_gb": peak}
        print(f"{name:16}{peak:10.2f} GB", flush=True)

    stage("make")
    stage("import")
    for variant in VARIANTS:
        stage(f"train:{variant}")
        export = ["launch.py", "--mode=export", "--config=configs/grpo.py"]
        where = [
            f"--config.policy.checkpoint={work / variant}",
            f"--export_dir={work / variant}_out",
        ]
        _, peak = run_process([sys.executable, *export, *where])
        print(f"{'export:' + variant:16}{peak:10.2f} GB", flush=True)
        told[f"export:{variant}"] = {"peak_gb": peak}
        stage(f"verify:{variant}")
    return told


def main() -> None:
    """Print a line per stage; the last line is for programs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parameters", type=KINDS["positive"], default=3e8, help="at least so many"
    )
    parser.add_argument("--work", type=Path, help="folder that stays; default: a temporary one")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(_stage(args)))
        return
    work = args.work or Path(tempfile.mkdtemp(prefix="policy_import."))
    work.mkdir(parents=True, exist_ok=True)
    try:
        told = measure(work.absolute(), args.parameters)
    finally:
        if not args.work:
            shutil.rmtree(work)
    made, read = told["make"], told["import"]
    print(
        f"{made['parameters']:,} parameters, {made['tensors']} tensors, {made['shards']} shards; "
        f"the import added {read['added_gb']:.2f} GB to the bare process, "
        f"allowed are {read['allowed_gb']:.2f} GB"
    )
    verdicts = [told[f"verify:{variant}"] for variant in VARIANTS]
    equal = all(v["bit_equal"] and v["same_layout"] and v["changed"] for v in verdicts)
    print(
        f"params={made['parameters']} import_peak_gb={read['peak_gb']:.2f} "
        f"full_peak_gb={told['train:full']['trained_gb']:.2f} "
        f"lora_peak_gb={told['train:lora']['trained_gb']:.2f} bit_equal={equal}"
    )
    peak_gib = max(stage["peak_gb"] for stage in told.values()) * 1e9 / 2**30
    # For smaller policies the code itself takes more memory than the weights.
    roomy = made["parameters"] >= 1e8 and read["added_gb"] > read["allowed_gb"]
    if not equal or roomy or peak_gib > LIMIT_GIB:
        sys.exit(f"not as promised: {read}, {verdicts}, peak {peak_gib:.1f} of {LIMIT_GIB:.0f} GiB")


if __name__ == "__main__":
    main()
