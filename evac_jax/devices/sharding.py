"""The only file that names mesh axes: the mesh, and the sharding of parameters and batches.

Rules are an ordered list of (regex, tactic) over parameter paths such as
"llama/layers/q_proj/kernel"; the first match wins (after big_vision:big_vision/sharding.py).
Modules carry no annotations, so every policy also runs unsharded on one CPU device.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from algos.types import path_name
from evac_jax.errors import ConfigError

DATA, FSDP = "data", "fsdp"
BATCH_AXES = (DATA, FSDP)

# Below this many entries an all-gather costs more than the memory it saves.
MIN_SHARDED_SIZE = 2**16

Tactic = Callable[[tuple[int, ...], int], PartitionSpec]


def replicate(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Every device holds the whole array."""
    return PartitionSpec()


def shard_largest_axis(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Cut the largest axis that `fsdp` divides; small arrays and indivisible ones stay whole."""
    if fsdp == 1 or np.prod(shape, dtype=np.int64) < MIN_SHARDED_SIZE:
        return PartitionSpec()
    for axis in sorted(range(len(shape)), key=lambda axis: -shape[axis]):
        if shape[axis] % fsdp == 0:
            return PartitionSpec(*(FSDP if i == axis else None for i in range(len(shape))))
    return PartitionSpec()


# Norm scales and biases are read by every device in every layer; the rest follows FSDP.
RULES: Sequence[tuple[str, Tactic]] = (
    (r"(^|/)(norm|scale|bias)[^/]*$", replicate),
    (r".*", shard_largest_axis),
)


def resolved(data: int, fsdp: int, count: int) -> tuple[int, int]:
    """Return (data, fsdp) for a number of devices; -1 for one of the two means "the rest".

    Raises:
        ConfigError: the product is not the number of devices.
    """
    if data == -1 and fsdp == -1:
        data = 1
    if data == -1:
        data = count // max(fsdp, 1)
    if fsdp == -1:
        fsdp = count // max(data, 1)
    if data < 1 or fsdp < 1 or data * fsdp != count:
        raise ConfigError(
            f"mesh.data x mesh.fsdp must equal the number of devices ({count}), "
            f"got {data} x {fsdp}; set one of them to -1 to take what is left"
        )
    return data, fsdp


def make_mesh(data: int, fsdp: int, devices: Sequence | None = None) -> Mesh:
    """Return a (data, fsdp) mesh over all devices; see `resolved`.

    Args:
        devices: those of JAX to use instead.

    Raises:
        ConfigError: the product is not the number of devices.
    """
    devices = list(devices if devices is not None else jax.devices())
    grid = np.array(devices).reshape(resolved(data, fsdp, len(devices)))
    return Mesh(grid, BATCH_AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def fsdp_size(mesh: Mesh) -> int:
    """Return how many devices a mesh cuts parameters over."""
    return mesh.shape[FSDP]


def copies(mesh: Mesh) -> int:
    """Return how many copies of the parameters a mesh holds."""
    return mesh.shape[DATA]


# `jax.vmap` over the copies of the parameters: sharding constraints in the function are those of
# one copy.
over_copies = partial(jax.vmap, spmd_axis_name=DATA)


def copy_batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch over the devices of one copy, for functions under `over_copies`."""
    return NamedSharding(mesh, PartitionSpec(FSDP))


def of_each_copy(place: NamedSharding) -> NamedSharding:
    """Return the sharding of an array with one part of its own for each copy, as first axis."""
    return NamedSharding(place.mesh, PartitionSpec(DATA, *place.spec))


def leaf_sharding(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding of the array called `name`: the first rule that matches decides."""
    for pattern, tactic in RULES:
        if re.search(pattern, name):
            return NamedSharding(mesh, tactic(tuple(shape), fsdp_size(mesh)))
    raise ConfigError(f"no sharding rule matches parameter {name!r}; add one to sharding.RULES")


def tree_shardings(mesh: Mesh, tree):
    """Return the NamedSharding of every leaf of a tree of arrays or shapes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf_sharding(mesh, path_name(path), leaf.shape), tree
    )


def local_mesh(mesh: Mesh) -> Mesh:
    """Return the part of a mesh that this process owns, in one row along the batch's axis."""
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    if len(own) == mesh.size:
        return mesh
    return Mesh(np.array(own).reshape(1, -1), mesh.axis_names, axis_types=mesh.axis_types)


def joined(mesh: Mesh, parts: Sequence[jax.Array]) -> jax.Array:
    """Return parts of a batch as one array over `mesh`; a single part as it is.

    Args:
        parts: each may lie on another device, as frames on a GPU lie where they were imagined.
    """
    if len(parts) == 1:
        return parts[0]
    # Arrays on different devices cannot meet in one computation.
    parts = jax.device_put(list(parts), mesh.devices.flat[0])
    return jax.device_put(jnp.concatenate(parts), batch_sharding(mesh))


def to_global(mesh: Mesh, tree):
    """Join every process's rows (arrays over its `local_mesh`) to arrays over `mesh`.

    The first axis is the batch; processes follow one another in the order of their numbers.
    Nothing is copied.
    """
    rows, own = batch_sharding(mesh), local_mesh(mesh)
    if own is mesh:
        return tree

    def join(x: jax.Array) -> jax.Array:
        shape = (x.shape[0] * mesh.size // own.size, *x.shape[1:])
        parts = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(shape, rows, parts)

    return jax.tree.map(join, tree)


def to_local(mesh: Mesh, tree):
    """Undo `to_global`: this process's rows of arrays that lie over `mesh` by their batch."""
    own = local_mesh(mesh)
    if own is mesh:
        return tree
    rows = batch_sharding(own)

    def part(x: jax.Array) -> jax.Array:
        shape = (x.shape[0] * own.size // mesh.size, *x.shape[1:])
        parts = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(shape, rows, parts)

    return jax.tree.map(part, tree)


def lay(mesh: Mesh, tree):
    """Return this process's rows laid over its part of a mesh, cut along the first axis."""
    return jax.device_put(tree, batch_sharding(local_mesh(mesh)))


def move(mesh: Mesh, tree):
    """Return a copy of parameters laid over another mesh, from device to device."""
    return jax.device_put(tree, tree_shardings(mesh, tree))


def gather(tree):
    """Return NumPy arrays of all processes joined along their first axis, on every process."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.process_allgather(tree, tiled=True)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose first axis is the batch: over every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def describe(tree, shardings) -> str:
    """One line per distinct sharding: how many arrays and parameters have it."""
    counts: dict[str, tuple[int, int]] = {}
    for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        name = "replicated" if sharding.is_fully_replicated else str(sharding.spec)
        arrays, entries = counts.get(name, (0, 0))
        counts[name] = (arrays + 1, entries + int(np.prod(leaf.shape, dtype=np.int64)))
    return "\n".join(
        f"{name}: {arrays} arrays, {entries:,} entries"
        for name, (arrays, entries) in counts.items()
    )
