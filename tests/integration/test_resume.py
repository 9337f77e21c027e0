"""Killed runs of every kind end bit for bit like unbroken ones: metrics and all saved arrays."""

import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.integration.test_cluster import hosts_flags

# One device per trainer. Ground truth and videos have tests of their own.
ALL = (
    "--config.train.iterations=3",
    "--config.checkpoint.interval=1",
    "--config.checkpoint.keep=9",
    "--config.eval.ground_truth=none",
    "--config.eval.twin_fraction=0",
    "--config.optim.lr=0.01",
)
KINDS = {
    "grpo": (),
    "ppo": (),
    "lora": ("--config.policy.lora_rank=2",),
    "behind": ("--config.train.max_staleness=1", "--config.algo.decoupled=True"),
    "hosts": (),
}


def start(launcher, kind: str, run: str, *more: str) -> list:
    """Start the trainers of a run: two on `hosts`, else one."""
    config = "configs/ppo.py" if kind == "ppo" else "configs/grpo.py"
    flags = (f"--config.log.run={run}", *ALL, *KINDS[kind], *more)
    if kind != "hosts":
        return [launcher.start(*flags, config=config, devices=1)]
    shared = hosts_flags(run)
    return [
        launcher.start(*flags, *shared, f"--config.cluster.node={node}", config=config, devices=1)
        for node in (0, 1)
    ]


def arrays(checkpoint: Path) -> dict[str, np.ndarray]:
    """Read a checkpoint as docs/checkpoints.md tells."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        names = reader.metadata(checkpoint / "state").item_metadata.tree
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        return reader.restore(
            checkpoint / "state", args=ocp.args.PyTreeRestore(restore_args=as_numpy)
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_run_ends_bit_for_bit_like_an_unbroken_one(launcher, kind):
    whole, broken = f"whole_{kind}", f"broken_{kind}"
    for trainer in start(launcher, kind, whole):
        launcher.finish(trainer)

    trainers = start(launcher, kind, broken)
    checkpoints = launcher.runs / broken / "checkpoints"
    while not (checkpoints / "1").exists():
        assert trainers[0].poll() is None, trainers[0].stdout.read()
        time.sleep(0.02)
    trainers[-1].kill()  # of two hosts the second; the first one notices
    for trainer in trainers:
        trainer.communicate(timeout=100)
        assert trainer.returncode
    assert not (checkpoints / "3").exists()
    for trainer in start(launcher, kind, broken, "--config.checkpoint.restore=auto"):
        assert "restored" in launcher.finish(trainer)

    assert all(launcher.metrics(whole)[n]["actor/grad_norm"] > 0 for n in (1, 2, 3))
    launcher.assert_same(whole, broken, (1, 2, 3), rel=0, abs=0, nan_ok=True)
    one, two = (arrays(launcher.runs / run / "checkpoints" / "3") for run in (whole, broken))
    assert one.keys() == two.keys()
    assert any(name.startswith("opt_state/") for name in one)
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name], err_msg=name)
