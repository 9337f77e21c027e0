"""Saves and restores a run with Orbax: parameters, optimiser, sampler, progress and configuration.

Not to be confused with importing pretrained weights (`policy.checkpoint`): a restored run takes its
parameters from here and nothing from there. Order of precedence: 1. checkpoint.restore, 2. the
import. Orbax writes each checkpoint under a temporary name and renames it, so a killed run leaves
the previous one whole.
"""

import json
from logging import WARNING, getLogger
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from algos.types import path_name
from evac_jax.config.build import to_dict
from evac_jax.config.schema import TrainConfig
from evac_jax.errors import CheckpointError

CONFIG_FILE = "config.json"

# Orbax logs every save in several lines at INFO, and JAX logs every backend that it does not find.
# What matters to a user is logged by the run itself.
getLogger("jax").setLevel(WARNING)
logging.get_absl_logger().addFilter(
    lambda record: record.levelno >= WARNING or "orbax" not in record.pathname
)

# Fields that shape the parameters or the optimiser's state: a run cannot go on when they change.
SHAPE_FIELDS = (
    "algorithm",
    "policy.checkpoint",
    "policy.lora_rank",
    "policy.lora_alpha",
    "policy.lora_adapter",
    "policy.value_head",
    "policy.scan_layers",
    "policy.param_dtype",
)


class Checkpoints:
    """The checkpoints of one run, named by the number of finished iterations."""

    def __init__(self, directory: Path, keep: int | None):
        self.directory = directory.absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            # Named here because a process that only restores has not saved with them before.
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, enable_async_checkpointing=False
            ),
        )

    def latest(self) -> int | None:
        """Return the iteration of the newest whole checkpoint, None when there is none."""
        return self._manager.latest_step()

    def existing(self, iteration: int) -> int:
        """Return `iteration`, or that of the newest checkpoint for -1.

        Raises:
            CheckpointError: there is no such checkpoint; names the existing ones.
        """
        stored = sorted(self._manager.all_steps())
        if not stored or (iteration != -1 and iteration not in stored):
            raise CheckpointError(
                f"config.checkpoint.step: {self.directory} has no checkpoint of iteration "
                f"{iteration}; there are {stored}. config.checkpoint.keep says how many a run keeps"
            )
        return stored[-1] if iteration == -1 else iteration

    def save(self, iteration: int, state: Any, meta: dict[str, Any]) -> None:
        """Write a checkpoint: `state` is a tree of arrays, `meta` plain JSON values."""
        self._manager.save(
            iteration,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_flat(state)), meta=ocp.args.JsonSave(meta)
            ),
        )

    def restore(self, iteration: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Return (state, meta) of an iteration, placed as the arrays of `like` are.

        Raises:
            CheckpointError: the stored arrays are not those of `like`.
        """
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, _flat(like))
        stored = self._manager.item_metadata(iteration)["state"]
        problems = _differences(dict(stored), template)
        if problems:
            raise CheckpointError(
                f"checkpoint {self.directory}/{iteration} does not fit this configuration:\n  "
                + "\n  ".join(problems)
            )
        restored = self._manager.restore(
            iteration,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(template), meta=ocp.args.JsonRestore()
            ),
        )
        leaves = [restored["state"][name] for name in _flat(like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), restored["meta"]

    def restore_part(self, iteration: int, name: str, like: Any) -> Any:
        """Return the part "<name>/..." of an iteration's state, on one device, shaped as `like`.

        Raises:
            CheckpointError: the stored arrays of that part are not those of `like`.
        """
        stored = self.shapes(iteration)
        wanted = {f"{name}/{path}": leaf for path, leaf in _flat(like).items()}
        part = {path: array for path, array in stored.items() if path.startswith(f"{name}/")}
        if problems := _differences(part, wanted):
            raise CheckpointError(
                f"checkpoint {self.directory}/{iteration} does not fit:\n  " + "\n  ".join(problems)
            )
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        template = {
            path: jax.ShapeDtypeStruct(tuple(array.shape), array.dtype, sharding=device)
            for path, array in part.items()
        }
        # The manager's own handler reads whole states; the optimiser's is larger than the policy.
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            restored = reader.restore(
                self.directory / str(iteration) / "state",
                args=ocp.args.PyTreeRestore(
                    item=template,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(template),
                    partial_restore=True,
                ),
            )
        return jax.tree.unflatten(jax.tree.structure(like), [restored[path] for path in wanted])

    def shapes(self, iteration: int) -> dict[str, Any]:
        """Return what an iteration's state holds: path -> something with shape and dtype."""
        return dict(self._manager.item_metadata(iteration)["state"])

    def close(self) -> None:
        """Wait for writes under way."""
        self._manager.close()


def _flat(tree: Any) -> dict[str, jax.Array]:
    """Return {path: leaf} in flattening order: readable on disk, free of our class names."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): leaf for path, leaf in leaves}


def _differences(stored: dict, wanted: dict) -> list[str]:
    """One line per array that is missing, left over or of another shape (at most 20)."""
    lines = [f"missing in the checkpoint: {name}" for name in wanted if name not in stored]
    lines += [f"not wanted here: {name}" for name in stored if name not in wanted]
    lines += [
        f"{name}: expected shape {tuple(wanted[name].shape)}, got {tuple(stored[name].shape)}"
        for name in wanted
        if name in stored and tuple(stored[name].shape) != tuple(wanted[name].shape)
    ]
    return lines[:20] + ([f"... and {len(lines) - 20} more"] if len(lines) > 20 else [])


def find_run(config: TrainConfig) -> Path:
    """Return the run folder that `checkpoint.restore` names.

    Raises:
        CheckpointError: there is no such run, or it has no checkpoint.
    """
    restore, root = config.checkpoint.restore, Path(config.log.dir)
    if restore != "latest":
        folder = Path(restore)
        if folder.name == "checkpoints":
            folder = folder.parent
        if not (folder / CONFIG_FILE).is_file():
            raise CheckpointError(
                f"config.checkpoint.restore: {restore!r} is not a run folder (no {CONFIG_FILE}); "
                "give the folder under log.dir, or 'latest'"
            )
        return folder
    if config.log.run:
        candidates = [root / config.log.run]
    else:
        candidates = sorted(root.glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for folder in candidates:
        saved = folder / CONFIG_FILE
        if saved.is_file() and json.loads(saved.read_text())["algorithm"] == config.algorithm:
            return folder
    raise CheckpointError(
        f"config.checkpoint.restore=latest: no {config.algorithm} run under {str(root)!r}; "
        "set config.log.dir to the folder that holds it, or leave restore empty to start anew"
    )


def resumable_run(config: TrainConfig) -> Path:
    """Return the run folder that `checkpoint.restore` names, if this configuration can go on there.

    Raises:
        CheckpointError: there is no such run, or its arrays have other shapes.
    """
    path = find_run(config)
    check_resumable(json.loads((path / CONFIG_FILE).read_text()), to_dict(config))
    return path


def check_resumable(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to continue a run whose arrays would have other shapes now.

    Raises:
        CheckpointError: names every such field with both values.
    """

    def value(config: dict, field: str):
        for part in field.split("."):
            config = config[part]
        return config

    changed = [
        f"config.{field}: the run has {value(saved, field)!r}, now {value(current, field)!r}"
        for field in SHAPE_FIELDS
        if value(saved, field) != value(current, field)
    ]
    if changed:
        raise CheckpointError(
            "the run cannot be continued with this configuration:\n  " + "\n  ".join(changed)
        )
