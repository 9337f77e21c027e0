"""Saves and restores a run with Orbax: parameters, optimiser, sampler, progress and configuration.

With `train.max_staleness` the episodes that were collected ahead are saved as well: the policy that
played them is gone.

Not to be confused with importing pretrained weights (`policy.checkpoint`): a restored run takes its
parameters from here and nothing from there. Order of precedence: 1. checkpoint.restore, 2. the
import. Orbax writes each checkpoint under a temporary name and renames it, so a killed run leaves
the previous one whole.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from logging import WARNING, getLogger
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from algos.types import path_name
from evac_jax.config import hub
from evac_jax.config.build import to_dict
from evac_jax.config.schema import TrainConfig
from evac_jax.devices import hosts, together
from evac_jax.errors import CheckpointError, DamagedCheckpointError, EvacJaxError, StorageError

CONFIG_FILE = "config.json"
EPISODES = "episodes"  # an item of a checkpoint, beside "state" and "meta"

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
PATH_FIELDS = ("policy.checkpoint", "policy.lora_adapter")  # of those; the same place is the same


class Checkpoints:
    """The checkpoints of one run, named by the number of finished iterations."""

    def __init__(self, directory: Path, keep: int | None):
        self.directory = directory.absolute()
        self._damaged: set[int] = set()  # those that were found to be
        self._manager = ocp.CheckpointManager(
            self.directory,
            # Named here because a process that only restores has not saved with them before.
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                EPISODES: ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, enable_async_checkpointing=False
            ),
        )

    def latest(self) -> int | None:
        """Return the iteration of the newest whole checkpoint, None when there is none."""
        return self._manager.latest_step()

    @property
    def iterations(self) -> list[int]:
        """Iterations of all whole checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def existing(self, iteration: int) -> int:
        """See the function `existing`."""
        return existing(self.directory, iteration)

    def save(self, iteration: int, state: Any, meta: dict[str, Any], episodes: Any = None) -> None:
        """Write a checkpoint: `state` is a tree of arrays, `meta` plain JSON values.

        Args:
            episodes: tree of arrays that only a run that goes on needs; None = there are none.

        Raises:
            CheckpointError: a later one is there already, so nothing was written.
            StorageError: it cannot be written, such as to a full disk.
        """
        items = {"state": ocp.args.StandardSave(_flat(state)), "meta": ocp.args.JsonSave(meta)}
        if episodes is not None:
            items[EPISODES] = ocp.args.StandardSave(_flat(episodes))
        try:
            saved = self._manager.save(iteration, args=ocp.args.Composite(**items))
        except (OSError, ValueError, RuntimeError) as error:  # TensorStore's are of all three types
            raise StorageError(
                f"the checkpoint of iteration {iteration} could not be written to "
                f"{self.directory}: {error}"
            ) from error
        if not saved:
            raise CheckpointError(
                f"the checkpoint of iteration {iteration} was not written: {self.directory} holds "
                f"those of {iterations_in(self.directory)}; set another --config.checkpoint.dir"
            )

    def restore(
        self, iteration: int, like: Any, *, run_id: str | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Return (state, meta) of an iteration, placed as the arrays of `like` are.

        Args:
            run_id: refuse a checkpoint whose meta["run"] is another one; None = take any.

        Raises:
            CheckpointError: the stored arrays are not those of `like`, or are another run's.
            DamagedCheckpointError: they cannot be read; names the other checkpoints.
        """
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, _flat(like))
        with self._reading(iteration):
            if problems := _differences(self.shapes(iteration), template):
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
        meta = restored["meta"]
        if run_id is not None and meta.get("run", run_id) != run_id:
            raise CheckpointError(
                f"{self.directory} holds the checkpoints of another run; give the folder of this "
                "one's as --config.checkpoint.dir"
            )
        leaves = [restored["state"][name] for name in _flat(like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), meta

    def _restore_episodes(self, iteration: int, like: Any) -> Any:
        """Return the episodes that were saved with an iteration; None if they are of other shapes.

        Raises:
            DamagedCheckpointError: they cannot be read.
        """
        template = _flat(like)
        with self._reading(iteration, "the episodes of "):
            stored = dict(self._manager.item_metadata(iteration)[EPISODES])
            if problems := _differences(stored, template):
                logging.warning(
                    "the episodes saved with checkpoint %d are of other settings, so they are "
                    "collected again, by the newest policy:\n  %s",
                    *(iteration, "\n  ".join(problems)),
                )
                return None
            items = {EPISODES: ocp.args.StandardRestore(template)}
            restored = self._manager.restore(iteration, args=ocp.args.Composite(**items))
        leaves = [restored[EPISODES][name] for name in template]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def go_back_to(
        self, iteration: int, like: Any, run_id: str, episodes_like: Any = None
    ) -> tuple[int, Any, dict[str, Any], Any]:
        """Return (iteration, state, meta, episodes) of a checkpoint; a run goes on from it.

        Nothing is changed yet: once the run is known to go on, it calls `set_aside_after`.

        Args:
            iteration: of the checkpoint; -1 = the newest that can be read. Several hosts do not
                search: each reads other files, and so only one of them may meet the damage.
            episodes_like: shapes and places of the episodes, if they are wanted. They are None
                where none were saved, or those of other settings.

        Raises:
            CheckpointError: see `restore`.
        """
        search = iteration == -1 and jax.process_count() == 1
        choice = self.iterations if search else [self.existing(iteration)]
        for found in reversed(choice):
            try:
                state, meta = self.restore(found, like, run_id=run_id)
                wanted = episodes_like is not None and "ahead" in meta
                episodes = self._restore_episodes(found, episodes_like) if wanted else None
            except DamagedCheckpointError as error:
                if found == choice[0]:
                    raise
                logging.warning("%s; going on from the one before", str(error).partition("\n")[0])
                continue
            return found, state, meta, episodes
        raise CheckpointError(f"{self.directory} has no checkpoint")

    def set_aside_after(self, iteration: int) -> None:
        """Rename later checkpoints to <iteration>.later, or .damaged; they are never read again."""
        if not (later := [n for n in self.iterations if n > iteration]):
            return
        if hosts.is_first_host():
            for n in later:
                name, number = f"{n}.{'damaged' if n in self._damaged else 'later'}", 1
                path = self.directory / name
                while path.exists():
                    number += 1
                    path = self.directory / f"{name}{number}"
                os.replace(self.directory / str(n), path)
                logging.warning("checkpoint %d is kept as %s", n, path)
        together.wait_for_all("checkpoints set aside")
        self._damaged.clear()  # none of them is there any more
        self._manager.reload()

    def restore_part(self, iteration: int, name: str, like: Any) -> Any:
        """Return the part "<name>/..." of an iteration's state, on one device, shaped as `like`.

        Raises:
            CheckpointError: the stored arrays of that part are not those of `like`.
            DamagedCheckpointError: they cannot be read; names the other checkpoints.
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
        with self._reading(iteration), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
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
        """Return what an iteration's state holds: path -> something with shape and dtype.

        Raises:
            DamagedCheckpointError: it does not tell; names the other checkpoints.
        """
        with self._reading(iteration):
            metadata = self._manager.item_metadata(iteration)["state"]
            if not metadata:
                raise ValueError("it does not say which arrays it has")
            return dict(metadata)

    @contextlib.contextmanager
    def _reading(self, iteration: int, what: str = "") -> Iterator[None]:
        """Tell damage that the block meets, in one line, and the other checkpoints in the next."""
        try:
            yield
        except (EvacJaxError, MemoryError):
            raise
        except Exception as error:  # of many types, by which file is damaged and how
            self._damaged.add(iteration)
            # Orbax wraps TensorStore's reason, which ends with all its settings.
            reason = re.split(r"\n|\[tensorstore_spec", str(error.__cause__ or error))[0]
            others = [n for n in self.iterations if n not in self._damaged]
            choice = f"{others}; choose one with --config.checkpoint.step, or a tool's --step"
            raise DamagedCheckpointError(
                f"{what}checkpoint {self.directory}/{iteration} cannot be read: {reason}\n"
                f"Others that are there: {choice if others else 'none'}"
            ) from error

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


def iterations_in(checkpoints: Path) -> list[int]:
    """Return the iterations of the whole checkpoints in a folder, in order."""
    return sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdigit())


