r"""Estimates the memory that a run will need, per device and host; weights are not needed.

    python -m evac_jax.tools.memory --config=configs/grpo.py:libero_spatial --devices 8
    python -m evac_jax.tools.memory --config=configs/ppo.py:lora --config.algo.micro_batch=8 \
        --policy_config FOLDER/config.json --device_gb 48
    python -m evac_jax.tools.memory --config=configs/grpo.py:lora --topology h100:1x8

Sizes come from the configuration and from the config.json of policy and world model. If their
folders do not exist, the sizes of the published 7B OpenVLA-OFT and of EVAC for LIBERO are used.
`--devices 0` puts everything on the host. `--topology` shows XLA's own account of the update too,
for chips that need not be here (`make aot`). docs/memory.md explains how the numbers are computed.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence

from evac_jax.config.flags import DEFAULT_PRESET, preset_names, read_config
from evac_jax.errors import ConfigError
from evac_jax.memory.parts import GB, peak
from evac_jax.tools.command_line import Parser, run_tool
from evac_jax.tools.memory.advice import advice, presets_table
from evac_jax.tools.memory.compile import CACHE, PYTHON, ROOT, compile_ahead, table
from evac_jax.tools.memory.compiler import Request
from evac_jax.tools.memory.layouts import Layout, layouts
from evac_jax.tools.memory.setup import Setup, read_setup
from evac_jax.tools.memory.topology import Topology

SMALL = ("miniature", "own", "libero_small")  # for small networks, not for a 7B policy


def compiled(argv: Sequence[str], devices: int, seconds: float) -> tuple[int, int] | None:
    """Return XLA's (arguments, temporaries) of a device, from a process with as many CPU devices.

    None if it takes longer than `seconds`.
    """
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "evac_jax.tools.memory", *argv, "--compile_here"]
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        raise ConfigError("the compilation failed; its own message is above")
    arguments, temporaries = done.stdout.strip().splitlines()[-1].split()
    return int(arguments), int(temporaries)


def compile_here(setup: Setup) -> None:
    """Compile the update and print XLA's figures."""
    import jax

    from evac_jax.memory.trainer import compiled_bytes

    config = setup.on(jax.device_count()).config
    arguments, temporaries = compiled_bytes(config, setup.sizes, setup.episode)
    _say(f"{arguments} {temporaries}")


def _say(text: str = "") -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser("memory", __doc__, allow_abbrev=False, epilog="and --config.FIELD=VALUE")
    parser.add_argument("--config", default=DEFAULT_PRESET, help="preset file:preset")
    parser.add_argument("--devices", type="natural", help="accelerators of the host, 0 = none; 1")
    parser.add_argument("--device_gb", type="positive", help="memory of one, 1e9 bytes; 80")
    parser.add_argument("--topology", help="CHIP:SHAPE instead of both, and XLA's account for it")
    parser.add_argument("--policy_config", default="", help="config.json of a policy")
    parser.add_argument("--world_model_config", default="", help="config.json of a world model")
    parser.add_argument(
        "--xla", type="not_negative", default=0.0, help="compile for CPUs, so many seconds"
    )
    parser.add_argument("--no_presets", action="store_true", help="leave the other presets out")
    parser.add_argument("--compile_here", action="store_true", help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args(argv)
    if args.topology:
        if args.devices is not None or args.device_gb is not None:
            parser.error("--topology tells the number of devices and their memory itself")
        args.topology = Topology.parse(args.topology)
        args.devices, args.device_gb = args.topology.count, args.topology.memory_bytes / GB
    args.devices = 1 if args.devices is None else args.devices
    args.device_gb = 80.0 if args.device_gb is None else args.device_gb
    if flags and not flags[0].startswith("--config."):
        parser.error(f"unknown option {flags[0]}")
    return args, flags


def _verdict(setup: Setup, found: Layout, devices: int, limit: float) -> str:
    if not devices:
        return f"{found.name}: {found.line}"
    if found.device_bytes <= limit:
        return f"{found.name}: fits into {limit / GB:.0f} GB a device: {found.line}"
    return (
        f"{found.name}: does NOT fit into {limit / GB:.0f} GB a device: {found.line}\n"
        f"  {advice(setup, devices, found.name, limit)}"
    )


def run(argv: Sequence[str]) -> None:
    """Print everything."""
    args, flags = _options(argv)
    setup = read_setup(read_config(args.config, flags), args.policy_config, args.world_model_config)
    setup = dataclasses.replace(setup, device_bytes=args.device_gb * GB)
    if args.topology:
        setup = dataclasses.replace(setup, platform=args.topology.platform)
    if args.compile_here:
        compile_here(setup)
        return
    from evac_jax.memory.trainer import count

    trained, frozen = count(setup.sizes)
    _say(f"policy: {trained:,} parameters that train, {frozen:,} that do not")
    if setup.own_judge:
        _say(f"left out: reward.judge = {setup.config.reward.judge}, whose memory is not known")
    limit, possible = args.device_gb * GB, layouts(setup, args.devices)
    for found in possible:
        data, fsdp = found.mesh
        where = f" on {args.devices} devices, mesh {data} x {fsdp} (data x fsdp)"
        _say(f"\n{found.name}" + (where if args.devices else ""))
        _say("\n".join(place.describe() for place in (*found.devices, found.host)))
    if args.xla:
        _print_compiled(argv, args, setup)
    if args.topology:
        _print_ahead(args, flags, setup)
    _say()
    for found in possible:
        _say(_verdict(setup, found, args.devices, limit))
    file = args.config.partition(":")[0]
    if args.devices and not args.no_presets:
        names = [name for name in preset_names(file) if name not in SMALL]

        def setup_of(name: str) -> Setup:
            config = read_config(f"{file}:{name}")
            return read_setup(config, args.policy_config, args.world_model_config)

        _say(f"\npresets of {file}\n{presets_table(names, setup_of, limit)}")


def _print_compiled(argv: Sequence[str], args: argparse.Namespace, setup: Setup) -> None:
    devices = max(args.devices, 1)
    told = compiled(argv, devices, args.xla)
    if told is None:
        _say(f"\nXLA took longer than {args.xla:.0f} s; the numbers above stand alone")
        return
    _say(
        f"\nXLA, update compiled for {devices} CPU devices: {sum(told) / GB:.2f} GB "
        f"({told[0] / GB:.2f} arguments + {told[1] / GB:.2f} temporaries); "
        f"the estimate for CPUs is {_estimate(setup, devices, 'cpu') / GB:.2f} GB"
    )


def _print_ahead(args: argparse.Namespace, flags: Sequence[str], setup: Setup) -> None:
    """Show XLA's account of the update on chips that need not be here."""
    topology = args.topology
    files = args.policy_config, args.world_model_config
    request = Request(args.config, tuple(flags), *files, topology.name, "update")
    told = compile_ahead(request, ROOT / PYTHON, ROOT / CACHE)
    estimate = _estimate(setup, topology.count, topology.platform)
    _say(f"\nXLA: {table('update', told, topology)}\n  the estimate is {estimate / GB:.2f} GB")


def _estimate(setup: Setup, devices: int, platform: str) -> float:
    """Return the trainer's bytes on a device, without what is no array."""
    from evac_jax.memory.trainer import trainer_parts

    config = setup.on(devices).config
    return peak(trainer_parts(config, setup.sizes, setup.episode, devices, platform))[0]


def main() -> None:
    """Command line."""
    run(sys.argv[1:])


if __name__ == "__main__":
    run_tool(main)
