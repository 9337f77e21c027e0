r"""Compiles a run's programs for chips that are not here, and says what each needs of a chip.

    make aot                                                       # once: .venv-aot, 2.2 GB
    python -m evac_jax.tools.memory.compile --config=configs/grpo.py:libero_spatial \
        --topology h100:1x8
    python -m evac_jax.tools.memory.compile --config=configs/grpo.py:lora --topology v5e:2x4 \
        --config.algo.micro_batch=16 --policy_config FOLDER/config.json --out account.json

Topologies are CHIP:SHAPE: h100:1x8, h200:2x8, b200:1x8, a100:1x8 (hosts x GPUs of a host), v5e:2x4,
v5p:4x4x4, v6e:2x4 (the slice). The batch must be a multiple of the chips. No weights are needed and
nothing is computed: XLA compiles the learner's own `sample` and `update` from shapes, which takes
minutes each. What it made is kept in --cache. docs/memory.md explains the figures.
"""

import argparse
import dataclasses
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evac_jax.config.flags import DEFAULT_PRESET
from evac_jax.devices import sharding
from evac_jax.errors import ConfigError
from evac_jax.memory.parts import GB
from evac_jax.tools.command_line import Parser, refuse_existing, run_tool
from evac_jax.tools.memory.account import COLLECTIVES, Account, account
from evac_jax.tools.memory.compiler import PROGRAMS, Request
from evac_jax.tools.memory.topology import Topology

ROOT = Path(__file__).parents[3]
PYTHON = ".venv-aot/bin/python"  # where `make aot` installs it
CACHE = "runs/.compiled_ahead"
XLA_FLAGS = {
    # Triton's matrix products are chosen by trial on a GPU, so without one they cannot be compiled.
    # The others leave out what only makes the machine code better: program, schedule and memory are
    # equal without them.
    "cuda": (
        "--xla_gpu_enable_triton_gemm=false",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_gpu_disable_gpuasm_optimizations=true",
        "--xla_backend_optimization_level=0",
    ),
    "tpu": (),
}


@dataclass(frozen=True)
class Compiled:
    """XLA's account of one program on one chip.

    Attributes:
        seconds: of compiling.
        refused: XLA's message if the program is too large for the chip; then nothing else is known.
        arguments, temporaries, peak: bytes; the peak has both in it.
        account: operations and traffic.
    """

    seconds: float
    refused: str = ""
    arguments: int = 0
    temporaries: int = 0
    peak: int = 0
    account: Account = Account(0.0, ())

    @classmethod
    def read(cls, file: Path) -> "Compiled":
        """Return what a file of `compiler` tells."""
        told = json.loads(gzip.decompress(file.read_bytes()))
        if "refused" in told:
            return cls(told["seconds"], told["refused"])
        sizes = {name: told[name] for name in ("arguments", "temporaries", "peak")}
        return cls(told["seconds"], account=account(told["hlo"]), **sizes)

    def fits(self, memory_bytes: int) -> bool:
        """Whether the program runs on a chip that does nothing else."""
        return not self.refused and self.peak <= memory_bytes

    def as_json(self, memory_bytes: int) -> dict[str, Any]:
        """Return everything as plain values."""
        told: dict[str, Any] = {"seconds": round(self.seconds, 1), "fits": self.fits(memory_bytes)}
        if self.refused:
            return told | {"refused": self.refused}
        return told | {
            "arguments_bytes": self.arguments,
            "temporaries_bytes": self.temporaries,
            "peak_bytes": self.peak,
            "flops": self.account.flops,
            "received_bytes": {
                kind: {
                    "total": self.account.received(kind),
                    "hidden": self.account.received(kind, hidden=True),
                }
                for kind in COLLECTIVES
            },
        }