def existing(checkpoints: Path, iteration: int) -> int:
    """Return `iteration`, or that of the newest checkpoint for -1.

    Raises:
        CheckpointError: there is no such checkpoint; names the existing ones.
    """
    found = iterations_in(checkpoints)
    if not found:
        raise CheckpointError(f"{checkpoints} has no checkpoint yet")
    if iteration != -1 and iteration not in found:
        raise CheckpointError(
            f"config.checkpoint.step: {checkpoints} has no checkpoint of iteration "
            f"{iteration}; there are {found}. config.checkpoint.keep says how many a run keeps"
        )
    return found[-1] if iteration == -1 else iteration


def saved_config(run: Path) -> dict[str, Any] | None:
    """Return what a run's config.json says; None where it is missing or damaged."""
    try:
        values = json.loads((run / CONFIG_FILE).read_text())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and "algorithm" in values else None


def folder_of(config: TrainConfig, run: Path) -> Path:
    """Return where a run's checkpoints are: as configured, else as it was saved with."""
    saved = (saved_config(run) or {}).get("checkpoint", {}).get("dir")
    return Path(config.checkpoint.dir or saved or run / "checkpoints")


def find_run(config: TrainConfig) -> Path | None:
    """Return the run folder that `checkpoint.restore` names; None if "auto" finds none.

    Raises:
        CheckpointError: there is no such run, or it has no checkpoint.
    """
    restore, root = config.checkpoint.restore, Path(config.log.dir)
    if restore == "auto":
        folder = root / config.log.run
        is_run = saved_config(folder) is not None and iterations_in(folder_of(config, folder))
        return folder if is_run else None
    if restore != "latest":
        return _named_run(config, Path(restore))
    if config.log.run:
        candidates = [root / config.log.run]
    else:
        ages = {path: path.stat(follow_symlinks=path.exists()).st_mtime for path in root.glob("*")}
        candidates = sorted(ages, key=ages.__getitem__, reverse=True)
    passed = []
    for folder in candidates:
        saved = saved_config(folder)
        lost = folder.is_symlink() and not folder.exists()  # a link that leads nowhere
        if saved is None and not (lost or (folder / CONFIG_FILE).exists()):
            continue
        if saved is None or saved["algorithm"] == config.algorithm:
            if saved and iterations_in(folder_of(config, folder)):
                if passed:
                    logging.warning("passed over, as they have no checkpoint: %s", passed)
                return folder
            passed.append(str(folder))
    also = f" with a checkpoint (without one: {', '.join(passed)})" if passed else ""
    raise CheckpointError(
        f"config.checkpoint.restore=latest: no {config.algorithm} run under {str(root)!r}{also}; "
        "set config.log.dir to the folder that holds it, or leave restore empty to start anew"
    )


