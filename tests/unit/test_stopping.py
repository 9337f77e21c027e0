import os
import signal
import subprocess
import sys
import time

import pytest

from evac_jax.errors import StoppedError
from evac_jax.stopping import Stopping, how_to_go_on

RUN = """
import hashlib, sys
from evac_jax.errors import StoppedError
from evac_jax.stopping import Stopping
try:
    with Stopping(float(sys.argv[1]), lambda: "Go on with X") as stopping, stopping.held():
        print("runs", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes, as a long call of JAX's
except StoppedError as error:
    print(error)
"""


@pytest.fixture(autouse=True)
def handlers_as_before():
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def stop(number: int, done: list) -> None:
    """Be stopped, first where a run may not be interrupted, then where it may."""
    with Stopping(1e6, lambda: "Go on with X") as stopping, stopping.held():
        if done:
            with stopping.interruptible():
                os.kill(os.getpid(), number)
                time.sleep(60)
        os.kill(os.getpid(), number)
        done.append("held")
        with stopping.interruptible():
            done.append("interruptible")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signal_ends_a_run_at_once_when_it_may_be_interrupted(number):
    began = time.monotonic()
    with pytest.raises(StoppedError, match=f"{number.name}. Go on with X") as stopped:
        stop(number, done := ["before"])
    assert stopped.value.signal == number
    assert done == ["before"]
    assert time.monotonic() - began < 10


def test_signal_waits_when_the_run_may_not_be_interrupted():
    with pytest.raises(StoppedError):
        stop(signal.SIGTERM, done := [])
    assert done == ["held"]


def test_handlers_are_as_before_when_no_signal_came():
    before = signal.getsignal(signal.SIGTERM)
    with Stopping(1e6, str):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def run(repository, grace_s: float, *signals: int) -> tuple[int, str]:
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(grace_s)],
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "runs\n"
    for number in signals:
        process.send_signal(number)
        time.sleep(0.2)  # or the system may deliver them in another order
    _, told = process.communicate(timeout=30)
    return process.returncode, told


def test_second_signal_ends_the_process_where_it_is(repository):
    status, told = run(repository, 1e6, signal.SIGTERM, signal.SIGINT)
    assert status == 128 + signal.SIGTERM
    assert "a second signal, SIGINT, ended the run at once. Go on with X" in told


def test_process_ends_when_the_grace_is_over(repository):
    status, told = run(repository, 0.5, signal.SIGHUP)
    assert status == 128 + signal.SIGHUP
    assert "did not end within 0.5 s (train.stop_grace_s)" in told
    assert "Go on with X" in told


def test_command_that_goes_on_restores_the_run_in_place_of_what_was_typed(tmp_path, monkeypatch):
    flags = ["--config.checkpoint.restore", "latest", "--config.checkpoint.step=3", "--config=a b"]
    monkeypatch.setattr(sys, "argv", ["launch.py", *flags])
    assert how_to_go_on(tmp_path, tmp_path).endswith(
        "launch.py --config.checkpoint.restore latest --config.checkpoint.step=3 '--config=a b'"
    )
    for iteration in (9, 10):
        (tmp_path / "checkpoints" / str(iteration)).mkdir(parents=True)
    text = how_to_go_on(tmp_path, tmp_path / "checkpoints")
    assert "iteration 10; go on" in text
    assert text.endswith(f"launch.py '--config=a b' --config.checkpoint.restore={tmp_path}")
