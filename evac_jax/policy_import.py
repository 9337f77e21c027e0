"""Imports the configured policy; progress is shown, every failure is a CheckpointError."""

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from evac_jax.config.schema import PolicyConfig, TrainConfig
from evac_jax.errors import CheckpointError
from evac_jax.files import cards
from evac_jax.telemetry.reading import ReadProgress
from policies import POLICIES
from policies.base import LoadedPolicy


def check_policy(policy: PolicyConfig, tasks: Sequence[str] = ()) -> None:
    """Check that `policy` can be imported, as far as possible without reading weights.

    Args:
        policy: of the configuration.
        tasks: instructions that it will be asked for, as far as they are known.

    Raises:
        CheckpointError: it cannot; says why.
    """
    # Whether a value head fits depends on the simulator's chunk, which is not known yet.
    options = _options(policy) | {"value_type": "none"}
    with told_as_checkpoint_error(_what(policy)):
        _module().check_policy(policy.checkpoint, tasks=tasks, **options)


def known_tasks(config: TrainConfig) -> list[str]:
    """Return the instructions that the cards of a run's folders tell, before anything starts.

    Other sources of initial states tell theirs when they run.
    """
    folders = [config.env.keyframe_data] if config.env.keyframes else []
    if config.env.simulator == "world_model" and config.env.initial_states_path:
        folders.append(config.env.initial_states_path)
    texts = [
        text for folder in folders for text in cards.read(Path(folder)).get("instructions", ())
    ]
    return list(dict.fromkeys(texts))


def import_policy(policy: PolicyConfig, *, seed: int, **more: Any) -> LoadedPolicy:
    """Return the loader's result for `policy`.

    Args:
        seed: of parameters that start fresh.
        more: further arguments of the loader (chunk, num_images, shardings ..).

    Raises:
        CheckpointError: the checkpoint or the adapter cannot be imported; says why.
    """
    options = _options(policy) | more
    with told_as_checkpoint_error(_what(policy)), ReadProgress("policy weights") as progress:
        loaded = _module().load_policy(policy.checkpoint, seed=seed, progress=progress, **options)
    for note in loaded.notes:
        logging.info("policy import: %s", note)
    return loaded


def _module() -> Any:
    return importlib.import_module(POLICIES["openvla_oft"])


def _what(policy: PolicyConfig) -> str:
    return f"config.policy.checkpoint: cannot import {policy.checkpoint!r}"


def _options(policy: PolicyConfig) -> dict[str, Any]:
    """Return what the configuration says to a loader."""
    return {
        "unnorm_key": policy.unnorm_key,
        "value_type": policy.value_head,
        "param_dtype": policy.param_dtype,
        "compute_dtype": policy.compute_dtype,
        "max_prompt_length": policy.max_prompt_length,
        "lora_rank": policy.lora_rank,
        "lora_alpha": policy.lora_alpha,
        "lora_adapter": policy.lora_adapter,
        "keep_stop_token": policy.keep_stop_token,
        "remat": policy.remat,
        "scan_layers": policy.scan_layers,
    }


@contextlib.contextmanager
def told_as_checkpoint_error(what: str) -> Iterator[None]:
    """Turn what policies/ raise about files into a CheckpointError that begins with `what`."""
    try:
        yield
    except (OSError, KeyError, ValueError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise CheckpointError(f"{what}: {text}") from error
