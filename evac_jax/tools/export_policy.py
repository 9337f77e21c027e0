"""Writes the policy of a training run as a Hugging Face folder that any run can start from.

    python -m evac_jax.tools.export_policy --run runs/NAME --out DIR

No simulator is started: only the parameters are read from the run's checkpoint. LoRA adapters are
merged; --adapter writes them alone, in PEFT's layout.
"""

import argparse
import json
from pathlib import Path

import jax
from absl import logging
from flax import nnx

from evac_jax import checkpoint, report
from evac_jax.config import TrainConfig, from_config_dict
from evac_jax.errors import CheckpointError
from evac_jax.tools import cards
from policies.openvla_oft.export_hf import export_policy
from policies.openvla_oft.import_hf import load_policy
from policies.openvla_oft.model import OpenVLAOFT
from policies.openvla_oft.peft import save_adapter


def run_config(run: Path) -> TrainConfig:
    """Return the configuration that a run was started with.

    Raises:
        CheckpointError: the folder holds no run.
    """
    file = run / checkpoint.CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"--run: {run} is not a run folder (no {checkpoint.CONFIG_FILE})")
    return from_config_dict(json.loads(file.read_text()))


def trained_model(run: Path, step: int = -1) -> tuple[OpenVLAOFT, int]:
    """Return the policy of a run at an iteration, and which: -1 = the newest, 0 = its start.

    Raises:
        CheckpointError: no such checkpoint, or its parameters are not those of the start policy.
    """
    config = run_config(run)
    policy = config.policy
    model = load_policy(
        policy.checkpoint,
        unnorm_key=policy.unnorm_key,
        value_type=policy.value_head,
        param_dtype=policy.param_dtype,
        compute_dtype=policy.compute_dtype,
        max_prompt_length=policy.max_prompt_length,
        lora_rank=policy.lora_rank,
        lora_alpha=policy.lora_alpha,
        lora_adapter=policy.lora_adapter,
        keep_stop_token=policy.keep_stop_token,
        scan_layers=policy.scan_layers,
        seed=config.seed,
    ).model
    if step == 0:
        return model, 0
    folder = Path(config.checkpoint.dir or run / "checkpoints")
    checkpoints = checkpoint.Checkpoints(folder, keep=None)
    iteration = checkpoints.existing(step)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = checkpoints.restore_part(iteration, "params", params)
    return nnx.merge(graphdef, params, rest), iteration


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path, help="folder of the run")
    parser.add_argument("--step", type=int, default=-1, help="iteration; -1 = the newest")
    parser.add_argument(
        "--best", action="store_true", help="the iteration with the best ground-truth success"
    )
    parser.add_argument("--out", required=True, type=Path, help="new folder")
    parser.add_argument("--adapter", action="store_true", help="LoRA adapters alone, as PEFT does")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as trained")
    args = parser.parse_args()
    logging.set_verbosity(logging.INFO)
    config = run_config(args.run)
    step = report.best_iteration(args.run) if args.best else args.step
    model, iteration = trained_model(args.run, step)
    if args.adapter:
        save_adapter(model, args.out, base=config.policy.checkpoint)
    else:
        export_policy(model, args.out, source=config.policy.checkpoint, dtype=args.dtype)
    facts = cards.card(
        iteration=iteration,
        algorithm=config.algorithm,
        seed=config.seed,
        simulator=config.env.simulator,
        start=cards.read(Path(config.policy.checkpoint)),
    )
    cards.write_json(args.out / "card.json", facts)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    logging.info("iteration %d, %d parameters -> %s", iteration, parameters, args.out)


if __name__ == "__main__":
    main()
