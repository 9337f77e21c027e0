"""Two hosts that are processes of this one; each makes calls and prints what it got."""

import re
import socket
import subprocess
import sys

import pytest

from evac_jax.devices import together
from evac_jax.errors import HostError
from evac_jax.files import claim

HOST = """
import dataclasses, importlib, os, sys, time
from absl import logging
import jax
from evac_jax.config.build import default_config
from evac_jax.config.cluster import ClusterConfig
from evac_jax.devices import hosts, together
from evac_jax.errors import EvacJaxError

host, address, log_dir = int(sys.argv[1]), sys.argv[2], sys.argv[3]
hosts._join(ClusterConfig(num_nodes=2, node=host, coordinator=address))
jax.process_count()  # hosts wait here for each other
config = default_config("grpo")
config = dataclasses.replace(config, log=dataclasses.replace(config.log, dir=log_dir))

def having(section, **fields):
    part = dataclasses.replace(getattr(config, section), **fields)
    return dataclasses.replace(config, **{section: part})

def in_own_folder(config):
    os.makedirs(f"{log_dir}-{host}", exist_ok=True)
    os.chdir(f"{log_dir}-{host}")
    together.SHARED_S = 1  # by then host 0 has made it
    return config

for code in sys.argv[4:]:
    try:
        print(f"result: {eval(code)}", flush=True)
    except EvacJaxError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
together._client().wait_at_barrier("end", 30_000)
"""
STOP = """
(lambda begun: (lambda stop: (
    [stop.is_here() for _ in range(5 + 20 * host)],
    stop.ask(15) if host == 0 else None,
    next(n for n in range(6 + 20 * host, 999) if time.sleep(0.05) or stop.is_here()),
    stop.close(),
    begun,
))(together.StopTogether(begun.append, print)))([])[2::2]
"""


def outputs(repository, tmp_path, *codes, log_dirs=("logs", "logs")) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(host), address, str(tmp_path / folder), *codes],
            cwd=repository,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host, folder in enumerate(log_dirs)
    ]
    told = [host.communicate(timeout=120) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], told
    return [out for out, _ in told]


def test_hosts_stop_at_one_place_when_one_of_them_is_asked(repository, tmp_path):
    one, two = outputs(repository, tmp_path, STOP.replace("\n", ""))
    assert one == two
    assert "[15])" in one
    assert int(one.split("(")[1].split(",")[0]) > 25  # no host is beyond it


def test_hosts_are_refused_when_their_settings_differ(repository, tmp_path):
    code = "together.check_same(dataclasses.replace(config, seed=host))"
    for told in outputs(repository, tmp_path, code, log_dirs=("logs", "others")):
        assert "ConfigError: the hosts of a run need the same settings" in told
        assert "config.seed: [0, 1]" in told
        assert f"config.log.dir: ['{tmp_path}/logs', '{tmp_path}/others']" in told
    assert outputs(repository, tmp_path, "together.check_same(config)") == ["result: None\n"] * 2
    assert list((tmp_path / "logs").iterdir()) == []


def test_hosts_are_refused_when_a_path_means_other_places(repository, tmp_path):
    wrong = {
        # An absolute path that is another folder for each process, as on local disks.
        'having("checkpoint", dir="/proc/self/cwd/saved")': (
            r"config\.checkpoint\.dir: '/proc/self/cwd/saved' must be one .*; hosts \[1\] do not"
        ),
        'having("checkpoint", dir="/proc/none")': (
            r"config\.checkpoint\.dir: cannot be written to: .*/proc/none"
        ),
        'having("policy", checkpoint="weights")': (
            r"config\.policy\.checkpoint: \['.*/logs-0/weights', '.*/logs-1/weights'\]"
        ),
    }
    codes = [f"together.check_same(in_own_folder({config}))" for config in wrong]
    for output in outputs(repository, tmp_path, *codes):
        for told in wrong.values():
            assert re.search(told, output), output


def test_all_hosts_are_told_at_once_when_the_runs_folder_is_taken(repository, tmp_path):
    hosts = 'setattr(hosts, "start", print)'  # they have met
    run = 'importlib.import_module("evac_jax.train").run(having("log", dir=log_dir, run="one"))'
    with claim.claimed(tmp_path / "logs" / "one"):
        first, second = outputs(repository, tmp_path, hosts, run)
    taken = rf"'{tmp_path}/logs/one' is written to by another process \(process \d+ on "
    assert re.search(f"^StorageError: {taken}", first, re.MULTILINE), first
    told = f"^HostError: claiming .* failed on host 0: StorageError: {taken}"
    assert re.search(told, second, re.MULTILINE), second


def test_wait_ends_with_a_message_when_a_host_does_not_come(repository, tmp_path):
    code = "time.sleep(4) if host else together.wait_for_all('save', 1)"
    one, two = outputs(repository, tmp_path, code)
    assert "HostError: host 0 waited for the others at 'save'" in one
    assert two == "result: None\n"


def test_hosts_whose_tasks_differ_are_named(monkeypatch):
    said = ["('red', 'blue')"]
    monkeypatch.setattr(together, "tell_all", lambda what, text: [*said, text])
    together.compare("tasks", ("red", "blue"))
    with pytest.raises(HostError, match=r"tasks of hosts \[1\] .*'red', 'blue'.*'blue', 'red'"):
        together.compare("tasks", ("blue", "red"))
