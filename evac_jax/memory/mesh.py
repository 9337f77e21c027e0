"""The trainer's mesh where `mesh.data` is 0: as many copies of the parameters as fit."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging

from evac_jax.config.cluster import MeshConfig
from evac_jax.config.schema import TrainConfig
from evac_jax.devices import together
from evac_jax.memory.parts import GB, peak
from evac_jax.memory.trainer import trainer_parts
from evac_jax.policy_import import read_sizes
from evac_jax.shapes import EpisodeShapes
from policies.openvla_oft.config import OpenVLAOFTConfig

# Share of a device's memory that the estimate may fill; how good it is: docs/memory.md.
FILLED = 0.9
# JAX's name of a platform -> that of `trainer.HABITS`.
PLATFORMS = {"gpu": "cuda", "tpu": "tpu", "cpu": "cpu"}


def fitting(
    config: TrainConfig,
    sizes: OpenVLAOFTConfig,
    episode: EpisodeShapes,
    devices: int,
    platform: str,
    limit: float,
) -> tuple[TrainConfig, str]:
    """Return the run with its mesh, and why it is this one; as it is where its mesh is given.

    Each copy of the parameters is cut over as few devices as fit. What is cut is gathered again for
    every decision and micro-batch; copies only exchange one gradient per optimiser step.

    Args:
        devices: that learn.
        platform: one of `trainer.HABITS`.
        limit: bytes that the trainer may take of a device.
    """
    if config.mesh.data:
        return config, ""
    needs, tried, cut = {}, config, 1
    for cut in (count for count in range(1, devices + 1) if devices % count == 0):
        tried = dataclasses.replace(config, mesh=MeshConfig(devices // cut, cut))
        needs[cut] = peak(trainer_parts(tried, sizes, episode, devices, platform))[0]
        if needs[cut] <= FILLED * limit:
            break
    estimates = ", ".join(f"{need / GB:.1f} GB over {cut}" for cut, need in needs.items())
    fits = needs[cut] <= FILLED * limit
    return tried, (
        f"mesh.data=0: {devices // cut} x {cut} devices (data x fsdp), "
        f"{'the fewest over which a copy of the parameters fits' if fits else 'NONE fits'}; "
        f"estimate of a device: {estimates}; limit {FILLED:.0%} of {limit / GB:.1f} GB"
    )


def for_devices(
    config: TrainConfig, episode: EpisodeShapes | None, devices: Sequence[Any]
) -> TrainConfig:
    """Return the run with its mesh for the JAX devices that learn; the log says why.

    Args:
        episode: None if it is not known yet.
    """
    if config.mesh.data:
        return config
    if len(devices) == 1:
        return dataclasses.replace(config, mesh=MeshConfig(1, 1))
    own = next(device for device in devices if device.process_index == jax.process_index())
    limit = (own.memory_stats() or {}).get("bytes_limit")  # other hosts' cannot be asked
    if episode is None or limit is None:
        what = "the memory of a device is" if limit is None else "the size of the frames is"
        config = dataclasses.replace(config, mesh=MeshConfig(1, -1))
        why = f"mesh.data=0: {what} not known here, so parameters are cut over all devices"
    else:
        views, chunk = episode.image_shape[0], episode.chunk
        sizes = read_sizes(config.policy, chunk=chunk, num_images=views)
        platform = PLATFORMS[own.platform]
        config, why = fitting(config, sizes, episode, len(devices), platform, limit)
    logging.info("%s", why)
    together.compare("the mesh that mesh.data=0 chose", dataclasses.astuple(config.mesh))
    return config
