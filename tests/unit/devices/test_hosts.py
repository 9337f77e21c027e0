import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from evac_jax.devices import hosts
from evac_jax.errors import HostError

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


def _among_others(monkeypatch, *others):
    """Pretend to be the last of several hosts, whose values are `others`."""
    digests = []

    def gather(digest):
        digests.append(digest)
        return np.stack(digests)

    monkeypatch.setattr("jax.process_count", lambda: len(others) + 1)
    monkeypatch.setattr("jax.process_index", lambda: len(others))
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", gather)
    for value in others:
        hosts.compare("tasks", value)


def test_hosts_agree_when_their_values_are_the_same(monkeypatch):
    _among_others(monkeypatch, ("red", "blue"), ("red", "blue"))
    hosts.compare("tasks", ("red", "blue"))


def test_host_with_tasks_in_another_order_is_named(monkeypatch):
    _among_others(monkeypatch, ("red", "blue"))
    with pytest.raises(HostError, match=r"tasks of hosts \[1\] .*here \(host 1\).*'blue', 'red'"):
        hosts.compare("tasks", ("blue", "red"))