def compile_ahead(request: Request, python: Path, cache: Path) -> Compiled:
    """Compile in a process of the environment that has the compilers, or find it in `cache`.

    Raises:
        ConfigError: there is no such environment, or the program cannot be compiled.
    """
    if not python.exists():
        raise ConfigError(
            f"{python}: expected an environment with XLA's compilers for GPU and TPU; `make aot` "
            "installs it (2.2 GB), --python names another one"
        )
    platform = Topology.parse(request.topology).platform
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # else libtpu looks for the host that it would run on
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": " ".join(XLA_FLAGS[platform]),
        "PYTHONPATH": str(ROOT),
    }
    asked = json.dumps(dataclasses.asdict(request))
    done = subprocess.run(
        [python.absolute(), "-m", "evac_jax.tools.memory.compiler", asked, cache.absolute()],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ConfigError(
            f"{request.program} was not compiled for {request.topology}; why is told above"
        )
    return Compiled.read(Path(done.stdout.strip().splitlines()[-1]))


def table(program: str, told: Compiled, topology: Topology) -> str:
    """Return what is printed about a program."""
    head = f"{program}, a chip of {topology.name} ({topology.chip_name})"
    if told.refused:
        return f"{head}: does NOT fit, XLA refuses it after {told.seconds:.0f} s\n{told.refused}"
    verdict = "fits" if told.fits(topology.memory_bytes) else "does NOT fit"
    memory = f"{told.peak / GB:.2f} of {topology.memory_bytes / GB:.2f} GB"
    lines = [
        f"{head}: {verdict}, {memory}; compiled in {told.seconds:.0f} s",
        f"  {told.arguments / GB:9.2f} GB  arguments",
        f"  {told.temporaries / GB:9.2f} GB  temporaries",
        f"  {told.account.flops:9.3g}     operations of products",
        f"  {told.account.total_received / GB:9.2f} GB  received from other chips, of this",
    ]
    for kind in COLLECTIVES:
        received = told.account.received(kind)
        if received:
            share = told.account.received(kind, hidden=True) / received
            lines.append(
                f"  {received / GB:9.2f} GB    by {kind}, {share:.0%} of it while products run"
            )
    return "\n".join(lines)


def options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options and the `--config.` flags."""
    parser = Parser("memory.compile", __doc__, allow_abbrev=False, epilog="--config.FIELD=VALUE")
    parser.add_argument("--config", default=DEFAULT_PRESET, help="preset file:preset")
    parser.add_argument("--topology", required=True, help="CHIP:SHAPE")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--policy_config", default="", help="config.json of a policy")
    parser.add_argument("--world_model_config", default="", help="config.json of a world model")
    parser.add_argument("--python", type=Path, default=ROOT / PYTHON, help="interpreter")
    parser.add_argument("--cache", type=Path, default=ROOT / CACHE, help="what was compiled")
    parser.add_argument("--out", type=Path, help="also write the figures to this new JSON file")
    args, flags = parser.parse_known_args(argv)
    if flags and not flags[0].startswith("--config."):
        parser.error(f"unknown option {flags[0]}")
    return args, flags


def run(argv: Sequence[str]) -> None:
    """Compile, print and write what is asked for."""
    args, flags = options(argv)
    if args.out:
        refuse_existing(args.out)
    topology = Topology.parse(args.topology)
    figures: dict[str, Any] = {
        "config": args.config,
        "flags": flags,
        "topology": topology.name,
        "chips": topology.count,
        "memory_bytes": topology.memory_bytes,
        "programs": {},
    }
    for program in args.programs:
        request = Request(
            args.config,
            tuple(flags),
            args.policy_config,
            args.world_model_config,
            args.topology,
            program,
        )
        mesh = request.setup().config.mesh  # mistakes are told before minutes pass
        told = compile_ahead(request, args.python, args.cache)
        data, fsdp = sharding.resolved(mesh.data, mesh.fsdp, topology.count)
        sys.stdout.write(f"{table(program, told, topology)}\n")
        sys.stdout.write(f"  mesh {data} x {fsdp} (data x fsdp)\n")
        sys.stdout.flush()
        figures["programs"][program] = told.as_json(topology.memory_bytes)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


def main() -> None:
    """Command line."""
    run(sys.argv[1:])


if __name__ == "__main__":
    run_tool(main)
