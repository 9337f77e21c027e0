import os
import socket
import subprocess
import sys

import pytest

from evac_jax.devices import hosts

# What `srun` tells the first task of two on a host; JAX looks for these five.
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
JOIN = """
import sys
import jax
from evac_jax.config.cluster import ClusterConfig
from evac_jax.devices import hosts
hosts._join(ClusterConfig(num_nodes=1, node=0, coordinator=sys.argv[1]))
print("visible:", jax.config.read("jax_cuda_visible_devices"))
jax.distributed.shutdown()
"""


def test_all_gpus_of_a_host_are_kept_when_slurm_starts_the_trainers(repository):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    done = subprocess.run(
        [sys.executable, "-c", JOIN, address],
        cwd=repository,
        env=os.environ | SLURM,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "visible: all" in done.stdout


@pytest.mark.parametrize(("flags", "threads"), [("4", "32"), ("1", None)])
def test_virtual_devices_get_threads_for_two_programs_at_once(monkeypatch, flags, threads):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count={flags}")
    monkeypatch.setenv("PJRT_NPROC", "")
    monkeypatch.delenv("PJRT_NPROC")
    hosts.widen_cpu_pool()
    assert os.environ.get("PJRT_NPROC") == threads
