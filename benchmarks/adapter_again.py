"""Imports an exported adapter as a run that goes on from it would, and writes it again.

    python -m benchmarks.adapter_again --run RUN --adapter DIR --out NEW

RUN is where the adapter comes from: its start policy and settings are used. If nothing is lost,
both files have the same bytes.
"""

import argparse
import dataclasses
from pathlib import Path


def write_again(source: Path, adapter: Path, out: Path) -> None:
    """Write the new folder `out` with the adapter that was imported.

    Raises:
        CheckpointError: `source` is no run, or the adapter cannot be imported.
    """
    from evac_jax.errors import CheckpointError
    from evac_jax.policy_import import import_policy
    from evac_jax.tools.policy.export import find_run
    from policies.openvla_oft.peft import save_adapter

    run = find_run(source)
    if run is None:
        raise CheckpointError(f"--run: expected a run's folder, got {source}")
    policy = dataclasses.replace(run.policy, lora_adapter=str(adapter))
    save_adapter(import_policy(policy, seed=run.seed).model, out, base=policy.checkpoint)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("run", "adapter", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    write_again(args.run, args.adapter, args.out)


if __name__ == "__main__":
    main()