def _named_run(config: TrainConfig, folder: Path) -> Path:
    if folder.name == "checkpoints":
        folder = folder.parent
    field = f"config.checkpoint.restore: {str(folder)!r}"
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{field} is not a run folder (no {CONFIG_FILE}); give the folder under log.dir, or "
            "'latest'"
        )
    if saved_config(folder) is None:
        raise CheckpointError(f"{field} has a damaged {CONFIG_FILE}; expected a run's settings")
    if not iterations_in(where := folder_of(config, folder)):
        raise CheckpointError(
            f"{field} has no checkpoint in {str(where)!r}, so nothing to go on from; leave restore "
            "empty to start anew"
        )
    return folder


def named_run(config: TrainConfig) -> Path:
    """Return the run that `checkpoint.restore` names, for an evaluation: there must be one.

    Raises:
        CheckpointError: as `resumable_run`, or "auto" finds none.
    """
    if (run := resumable_run(config)) is None:
        raise CheckpointError(
            f"config.checkpoint.restore=auto: {str(Path(config.log.dir, config.log.run))!r} has no "
            "checkpoint yet"
        )
    return run


def resumable_run(config: TrainConfig) -> Path | None:
    """Return the run folder that `checkpoint.restore` names, if this configuration can go on there.

    None if "auto" finds no run.

    Raises:
        CheckpointError: there is no such run, or its arrays have other shapes.
    """
    if (path := find_run(config)) is not None:
        check_resumable(saved_config(path) or {}, to_dict(config))
    return path


def check_resumable(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to continue a run whose arrays would have other shapes now.

    Fields that the run's version did not have are not compared.

    Raises:
        CheckpointError: names every such field with both values.
    """

    def value(config: dict[str, Any], field: str) -> Any:
        for part in field.split("."):
            config = config.get(part, {})
        return config

    def differ(field: str) -> bool:
        values = value(saved, field), value(current, field)
        if field in PATH_FIELDS and all(values):
            values = tuple(hub.address_of(hub.absolute(path)) for path in values)
        return values[0] != {} and values[0] != values[1]

    changed = [
        f"config.{field}: the run has {value(saved, field)!r}, now {value(current, field)!r}"
        for field in SHAPE_FIELDS
        if differ(field)
    ]
    if changed:
        raise CheckpointError(
            "the run cannot be continued with this configuration:\n  " + "\n  ".join(changed)
        )
