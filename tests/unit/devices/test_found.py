import dataclasses
import json
import subprocess
import sys

import pytest

from evac_jax.config.build import default_config
from evac_jax.config.checks import validate
from evac_jax.devices import found as found_devices
from evac_jax.devices.found import (
    Found,
    check_tool,
    count_gpus,
    describe,
    parameters_in,
    problems,
    read_torch_build,
)
from evac_jax.errors import ConfigError

LAPTOP = Found(
    gpus=0,
    tpus=0,
    jax_platform="cpu",
    jax_devices=("cpu",),
    jax_wanted="",
    jax_cuda="",
    torch_version="2.13.0+cpu",
    torch_cuda="",
)
SERVER = Found(
    gpus=2,
    tpus=0,
    jax_platform="gpu",
    jax_devices=("NVIDIA H200", "NVIDIA H200"),
    jax_wanted="",
    jax_cuda="13",
    torch_version="2.13.0+cu130",
    torch_cuda="13.0",
)
VERSION_FILE = """from typing import Optional

__all__ = ['__version__', 'debug', 'cuda', 'git_version', 'hip', 'rocm', 'xpu']
__version__ = '2.13.0+cu130'
debug = False
cuda: Optional[str] = '13.0'
hip: Optional[str] = None
"""


def test_one_line_is_enough_when_there_is_no_gpu():
    line, warnings = describe(LAPTOP, ("cpu", "cpu"))
    assert line == (
        "devices: JAX computes on 1 x cpu (cpu); simulators on cpu; torch 2.13.0+cpu (CPU build); "
        "this host has no NVIDIA GPU"
    )
    assert warnings == ()


def test_torch_is_not_spoken_of_when_nothing_is_simulated():
    found = dataclasses.replace(SERVER, torch_version="2.13.0+cpu", torch_cuda="")
    line, warnings = describe(found, ())
    assert line == ("devices: JAX computes on 2 x NVIDIA H200 (gpu); this host has 2 NVIDIA GPUs")
    assert warnings == ()


def test_nothing_is_warned_of_when_both_use_the_gpus():
    line, warnings = describe(SERVER, ("cuda:0", "cuda:1"))
    assert line == (
        "devices: JAX computes on 2 x NVIDIA H200 (gpu); simulators on cuda:0, cuda:1; "
        "torch 2.13.0+cu130 (CUDA 13.0 build); this host has 2 NVIDIA GPUs"
    )
    assert warnings == ()


@pytest.mark.parametrize(
    ("changed", "simulators", "expected"),
    [
        (
            {"jax_platform": "cpu", "jax_cuda": ""},
            ("cuda",),
            ["JAX computes on the CPU", "make install-cuda"],
        ),
        (
            {"jax_platform": "cpu", "jax_wanted": "cpu"},
            ("cuda",),
            ["JAX computes on the CPU", "JAX_PLATFORMS=cpu", "unset it"],
        ),
        (
            {"jax_platform": "cpu"},
            ("cuda",),
            ["JAX computes on the CPU", "plugin for CUDA 13 is installed", "docs/install.md"],
        ),
        (
            {"torch_version": "2.13.0+cpu", "torch_cuda": ""},
            ("cpu",),
            ["torch 2.13.0+cpu is no CUDA build", "2 NVIDIA GPUs", "make install-cuda"],
        ),
        ({}, ("cpu", "cpu"), ["('cpu', 'cpu')", "--config.simulator.devices='(\"cuda\",)'"]),
        ({"jax_cuda": "12"}, ("cuda",), ["CUDA 12", "CUDA 13.0", "make install-cuda"]),
    ],
)
def test_one_warning_says_what_to_do_when_gpus_are_there_in_vain(changed, simulators, expected):
    _, warnings = describe(dataclasses.replace(SERVER, **changed), simulators)
    assert len(warnings) == 1
    assert [part for part in expected if part not in warnings[0]] == []


def test_every_library_is_named_when_neither_uses_the_gpu():
    _, warnings = describe(dataclasses.replace(LAPTOP, gpus=1), ("cpu",))
    assert [warning.split()[0] for warning in warnings] == ["JAX", "torch"]


def test_install_command_is_named_when_jax_leaves_a_tpu_unused():
    _, warnings = describe(dataclasses.replace(LAPTOP, tpus=4), ("cpu",))
    assert len(warnings) == 1
    assert "4 TPUs" in warnings[0]
    assert "make install-tpu" in warnings[0]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 2),
        ({"CUDA_VISIBLE_DEVICES": "1"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "1,0,2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "1,-1,0"}, 1),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
    ],
)
def test_gpus_are_counted_when_the_environment_shows_them(tmp_path, environment, expected):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert count_gpus(environment, tmp_path) == expected


def config_of(**cluster):
    config = default_config("grpo")
    return dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, **cluster))


