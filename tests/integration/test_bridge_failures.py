"""Every way a simulator process can fail, seen from the trainer."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from evac_jax.bridge.client import SimulatorClient
from evac_jax.errors import BridgeTimeoutError, ConfigError, SimulatorError
from tests.integration import fake_env

STARTS = np.array([1, 2, 3, 4])
ROOT = Path(__file__).resolve().parents[2]


def _spec(**config):
    return {"environment": "tests.integration.fake_env:make", "config": config}


def _actions(order=0.0):
    return np.full((4, 2, 7), order, np.float32)


@pytest.fixture
def client():
    with SimulatorClient(_spec(log="the arm hums"), timeout_s=30, start_timeout_s=120) as client:
        yield client


def test_traceback_arrives_when_the_environment_raises(client):
    client.reset(STARTS, 0).release()
    with pytest.raises(SimulatorError, match="the drawer is jammed") as caught:
        client.step(_actions(fake_env.RAISE))
    assert "fake_env.py" in str(caught.value)
    assert "in step" in str(caught.value)


def test_death_is_seen_at_once_when_killed_in_mid_step(client):
    exchange = client.reset(STARTS, 0)
    client.send_step(_actions(fake_env.HANG))
    deadline = time.monotonic() + 30
    while client.slots.frames(1 - exchange.slot).min() < 255 and time.monotonic() < deadline:
        time.sleep(0.01)  # until it has written half of its answer
    os.kill(client.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(SimulatorError, match="was killed by SIGKILL") as caught:
        client.receive()
    assert time.monotonic() - began < 5  # not the 30 s of a silent one
    assert "the arm hums" in str(caught.value)
    # What the trainer held is untouched, and must still be released.
    assert (np.array(exchange.frames)[0] == fake_env.frame_value(0, 1, 0, 0)).all()
    exchange.release()


def test_output_is_quoted_when_it_exits_without_a_word(client):
    client.reset(STARTS, 0).release()
    with pytest.raises(SimulatorError, match="exited with status 3") as caught:
        client.step(_actions(fake_env.EXIT))
    assert "leaving without a word" in str(caught.value)


def test_result_is_refused_when_rewards_are_not_finite(client):
    client.reset(STARTS, 0).release()
    with pytest.raises(SimulatorError, match=r"rewards.*environments \[1\]"):
        client.step(_actions(fake_env.BAD_RESULT))


def test_timeout_names_the_request_when_stuck(client, monkeypatch):
    client.reset(STARTS, 0).release()
    monkeypatch.setattr(client, "_timeout_s", 0.5)
    client.send_step(_actions(fake_env.HANG))
    pid = client.pid
    with pytest.raises(BridgeTimeoutError, match=r"\(step, slot \d\) within 0.5 s") as caught:
        client.receive()
    assert "fake_env.py" in str(caught.value)  # where it hangs
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_process_that_is_started_again_gives_the_answers_of_the_one_that_failed(number, caplog):
    def answers(restarts, fault):
        found = []
        with SimulatorClient(
            _spec(sleep_s=0.2), timeout_s=2, start_timeout_s=120, restarts=restarts
        ) as client:
            before = client.reset(STARTS, 5)
            for step in range(4):
                client.send_step(_actions(step))
                if step == 2 and fault:
                    os.kill(client.pid, fault)
                exchange = client.receive()
                # What is held all the while must not be written over by the new process.
                found.append((np.array(before.frames), before.result))
                before.release()
                before = exchange
            found.append((np.array(before.frames), before.result))
            before.release()
        return found

    whole, again = answers(0, None), answers(1, number)
    assert len(whole) == 5
    for (frames, result), (frames_again, result_again) in zip(whole, again, strict=True):
        np.testing.assert_array_equal(frames, frames_again)
        np.testing.assert_array_equal(result.rewards, result_again.rewards)
        np.testing.assert_array_equal(result.episode["length"], result_again.episode["length"])
    assert "restarts that are left: 0" in caplog.text


def test_fault_that_comes_back_ends_the_client_when_the_restarts_are_used_up(caplog):
    with SimulatorClient(_spec(), start_timeout_s=120, restarts=1) as client:
        client.reset(STARTS, 0).release()
        with pytest.raises(SimulatorError, match="the drawer is jammed"):
            client.step(_actions(fake_env.RAISE))
        assert caplog.text.count("Started again as process") == 1
        with pytest.raises(SimulatorError, match="no simulator process: .*the drawer is jammed"):
            client.reset(STARTS, 0)


def test_process_that_ends_while_it_is_parked_is_started_again_at_the_next_reset():
    with SimulatorClient(_spec(), start_timeout_s=120, restarts=1) as client:
        client.reset(STARTS, 0).release()
        client.send_park()
        os.kill(client.pid, signal.SIGKILL)
        exchange = client.reset(STARTS, 3)
        assert (np.array(exchange.frames)[1] == fake_env.frame_value(1, 2, 3, 0)).all()
        exchange.release()


def test_client_stays_closed_when_no_restart_is_left():
    client = SimulatorClient(_spec(), start_timeout_s=120)
    client.wait_until_ready()
    os.kill(client.pid, signal.SIGTERM)
    with pytest.raises(SimulatorError, match="killed by SIGTERM"):
        client.reset(STARTS, 0)
    with pytest.raises(SimulatorError, match="no simulator process: .*killed by SIGTERM"):
        client.reset(STARTS, 0)
    client.close()
    client.close()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (_spec(fail="no such weights"), "ValueError: no such weights"),
        ({"environment": "tests.integration.fake_env:missing"}, "cannot import"),
    ],
)
def test_start_fails_with_the_reason_when_the_environment_cannot_be_built(spec, message):
    with (
        SimulatorClient(spec, start_timeout_s=120, restarts=3) as client,
        pytest.raises(SimulatorError, match=message),
    ):
        client.wait_until_ready()


def test_start_times_out_when_it_takes_too_long():
    with (
        SimulatorClient(_spec(), start_timeout_s=0.01) as client,
        pytest.raises(BridgeTimeoutError, match="ready within 0.01 s"),
    ):
        client.wait_until_ready()


def test_client_is_refused_when_configured_wrongly():
    with pytest.raises(ConfigError, match="at least 2, got 1"):
        SimulatorClient(_spec(), num_slots=1)
    with pytest.raises(ConfigError, match="cuda_ipc"):
        SimulatorClient(_spec() | {"slots": "cuda_ipc"})
    with pytest.raises(ConfigError, match="slots are"):
        SimulatorClient(_spec() | {"slots": "tape"})


TRAINER = """
import os, signal, sys
import numpy as np
from evac_jax.bridge.client import SimulatorClient
client = SimulatorClient({"environment": "tests.integration.fake_env:make"}, start_timeout_s=120)
client.reset(np.zeros(4, int), 0)
client.send_step(np.full((4, 2, 7), float(sys.argv[1]), np.float32))
print(client.pid, flush=True)
if sys.argv[2] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_worker_ends_when_the_trainer_does(how):
    # In the middle of a chunk that never ends, which is the hard case.
    trainer = subprocess.run(
        [sys.executable, "-c", TRAINER, str(fake_env.HANG), how],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert trainer.returncode == (-9 if how == "kill" else 0), trainer.stderr
    pid = int(trainer.stdout)
    deadline = time.monotonic() + 10
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _runs(pid)


def _runs(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # an orphan waits for init to collect it


@pytest.mark.gpu
def test_frames_stay_on_the_gpu_when_both_share_it():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    import jax

    spec = _spec() | {"device": "cuda:0"}
    with SimulatorClient(spec, start_timeout_s=120) as client:
        for seed in range(4):
            exchange = client.reset(STARTS, seed)
            assert exchange.frames.devices() == {jax.local_devices()[0]}
            address = client.slots.tensors(exchange.slot)[0].data_ptr()
            assert exchange.frames.unsafe_buffer_pointer() == address
            values = np.array(exchange.frames)[:, 0, 0, 0, 0]
            exchange.release(values)
            assert values[2] == fake_env.frame_value(2, 3, seed, 0)
