"""`cluster.engine = "ray"` on a cluster of two hosts that are both this one."""

import os
import re
import signal
import subprocess
import time

import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed (requirements-ray.txt)")


@pytest.fixture(scope="module")
def address():
    """Address of a Ray cluster with two nodes."""
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}  # no token file
    memory = 100 * 2**20
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": memory}
    )
    cluster.add_node(num_cpus=2, object_store_memory=memory)
    os.environ["RAY_ADDRESS"] = cluster.address
    yield cluster.address
    del os.environ["RAY_ADDRESS"]
    cluster.shutdown()


def flags(run: str, iterations: int) -> tuple[str, ...]:
    return (
        f"--config.log.run={run}",
        f"--config.train.iterations={iterations}",
        "--config.cluster.engine=ray",
        "--config.cluster.num_nodes=2",
        "--config.checkpoint.interval=1",
    )


def test_hosts_of_a_ray_cluster_give_the_numbers_of_one_host(launcher, plain, address):
    launcher.run(*flags("ray", 2), devices=1)
    launcher.assert_same("plain", "ray", (1, 2), ("eval/",), rel=2e-4, abs=1e-5)


def test_lost_trainer_ends_the_run_and_the_message_tells_how_to_go_on(launcher, address):
    driver = launcher.start(*flags("ray_lost", 99), devices=1)
    while not (launcher.runs / "ray_lost" / "checkpoints" / "1").exists():
        assert driver.poll() is None, driver.stdout.read()
        time.sleep(0.05)
    trainers = subprocess.run(["pgrep", "-f", "ray::Trainer.run"], capture_output=True, text=True)
    os.kill(int(trainers.stdout.split()[-1]), signal.SIGKILL)
    output = driver.communicate(timeout=120)[0]
    assert driver.returncode == 2, output
    assert "HostError: host " in output
    assert re.search(r"iteration \d+; go on from there with\n.*--config.checkpoint.r", output)


def test_cluster_with_too_few_hosts_is_refused_with_what_there_is(launcher, address):
    output = launcher.run(
        *flags("ray_few", 1),
        "--config.cluster.num_nodes=3",
        "--config.env.num_envs=12",
        "--config.eval.ground_truth_envs=6",
        status=2,
    )
    assert "config.cluster.num_nodes: 3 hosts with {'CPU': 1} free are wanted" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_signal_to_the_driver_ends_all_trainers_with_a_checkpoint(launcher, address, tmp_path):
    driver = launcher.start(
        *flags("ray_stopped", 99), "--config.checkpoint.interval=1000", devices=1
    )
    metrics = launcher.runs / "ray_stopped" / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 1):
        assert driver.poll() is None, driver.stdout.read()
        time.sleep(0.05)
    driver.send_signal(signal.SIGTERM)
    output = driver.communicate(timeout=100)[0]
    assert driver.returncode == 128 + signal.SIGTERM, output
    last = max(launcher.metrics("ray_stopped"))
    assert f"last checkpoint is that of iteration {last}; go on from there with" in output
    assert "launch.py --config=configs/grpo.py" in output.splitlines()[-1]