@pytest.mark.parametrize(
    ("found", "simulators", "expected"),
    [
        (SERVER, ("cuda:0", "cuda:1"), []),
        (SERVER, ("cuda",), []),
        (SERVER, ("cuda:0", "cuda:2"), ["there is no ['cuda:2']; this host shows 2 NVIDIA GPUs"]),
        (LAPTOP, ("cpu",), []),
        (LAPTOP, ("cuda:0",), ["['cuda:0'] need a CUDA build of torch", "make install-cuda"]),
    ],
)
def test_run_is_refused_when_a_device_of_its_simulators_is_missing(found, simulators, expected):
    told = "\n".join(problems(found, config_of(), simulators))
    assert bool(told) == bool(expected)
    assert [part for part in expected if part not in told] == []


@pytest.mark.parametrize(
    "device", ["cuda:-1", "CUDA:5", "cuda0", "gpu", "cuda:one", "cuda:", "cuda:01", "cpu:0", ""]
)
def test_device_that_is_none_is_told_by_the_field_before_and_at_the_start(device):
    expected = (
        f'config.simulator.devices: expected "cpu", "cuda" or "cuda:N" with N from 0, got '
        f"[{device!r}]; set it as in --config.simulator.devices='(\"cuda:0\",)'"
    )
    assert problems(SERVER, config_of(), ("cuda:1", device)) == [expected]
    config = config_of()
    simulator = dataclasses.replace(config.simulator, devices=(device,))
    assert expected in validate(dataclasses.replace(config, simulator=simulator))


@pytest.mark.parametrize("devices", [("cpu",), ("cuda",), ("cuda:0",), ("cuda:12",)])
def test_devices_of_torch_are_valid(devices):
    config = config_of()
    simulator = dataclasses.replace(config.simulator, devices=devices)
    told = validate(dataclasses.replace(config, simulator=simulator))
    assert [line for line in told if "simulator.devices" in line] == []


def test_no_device_at_all_is_told_where_a_placement_needs_some():
    placement = dataclasses.replace(config_of().cluster.placement, env="0")
    config = config_of(placement=placement)
    simulator = dataclasses.replace(config.simulator, devices=())
    told = validate(dataclasses.replace(config, simulator=simulator))
    assert [line for line in told if "config.cluster.placement.env: names CUDA" in line]


def test_tool_refuses_a_large_policy_when_it_would_leave_a_gpu_unused(monkeypatch):
    unused = dataclasses.replace(SERVER, jax_platform="cpu", jax_cuda="")
    monkeypatch.setattr(found_devices, "look", lambda: unused)
    check_tool("--start", 10**9, cpu_beside_gpu=False)
    check_tool("--start", 10**9 + 1, cpu_beside_gpu=True)
    with pytest.raises(ConfigError, match=r"--start: 1\.0 billion .*; or set --cpu_beside_gpu"):
        check_tool("--start", 10**9 + 1, cpu_beside_gpu=False)
    monkeypatch.setattr(found_devices, "look", lambda: SERVER)
    check_tool("--start", 10**10, cpu_beside_gpu=False)


def test_large_policy_is_refused_when_it_would_leave_a_gpu_unused(tmp_path, monkeypatch):
    header = json.dumps({"__metadata__": {}, "w": {"shape": [3, 1000]}, "b": {"shape": [7]}})
    (tmp_path / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header.encode() + bytes(10)
    )
    (tmp_path / "damaged.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "broken.safetensors").write_bytes((2).to_bytes(8, "little") + b"\xff\xff")
    assert parameters_in(tmp_path) == 3007
    unused = dataclasses.replace(SERVER, jax_platform="cpu", jax_cuda="")
    config = config_of()
    config = dataclasses.replace(
        config, policy=dataclasses.replace(config.policy, checkpoint=str(tmp_path))
    )
    assert problems(unused, config, ("cpu",)) == []  # small
    monkeypatch.setattr("evac_jax.devices.found.LARGE", 3000)
    (told,) = problems(unused, config, ("cpu",))
    assert "install: make install-cuda" in told
    assert "--config.cluster.cpu_beside_gpu=True" in told
    admitted = dataclasses.replace(config, cluster=config_of(cpu_beside_gpu=True).cluster)
    assert problems(unused, admitted, ("cpu",)) == []
    assert problems(SERVER, config, ("cuda:0",)) == []
    assert problems(LAPTOP, config, ("cpu",)) == []


def test_build_is_read_when_torch_is_not_imported():
    assert read_torch_build(VERSION_FILE) == ("2.13.0+cu130", "13.0")
    cpu = VERSION_FILE.replace("'13.0'", "None").replace("+cu130", "+cpu")
    assert read_torch_build(cpu) == ("2.13.0+cpu", "")


def test_installed_torch_is_described_when_a_process_has_not_loaded_it(repository):
    code = (
        "import sys\n"
        "from absl import logging\n"
        "from evac_jax.devices import found\n"
        "logging.set_verbosity(logging.INFO)\n"
        "from evac_jax.config.build import default_config\n"
        "found.check_devices(default_config('grpo'), ('cpu',))\n"
        "build = found.look()\n"
        "assert 'torch' not in sys.modules\n"
        "import torch\n"
        "assert build.torch_version == torch.__version__, build\n"
        "assert build.torch_cuda == (torch.version.cuda or ''), build\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "devices: JAX computes on" in done.stderr
