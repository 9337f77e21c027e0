"""The same run on one device or several, on one host or two, on time or an update behind."""

import re
import signal
import socket
import time

import pytest

from tests.integration.launcher import TWO_SIMULATORS

LENGTH = "--config.train.iterations=3"
QUICK = (
    "--config.eval.ground_truth=none",
    "--config.eval.twin_fraction=0",
    "--config.eval.episodes=0",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def hosts_flags(run: str) -> tuple[str, ...]:
    """Two hosts with a simulator each, so that they play as one with two simulators."""
    return (
        f"--config.log.run={run}",
        "--config.cluster.num_nodes=2",
        f"--config.cluster.coordinator=localhost:{free_port()}",
    )


def test_nothing_is_compiled_after_the_second_iteration(launcher, plain):
    compiled = {i: line["log/compilations"] for i, line in launcher.metrics("plain").items() if i}
    assert compiled[1] > 0
    assert compiled[3] == 0


def test_two_hosts_give_the_numbers_of_one(launcher, plain):
    flags = (LENGTH, *hosts_flags("hosts"))
    processes = [
        launcher.start(*flags, f"--config.cluster.node={node}", devices=1) for node in (0, 1)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    # Every host chooses among its own episodes which ones are replayed in the ground truth.
    launcher.assert_same("plain", "hosts", (1, 2, 3), ("eval/",), rel=2e-4, abs=1e-5)
    assert "Success rate" in outputs[0]
    assert "Success rate" not in outputs[1]


@pytest.mark.slow
def test_lost_host_ends_the_run_and_the_message_tells_how_to_go_on(launcher):
    flags = (*hosts_flags("lost"), "--config.train.iterations=99", *QUICK)
    flags += ("--config.checkpoint.interval=1",)
    left, lost = (launcher.start(*flags, f"--config.cluster.node={n}", devices=1) for n in (0, 1))
    while not (launcher.runs / "lost" / "checkpoints" / "1").exists():
        assert left.poll() is None, left.stdout.read()
        time.sleep(0.05)
    lost.kill()
    output = left.communicate(timeout=100)[0]
    lost.wait()
    assert left.returncode == 2, output
    assert "host 0 of 2 stopped, and with it the run; another host may be gone" in output
    assert re.search(r"iteration \d+; go on from there with\n.*--config.checkpoint.r", output)


@pytest.mark.slow
def test_other_devices_decide_than_learn_and_all_that_idles_leaves(launcher, plain):
    output = launcher.run(
        LENGTH,
        *TWO_SIMULATORS,
        "--config.log.run=separate",
        "--config.cluster.placement.rollout=0",
        "--config.cluster.placement.actor=1-2",
        '--config.cluster.offload=("simulator","optimizer","sampler")',
        devices=3,
    )
    assert re.search(r"device 0: rollout\ndevice 1: actor\ndevice 2: actor\ncpu: simulator", output)
    launcher.assert_same("plain", "separate", (1, 2, 3), rel=2e-4, abs=1e-5)


@pytest.mark.slow
def test_run_an_update_behind_corrects_for_it_and_can_be_continued(launcher):
    flags = ("--config.train.max_staleness=1", "--config.algo.decoupled=True", *QUICK)
    flags += ("--config.optim.lr=0.01",)
    launcher.run(LENGTH, "--config.log.run=behind", *flags)
    behind = launcher.metrics("behind")
    assert behind[1]["actor/behav_approx_kl"] == pytest.approx(0, abs=1e-6)
    assert abs(behind[2]["actor/behav_approx_kl"]) > 1e-5
    for iteration in (1, 2, 3):
        assert behind[iteration]["actor/ratio_abs_first"] == pytest.approx(0, abs=1e-3)
    launcher.run(
        "--config.train.iterations=4",
        "--config.log.run=behind",
        "--config.checkpoint.restore=latest",
        *flags,
    )
    assert 4 in launcher.metrics("behind")


def test_impossible_placement_ends_before_anything_starts(launcher):
    output = launcher.run(
        "--config.log.run=nowhere", "--config.cluster.placement.actor=4", status=2
    )
    assert "there is no device 4; the trainer sees 2" in output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize(("number", "host"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_one_signal_to_one_host_ends_all_with_a_checkpoint(launcher, number, host):
    run = f"hosts_{number.name}"
    flags = (*hosts_flags(run), "--config.train.iterations=99", *QUICK)
    flags += ("--config.checkpoint.interval=1000",)
    hosts = [launcher.start(*flags, f"--config.cluster.node={n}", devices=1) for n in (0, 1)]
    metrics = launcher.runs / run / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 1):
        assert hosts[0].poll() is None, hosts[0].stdout.read()
        time.sleep(0.05)
    began = time.monotonic()
    hosts[host].send_signal(number)
    outputs = [process.communicate(timeout=100)[0] for process in hosts]
    assert [process.returncode for process in hosts] == [128 + number] * 2, "\n".join(outputs)
    assert time.monotonic() - began < 30
    last = max(launcher.metrics(run))
    for output in outputs:
        assert f"last checkpoint is that of iteration {last}; go on from there with" in output
        assert f"--config.checkpoint.restore={launcher.runs / run}" in output.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("stuck", [0, 1])
def test_stuck_host_ends_the_run_with_the_command_that_goes_on(launcher, stuck):
    run = f"hosts_stuck_{stuck}"
    flags = (*hosts_flags(run), "--config.train.iterations=99", *QUICK)
    flags += ("--config.checkpoint.interval=1",)
    hosts = [launcher.start(*flags, f"--config.cluster.node={n}", devices=1) for n in (0, 1)]
    while not (launcher.runs / run / "checkpoints" / "1").exists():
        assert hosts[0].poll() is None, hosts[0].stdout.read()
        time.sleep(0.05)
    hosts[stuck].send_signal(signal.SIGSTOP)
    output = hosts[1 - stuck].communicate(timeout=100)[0]
    hosts[stuck].kill()
    hosts[stuck].communicate()
    assert hosts[1 - stuck].returncode == 2, output
    assert f"host {stuck} has not been heard of for 40 s" in output
    assert re.search(r"iteration \d+; go on from there with\n.*--config.checkpoint.r", output)


@pytest.mark.slow
def test_hosts_with_other_settings_are_refused_before_anything_starts(launcher, tmp_path):
    flags = (*hosts_flags("others"), LENGTH)
    more = (("--config.seed=1",), ("--config.seed=2", f"--config.log.dir={tmp_path}"))
    hosts = [
        launcher.start(*flags, f"--config.cluster.node={n}", *more[n], devices=1) for n in (0, 1)
    ]
    outputs = [process.communicate(timeout=100)[0] for process in hosts]
    assert [process.returncode for process in hosts] == [2, 2], "\n".join(outputs)
    for output in outputs:
        assert "config.seed: [1, 2]" in output
        assert "config.log.dir: [" in output
    assert not (launcher.runs / "others").exists()
