"""Imports the configured policy; progress is shown, every failure is a CheckpointError."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from absl import logging

from evac_jax.config import PolicyConfig
from evac_jax.errors import CheckpointError
from evac_jax.telemetry.reading import ReadProgress
from policies import POLICIES


def import_policy(policy: PolicyConfig, *, seed: int, **more: Any) -> Any:
    """Return the loader's result (model, tokenizer, notes) for `policy`.

    Args:
        seed: of parameters that start fresh.
        more: further arguments of the loader (chunk, num_images, shardings ..).

    Raises:
        CheckpointError: the checkpoint or the adapter cannot be imported; says why.
    """
    module, name = POLICIES["openvla_oft"].split(":")
    load = getattr(importlib.import_module(module), name)
    what = f"config.policy.checkpoint: cannot import {policy.checkpoint!r}"
    with told_as_checkpoint_error(what), ReadProgress("policy weights") as progress:
        loaded = load(
            policy.checkpoint,
            unnorm_key=policy.unnorm_key,
            value_type=policy.value_head,
            param_dtype=policy.param_dtype,
            compute_dtype=policy.compute_dtype,
            max_prompt_length=policy.max_prompt_length,
            lora_rank=policy.lora_rank,
            lora_alpha=policy.lora_alpha,
            lora_adapter=policy.lora_adapter,
            keep_stop_token=policy.keep_stop_token,
            remat="full" if policy.remat else "none",
            scan_layers=policy.scan_layers,
            seed=seed,
            progress=progress,
            **more,
        )
    for note in loaded.notes:
        logging.info("policy import: %s", note)
    return loaded


@contextlib.contextmanager
def told_as_checkpoint_error(what: str) -> Iterator[None]:
    """Turn what policies/ raise about files into a CheckpointError that begins with `what`."""
    try:
        yield
    except (OSError, KeyError, ValueError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise CheckpointError(f"{what}: {text}") from error
