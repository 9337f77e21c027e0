"""docs/install.md says what requirement files, Makefile and code say. No test calls pip."""

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest
from absl import flags as flags_module
from ml_collections import config_flags
from packaging.requirements import Requirement

from evac_jax.config.build import from_config_dict
from evac_jax.config.flags import check_flags, load_preset
from evac_jax.devices.found import Found, describe

REQUIREMENTS = ("requirements.txt", "requirements-dev.txt")
OWN_PATHS = (
    *("policy.checkpoint", "world_model.checkpoint", "reward.checkpoint"),
    *("env.pose_model", "env.initial_states_path"),
)


def requirements(path) -> dict[str, Requirement]:
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    parsed = [Requirement(line) for line in lines if line]
    return {requirement.name: requirement for requirement in parsed}


def blocks(repository) -> list[str]:
    return re.findall(r"```\w*\n(.*?)```", (repository / "docs/install.md").read_text(), re.S)


def resolved(repository) -> dict[str, str]:
    """Versions that the page's dry runs gave; a name that both have must have one version."""
    pairs = [
        re.fullmatch(r"([\w-]+?)-(\d[\w.+]*)", line).groups()
        for block in blocks(repository)
        if re.search(r"^jaxlib-\d", block, re.M)
        for line in block.splitlines()
    ]
    assert len(set(pairs)) == len(dict(pairs))
    return dict(pairs)


def variables(**more) -> dict[str, str]:
    """The environment less what an outer `make` passes on to an inner one."""
    kept = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return kept | more


def test_page_repeats_the_pins_when_it_lists_what_pip_resolved(repository):
    listed = resolved(repository)
    pins = requirements(repository / "requirements.txt")
    for name in ("jax", "torch"):
        assert pins[name].specifier.contains(listed[name]), name
    pip_names = {name for name in listed if name.startswith(("jax", "libtpu", "torch"))}
    assert {"jax-cuda13-plugin", "jax-cuda13-pjrt", "jaxlib", "libtpu"} <= pip_names


@pytest.mark.parametrize(
    ("file", "extra", "plugin"),
    [("cuda", "cuda13", "jax-cuda13-plugin"), ("tpu", "tpu", "libtpu")],
)
def test_extra_is_one_of_the_pinned_jax_when_an_accelerator_asks_for_it(
    repository, file, extra, plugin
):
    ours = requirements(repository / f"requirements-{file}.txt")["jax"]
    pinned = requirements(repository / "requirements.txt")["jax"]
    assert ours.extras == {extra}
    assert ours.specifier == pinned.specifier
    # The installed JAX is the pinned one; what its extra asks for is what the page lists.
    asked = [Requirement(text) for text in importlib.metadata.requires("jax")]
    asked = [r for r in asked if r.marker and r.marker.evaluate({"extra": extra})]
    listed = resolved(repository)
    checked = [r.name for r in asked if r.name in listed and r.specifier.contains(listed[r.name])]
    assert (
        set(checked)
        == {"cuda13": {"jaxlib", "jax-cuda13-plugin"}, "tpu": {"jaxlib", "libtpu"}}[extra]
    )


def test_cpu_build_is_refused_when_torch_is_to_use_cuda(repository):
    ours = requirements(repository / "requirements-cuda.txt")["torch"]
    pinned = requirements(repository / "requirements.txt")["torch"]
    assert pinned.specifier.contains("2.13.0+cpu")
    assert not ours.specifier.contains("2.13.0+cpu")
    assert ours.specifier.contains("2.13.0")
    assert ours.specifier.contains("2.13.0+cu130")


def test_every_line_gives_its_reason_when_it_asks_for_an_accelerator(repository):
    for file in ("cuda", "tpu"):
        for line in (repository / f"requirements-{file}.txt").read_text().splitlines():
            assert line.startswith("#") or "  # " in line, line


