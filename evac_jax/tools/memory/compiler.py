"""Compiles one program of a run for chips that are not here; runs in `.venv-aot`.

    .venv-aot/bin/python -m evac_jax.tools.memory.compiler REQUEST FOLDER

REQUEST is JSON text, see `Request`. What XLA made is kept in FOLDER under the hash of what it was
made from: the lowered program, the topology, XLA's flags and options, and the versions. A file of
that name is taken as it is. The last line of the output is the file's name.
"""

import dataclasses
import fcntl
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evac_jax.config.flags import read_config
from evac_jax.errors import ConfigError
from evac_jax.tools.command_line import Parser, run_tool
from evac_jax.tools.memory.setup import Setup, read_setup
from evac_jax.tools.memory.topology import CUDNN, Topology

PROGRAMS = ("sample", "update")
VERSIONS = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
# JAX names the rule that partitions a fused operation by its place in memory.
ADDRESS = re.compile(r'(@CustomSPMDPartitioning\(.*?backend_config = )"\d+"')
# libtpu takes one process at a time, of all of a machine.
LOCK = Path(tempfile.gettempdir()) / f"evac_jax_libtpu.{os.getuid()}.lock"


@dataclass(frozen=True)
class Request:
    """What is to be compiled.

    Attributes:
        config: preset, FILE:PRESET.
        flags: `--config.FIELD=VALUE` of the run.
        policy_config, world_model_config: files with sizes; "" = as for `tools.memory`.
        topology: CHIP:SHAPE.
        program: one of `PROGRAMS`.
    """

    config: str
    flags: tuple[str, ...]
    policy_config: str
    world_model_config: str
    topology: str
    program: str

    def setup(self) -> Setup:
        """Return the run.

        Raises:
            ConfigError: it cannot be.
        """
        config, topology = read_config(self.config, self.flags), Topology.parse(self.topology)
        setup = read_setup(config, self.policy_config, self.world_model_config)
        setup = dataclasses.replace(
            setup, platform=topology.platform, device_bytes=topology.memory_bytes
        )
        return setup.on(topology.count)


def lowered(request: Request) -> tuple[Any, dict[str, Any]]:
    """Return the program, traced for the chips of a topology, and XLA's options for it.

    Raises:
        ConfigError: topology, mesh or batches do not fit together.
    """
    from evac_jax import programs
    from evac_jax.devices import sharding
    from evac_jax.shapes import check_sizes

    setup, topology = request.setup(), Topology.parse(request.topology)
    config, sizes, episode = setup.config, setup.sizes, setup.episode
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, topology.devices())
    if topology.platform == "cuda":
        _tell_cudnn_version()
    check_sizes(config, mesh, mesh, episode)
    make = programs.abstract_sample if request.program == "sample" else programs.abstract_update
    program, arguments = make(config, mesh, sizes, episode)
    traced = program.trace(*arguments).lower(lowering_platforms=(topology.platform,))
    return traced, programs.compiler_options(config, mesh) or {}


def _tell_cudnn_version() -> None:
    """Let JAX trace fused attention without cuDNN; XLA compiles for the version of the target."""
    from jax._src.cudnn import fused_attention_stablehlo

    major, minor, patch = CUDNN
    fused_attention_stablehlo.check_cudnn_version = lambda: 10000 * major + 100 * minor + patch


def compiled(request: Request, folder: Path) -> Path:
    """Compile, or find in `folder` what was compiled from the same; return the file.

    The file is gzipped JSON: what `described` returns.

    Raises:
        ConfigError: see `lowered`; XLA refuses the program for another reason than its size.
    """
    topology = Topology.parse(request.topology)
    with _one_libtpu(topology.platform):
        program, options = lowered(request)
        file = folder / f"{_hash(program, topology, options)}.json.gz"
        if not file.exists():
            told = described(program)
            folder.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}")
            part.write_bytes(gzip.compress(json.dumps(told).encode()))
            part.rename(file)
    return file


def described(program: Any) -> dict[str, Any]:
    """Compile a lowered program; return XLA's account and the text of what it made.

    Returns:
        "seconds" of compiling; "arguments", "outputs", "aliased", "temporaries" and "peak" in bytes
        of a chip; "hlo", the scheduled program of one chip. If the program is too large for the
        chip's memory and XLA says so: "seconds" and "refused", its message.
    """
    began = time.monotonic()
    try:
        done = program.compile()
    except Exception as error:  # XlaRuntimeError, which is not public
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"seconds": time.monotonic() - began, "refused": str(error)}
    memory = done.memory_analysis()
    return {
        "seconds": time.monotonic() - began,
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "hlo": done.as_text(),
    }


def _hash(program: Any, topology: Topology, options: dict[str, Any]) -> str:
    parts = [
        *(
            ADDRESS.sub(r"\1", program.as_text()),
            topology.name,
            topology.target(),
            os.environ.get("XLA_FLAGS", ""),
            json.dumps(options, sort_keys=True),
        ),
        *(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


@contextmanager
def _one_libtpu(platform: str) -> Iterator[None]:
    """Wait until no other process of this user compiles for a TPU."""
    if platform != "tpu":
        yield
        return
    with LOCK.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.stderr.write(f"waiting for another process that compiles for a TPU ({LOCK})\n")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(argv: Sequence[str]) -> None:
    """Compile as asked and print the name of the file."""
    parser = Parser("memory.compiler", __doc__)
    parser.add_argument("request", help="JSON text")
    parser.add_argument("folder", type=Path, help="where compiled programs are kept")
    args = parser.parse_args(argv)
    values = json.loads(args.request)
    if wrong := set(values) ^ {field.name for field in dataclasses.fields(Request)}:
        raise ConfigError(f"request: expected the fields of Request, differs in {sorted(wrong)}")
    request = Request(**values | {"flags": tuple(values["flags"])})
    sys.stdout.write(f"{compiled(request, args.folder)}\n")


def main() -> None:
    """Command line."""
    run(sys.argv[1:])


if __name__ == "__main__":
    run_tool(main)
