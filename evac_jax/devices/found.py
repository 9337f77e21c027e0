"""Which devices JAX and torch use, and what of this host neither uses, as lines for a run's log.

Torch is never imported: the trainer must stay free of it, so its build is read from the text of
its version.py. GPUs are counted by their device files, so that they are found although neither
library can use them. A GPU of WSL2 has no such file and is not found.
"""

import ast
import importlib.metadata
import importlib.util
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
from absl import logging

from evac_jax.config.cluster import device_problems
from evac_jax.config.schema import TrainConfig
from evac_jax.errors import ConfigError

PAGE = "docs/install.md"
LARGE = 1e9  # parameters; a policy of more is not meant for a CPU where there is a GPU


@dataclass(frozen=True)
class Found:
    """What a look at one host found.

    Attributes:
        gpus: NVIDIA GPUs of this host that CUDA_VISIBLE_DEVICES does not hide.
        tpus: TPUs of this host that have a device file of their own, /dev/accel*. Newer ones are
            VFIO devices, which look like any other device that is handed on; JAX warns of those.
        jax_platform: what JAX computes on: "cpu", "gpu" or "tpu".
        jax_devices: kind of each of this process's devices, in JAX's words.
        jax_wanted: JAX's setting JAX_PLATFORMS; "" = it chooses.
        jax_cuda: CUDA major version of JAX's installed plugin, such as "13"; "" without one.
        torch_version: such as "2.13.0+cpu", or "not installed".
        torch_cuda: CUDA version that torch was built for, such as "13.0"; "" for a CPU build.
    """

    gpus: int
    tpus: int
    jax_platform: str
    jax_devices: tuple[str, ...]
    jax_wanted: str
    jax_cuda: str
    torch_version: str
    torch_cuda: str

    @property
    def passes_over_gpus(self) -> bool:
        """Whether JAX computes on the CPU although there is a GPU."""
        return self.gpus > 0 and self.jax_platform == "cpu"