@pytest.mark.parametrize("kind", ["cuda", "tpu"])
def test_accelerator_stays_when_demo_follows_its_install(repository, tmp_path, kind):
    pip = tmp_path / "bin/pip"
    pip.parent.mkdir()
    pip.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    pip.chmod(0o755)

    def make(*arguments: str) -> str:
        done = subprocess.run(
            ["make", *arguments, f"VENV={tmp_path}"],
            cwd=repository,
            env=variables(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    files = (*REQUIREMENTS, f"requirements-{kind}.txt")
    expected = " ".join(["install", *(f"-r {file}" for file in files)])
    make(f"install-{kind}")
    assert (tmp_path / "calls").read_text().splitlines() == [expected]
    assert "pip install" not in make("--dry-run", "demo")
    # As if a requirement had changed: the accelerator's list is installed with the others.
    changed = make("--dry-run", "--what-if=requirements.txt", "demo")
    assert f"pip {expected}" in changed
    assert f"install-{kind}" in make("help")


def launch_arguments(repository, tmp_path) -> list[str]:
    """What the page's Slurm script gives launch.py on the second of two hosts."""
    (script,) = [block for block in blocks(repository) if "#SBATCH" in block]
    tools = {
        "scontrol": 'echo "node1\nnode2"',
        "srun": 'shift; SLURM_NODEID=1 exec "$@"',
        ".venv/bin/python": 'printf "%s\\n" "$@"',
    }
    for name, body in tools.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=variables(
            PATH=f"{tmp_path}:{os.environ['PATH']}",
            SLURM_JOB_NODELIST="node[1-2]",
            SLURM_JOB_ID="7",
            SLURM_NNODES="2",
        ),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    program, *flags = done.stdout.splitlines()
    assert program == "launch.py"
    return flags


def test_second_host_is_configured_when_the_slurm_script_runs(repository, tmp_path, monkeypatch):
    flags = launch_arguments(repository, tmp_path)
    monkeypatch.chdir(repository)
    check_flags(flags)  # every field exists
    paths = [f"--config.{field}={tmp_path}" for field in OWN_PATHS]
    monkeypatch.setattr(sys, "argv", ["launch.py", *flags, *paths])  # read by ml_collections
    values = flags_module.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(sys.argv)
    checked = from_config_dict(values.config.to_dict())
    assert (checked.cluster.num_nodes, checked.cluster.node) == (2, 1)
    assert checked.cluster.coordinator == "node1:9876"
    assert checked.log.run == "wide-7"
    assert checked.episodes_per_iteration == 256


@pytest.mark.parametrize("gpus", [1, 8])
def test_page_shows_the_log_when_all_gpus_are_used(repository, monkeypatch, gpus):
    found = Found(
        gpus=gpus,
        tpus=0,
        jax_platform="gpu",
        jax_devices=("NVIDIA H100 80GB HBM3",) * gpus,
        jax_wanted="",
        jax_cuda="13",
        torch_version="2.13.0+cu130",
        torch_cuda="13.0",
    )
    monkeypatch.chdir(repository)
    preset = load_preset("configs/grpo.py:libero_spatial").simulator
    assert preset.processes == len(preset.devices) == 8
    line, warnings = describe(found, ("cuda",) if gpus == 1 else tuple(preset.devices))
    assert not warnings
    assert f"{line}\n" in blocks(repository)


def test_page_shows_the_log_when_a_gpu_is_there_in_vain(repository):
    found = Found(
        gpus=1,
        tpus=0,
        jax_platform="cpu",
        jax_devices=("cpu",),
        jax_wanted="",
        jax_cuda="",
        torch_version="2.13.0+cpu",
        torch_cuda="",
    )
    line, warnings = describe(found, ("cpu",))
    assert "\n".join([line, *warnings, ""]) in blocks(repository)


def test_image_installs_by_the_makefile_when_it_is_built(repository):
    text = (repository / "Dockerfile").read_text()
    assert "RUN make install-cuda" in text
    (copied,) = re.findall(r"^COPY (.*) \./$", text, re.M)
    assert set(copied.split()) == {"Makefile", *REQUIREMENTS, "requirements-cuda.txt"}
    assert ".venv" in (repository / ".dockerignore").read_text().splitlines()