def describe(found: Found, simulator_devices: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Return one line on what is used, and one warning for each thing that is there in vain.

    Args:
        found: by `look`.
        simulator_devices: torch devices of the simulator processes, such as ("cuda:0", "cpu"); ()
            where none runs, so that torch does not matter.
    """
    kinds = sorted(set(found.jax_devices))
    devices = ", ".join(f"{found.jax_devices.count(kind)} x {kind}" for kind in kinds)
    build = f"CUDA {found.torch_cuda}" if found.torch_cuda else "CPU"
    line = f"devices: JAX computes on {devices} ({found.jax_platform}); "
    if simulator_devices:
        line += (
            f"simulators on {', '.join(sorted(set(simulator_devices)))}; torch "
            f"{found.torch_version} ({build} build); "
        )
    line += f"this host has {found.gpus or 'no'} NVIDIA GPU{'s' * (found.gpus > 1)}"
    warnings = []
    there = f"although this host has {found.gpus} NVIDIA GPU{'s' * (found.gpus > 1)}"
    if found.passes_over_gpus:
        warnings.append(_jax_on_cpu(found, there))
    if found.gpus and simulator_devices:
        if not found.torch_cuda:
            warnings.append(
                f"torch {found.torch_version} is no CUDA build {there}, so simulators compute on "
                f"the CPU; install: make install-cuda ({PAGE})"
            )
        elif not any(device.startswith("cuda") for device in simulator_devices):
            warnings.append(
                f"simulators are configured for {simulator_devices} {there}; change it with "
                "--config.simulator.devices='(\"cuda\",)'"
            )
        if found.jax_cuda and found.torch_cuda.partition(".")[0] not in ("", found.jax_cuda):
            warnings.append(
                f"JAX's plugin is for CUDA {found.jax_cuda}, torch is for CUDA "
                f"{found.torch_cuda}; install both in one command: make install-cuda ({PAGE})"
            )
    if found.tpus and found.jax_platform == "cpu":
        warnings.append(
            f"JAX computes on the CPU although this host has {found.tpus} "
            f"TPU{'s' * (found.tpus > 1)}; install: make install-tpu ({PAGE})"
        )
    return line, tuple(warnings)


def _jax_on_cpu(found: Found, there: str) -> str:
    """Return the warning with the likeliest reason: a setting, no plugin, or one that failed."""
    start = f"JAX computes on the CPU {there}"
    if found.jax_wanted and not {"cuda", "gpu"} & set(found.jax_wanted.split(",")):
        return f"{start}: JAX_PLATFORMS={found.jax_wanted} says so; unset it to use them"
    if not found.jax_cuda:
        return f"{start}: its CUDA plugin is missing; install: make install-cuda ({PAGE})"
    return (
        f"{start}: its plugin for CUDA {found.jax_cuda} is installed and cannot use them; compare "
        f'driver and library versions as {PAGE} says under "When CUDA libraries disagree"'
    )


def look() -> Found:
    """Return what this host has and what JAX and torch are built for.

    Starts JAX's backend: call it after `cluster.start`.
    """
    torch_version, torch_cuda = _torch_build()
    devices = jax.local_devices()
    return Found(
        gpus=count_gpus(os.environ),
        tpus=len(list(Path("/dev").glob("accel[0-9]*"))),
        jax_platform=devices[0].platform,
        jax_devices=tuple(device.device_kind for device in devices),
        jax_wanted=jax.config.jax_platforms or "",
        jax_cuda=_jax_cuda(),
        torch_version=torch_version,
        torch_cuda=torch_cuda,
    )


def count_gpus(environment: Mapping[str, str], dev: Path = Path("/dev")) -> int:
    """Return the number of NVIDIA GPUs with a device file that the environment does not hide.

    Args:
        environment: where CUDA_VISIBLE_DEVICES is looked up: the GPUs that CUDA shows, up to the
            first entry that is -1.
        dev: folder of device files.
    """
    count = len(list(dev.glob("nvidia[0-9]*")))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return min(count, names.index("-1") if "-1" in names else len(names))


def problems(found: Found, config: TrainConfig, simulator_devices: tuple[str, ...]) -> list[str]:
    """Return why a run cannot, or should not, begin with what this host has.

    Args:
        simulator_devices: torch device of each simulator process, () where none runs.
    """
    told = device_problems(simulator_devices)
    wanted = sorted({d for d in simulator_devices if not told and d.startswith("cuda")})
    hidden = Path("/dev/dxg").exists()  # WSL2 has GPUs without device files of their own
    missing = [d for d in wanted if int(d.partition(":")[2] or 0) >= found.gpus and not hidden]
    if wanted and not found.torch_cuda:
        told.append(
            f"config.simulator.devices: {wanted} need a CUDA build of torch, torch "
            f"{found.torch_version} is none; install: make install-cuda ({PAGE}), or set "
            "--config.simulator.devices='(\"cpu\",)'"
        )
    elif missing:
        told.append(
            f"config.simulator.devices: there is no {missing}; this host shows {found.gpus} NVIDIA "
            "GPUs, numbered from 0 (CUDA_VISIBLE_DEVICES hides others)"
        )
    if found.passes_over_gpus and not config.cluster.cpu_beside_gpu:
        size = parameters_in(Path(config.policy.checkpoint))
        switch = "--config.cluster.cpu_beside_gpu=True"
        told += policy_problems(found, "config.policy.checkpoint", size, switch)
    return told


def policy_problems(found: Found, field: str, parameters: int, switch: str) -> list[str]:
    """Return why JAX should not compute a policy on this host, [] if it may.

    Args:
        field: that names the policy.
        parameters: of the policy.
        switch: flag that admits it all the same.
    """
    if not found.passes_over_gpus or parameters <= LARGE:
        return []
    return [
        f"{field}: {parameters / 1e9:.1f} billion parameters would be computed on the CPU. "
        f"{_jax_on_cpu(found, f'although there is a GPU ({found.gpus})')}; or set {switch}"
    ]


def parameters_in(folder: Path) -> int:
    """Return the number of parameters in a folder's safetensors files, by their headers."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            # Of a damaged one the import of the policy tells.
            if length > path.stat().st_size:
                continue
            try:
                header = json.loads(file.read(length))
            except ValueError:
                continue
        count += sum(math.prod(e["shape"]) for n, e in header.items() if n != "__metadata__")
    return count


def _jax_cuda() -> str:
    for major in ("13", "12"):  # what JAX 0.10 has plugins for
        try:
            importlib.metadata.version(f"jax-cuda{major}-plugin")
        except importlib.metadata.PackageNotFoundError:
            continue
        return major
    return ""


def _torch_build() -> tuple[str, str]:
    spec = importlib.util.find_spec("torch")  # finds a top-level package without importing it
    if spec is None or spec.origin is None:
        return "not installed", ""
    return read_torch_build(Path(spec.origin).with_name("version.py").read_text())


def read_torch_build(text: str) -> tuple[str, str]:
    """Return (version, CUDA version) from the text of torch/version.py; "" where it has none."""
    values = {}
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            if isinstance(target, ast.Name) and isinstance(statement.value, ast.Constant):
                values[target.id] = statement.value.value
    return values.get("__version__") or "", values.get("cuda") or ""


def check_devices(config: TrainConfig, simulator_devices: tuple[str, ...]) -> None:
    """Log what JAX and torch use on this host, with a warning for each thing there in vain.

    Args:
        simulator_devices: torch device of each simulator process (`placement.env_devices`), ()
            where none runs.

    Raises:
        ConfigError: a CUDA device is missing, or a large policy would leave a GPU unused.
    """
    found = _logged(simulator_devices)
    if told := problems(found, config, simulator_devices):
        raise ConfigError("\n".join(told))


def check_tool(field: str, parameters: int, *, cpu_beside_gpu: bool) -> None:
    """Do what `check_devices` does, for a tool that computes a policy and has no configuration.

    Args:
        field, parameters: as of `policy_problems`.
        cpu_beside_gpu: the tool's own switch of this name.

    Raises:
        ConfigError: a large policy would leave a GPU unused.
    """
    told = policy_problems(_logged(()), field, parameters, "--cpu_beside_gpu")
    if told and not cpu_beside_gpu:
        raise ConfigError("\n".join(told))


def _logged(simulator_devices: tuple[str, ...]) -> Found:
    found = look()
    line, warnings = describe(found, simulator_devices)
    logging.info("%s", line)
    for warning in warnings:
        logging.warning("%s", warning)
    return found
