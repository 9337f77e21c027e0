"""Supervised training of a policy on recorded episodes; `policy.train --data` runs it.

It begins with a policy folder, or with random weights of given sizes. It uses one device. The step
is the seed of all random numbers, so a resumed run repeats an uninterrupted one.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from algos.types import path_name
from evac_jax.devices.found import check_tool, parameters_in
from evac_jax.errors import DataError
from evac_jax.files import cards, libero_facts, recordings
from evac_jax.files.atomic import whole_folder
from evac_jax.files.recordings import Episodes
from evac_jax.policy_import import told_as_checkpoint_error
from evac_jax.tools import resume, sizes
from evac_jax.tools.command_line import refuse_existing
from evac_jax.tools.finite import check_finite
from evac_jax.tools.policy.data import GOAL_DIM, Batch, Chunks, action_statistics
from policies.openvla_oft.action_tokens import ActionStatistics, bin_centres
from policies.openvla_oft.export_hf import create_policy_folder, export_policy
from policies.openvla_oft.import_hf import (
    LoadedPolicy,
    abstract_model,
    load_config,
    load_policy,
)
from policies.openvla_oft.model import OpenVLAOFT
from policies.openvla_oft.peft import save_adapter
from policies.openvla_oft.prompt import PromptTokenizer
from policies.types import ObsBatch

CHECK_EVERY = 100  # steps after which losses are fetched and checked, at least
HELD_OUT_CHUNKS = 1024  # largest number of chunks that are scored, evenly spaced
ANY_LENGTH = 10**6  # limit of a prompt's length while the longest one is determined
# Arguments that must be the same when a run is resumed.
SETUP = (
    *("steps", "batch", "lr", "sd_bins", "seed", "chunk", "gripper", "unnorm_key"),
    *("start", "sizes", "sources", "successful", "every_step", "goal_weight", "keep_stop_token"),
    *("lora_rank", "lora_alpha", "compute_dtype"),
)
# Those that tell others how to read the policy.
TOLD = ("gripper", "unnorm_key", "chunk", "keep_stop_token")


def make_optimizer(lr: float, steps: int) -> optax.GradientTransformation:
    """Return AdamW with clipping, a short warm-up and a cosine decay to 0.01 of `lr`."""
    warmup = min(200, steps // 5)
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, warmup, steps, 0.01 * lr)
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.01)
    )


def check_start(args: argparse.Namespace) -> None:
    """Refuse a --start or --sizes that cannot be trained here, before anything slow.

    Raises:
        CheckpointError: --start is not there, or its config.json is not that of a policy.
        ConfigError: a large policy would be trained on the CPU beside a GPU.
    """
    field, parameters = "--start", 0
    if args.start:
        with told_as_checkpoint_error(f"--start: cannot import {args.start!r}"):
            load_config(args.start)
        parameters = parameters_in(Path(args.start))
    if args.sizes:
        state = nnx.state(abstract_model(sizes.policy(args.sizes)))
        field, parameters = "--sizes", sum(leaf.size for leaf in jax.tree.leaves(state))
    check_tool(field, parameters, cpu_beside_gpu=args.cpu_beside_gpu)


def check_trained(step: int, losses: Sequence[Any], trained: Any, advice: str) -> None:
    """Refuse losses or weights that are not finite. Call it every `CHECK_EVERY` steps, at least.

    Args:
        step: the last one, from 1 on.
        losses: of all steps up to it, scalars or vectors; the last `CHECK_EVERY` are checked.
        trained: tree of the weights after it.
        advice: what the user can do.

    Raises:
        TrainingError: names the step.
    """
    latest = losses[-CHECK_EVERY:]
    for number, loss in enumerate(latest, step - len(latest) + 1):
        check_finite(number, advice, loss=float(np.sum(loss)))
    largest = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(trained) if leaf.size]
    check_finite(step, advice, largest_weight=float(np.max(largest)))  # `max` may hide a NaN


def soft_targets(
    actions: jax.Array, statistics: ActionStatistics, sd_bins: float, num_bins: int = 256
) -> jax.Array:
    """Return probabilities [B K A num_bins], lowest token id first, around actions [B K A]."""
    low, high, mask = (jnp.asarray(x) for x in (statistics.low, statistics.high, statistics.mask))
    normalised = jnp.where(mask, 2 * (actions - low) / (high - low) - 1, actions)
    centres = jnp.asarray(bin_centres(num_bins), jnp.float32)
    sd = sd_bins * 2 / (num_bins - 1)
    return jax.nn.softmax(-0.5 * ((centres - normalised[..., None]) / sd) ** 2)


def finetune(args: argparse.Namespace) -> dict[str, float]:
    """Train, write the policy folder `args.out` and return its held-out scores.

    Raises:
        DataError: the recordings do not fit, or `args.out` exists.
        CheckpointError: the progress beside `args.out` belongs to another run.
    """
    out = Path(args.out)
    refuse_existing(out)
    training, held_out = _episodes(args)
    stats = action_statistics(training, args.gripper)
    progress = out.with_name(out.name + ".progress.safetensors")
    # The folder is held from here on: two processes would write one progress.
    with whole_folder(out) as folder, tempfile.TemporaryDirectory() as scratch:
        start = args.start or str(_new_policy(args, training, Path(scratch, "policy")))
        scores = _finetune(args, start, training, held_out, stats, progress, folder)
    progress.unlink(missing_ok=True)
    return scores


def _finetune(args, start: str, training: Episodes, held_out: Episodes, stats, progress, folder):
    """Train the policy of the folder `start`, write it to the new one and return its scores."""
    loaded = _load(args, start, training)
    prompts = tuple(jnp.asarray(x) for x in loaded.tokenizer.encode(list(training.instructions)))
    parts = [
        Chunks(training, args.chunk, stats, args.gripper, every_step=args.every_step),
        Chunks(held_out, args.chunk, stats, args.gripper),
    ]
    if args.goal_weight and not parts[0].knows_goals:
        raise DataError(
            "--goal_weight: no recording tells where things are (objects.npy, docs/episodes.md); "
            "leave it out, or record anew"
        )
    logging.info("%d chunks for training, %d held out", *map(len, parts))
    digests = [cards.sha256(Path(folder) / "card.json") for folder in args.data]
    setup = {name: getattr(args, name) for name in SETUP} | {"data": digests}
    began = time.perf_counter()
    model, history = _train(args, loaded.model, prompts, *parts, setup, progress)
    export_policy(model, folder, source=start, norm_stats={args.unnorm_key: stats})
    if args.lora_rank:
        save_adapter(model, folder / "adapter", base=start)
    facts = cards.card(
        data=digests,
        libero=libero_facts.told(training.card),
        **{name: getattr(args, name) for name in TOLD},
        start=cards.read(Path(start)),
        history=history,
        scores=history[-1],
        seconds=time.perf_counter() - began,
    )
    cards.write_json(folder / "card.json", facts)
    if args.lora_rank:
        cards.write_json(folder / "adapter" / "card.json", facts)
    return history[-1]


def _episodes(args: argparse.Namespace) -> tuple[Episodes, Episodes]:
    data = recordings.load(*args.data)
    if args.sources:
        if unknown := sorted(set(args.sources) - set(data.sources)):
            raise DataError(f"--sources: the recordings have {data.sources}, got {unknown}")
        data = data.select(np.isin(np.array(data.sources)[data.source], args.sources))
    if args.successful:
        data = data.select(data.success_once())
    return data.both_parts()


def _new_policy(args: argparse.Namespace, data: Episodes, folder: Path) -> Path:
    """Write a policy of random weights, whose tokenizer knows the instructions, to a new folder."""
    config = dataclasses.replace(
        sizes.policy(args.sizes), chunk=args.chunk, num_images=data.frames.shape[1]
    )
    unchanged = ActionStatistics.identity(recordings.ACTION_DIM)
    model = OpenVLAOFT(config, unchanged, rngs=nnx.Rngs(args.seed))
    return create_policy_folder(model, folder, tasks=data.instructions, norm_stats={})


def _load(args: argparse.Namespace, start: str, data: Episodes) -> LoadedPolicy:
    """Load the start policy for the recording's cameras; labels are normalised beforehand."""
    # Results do not depend on the padding, so prompts are padded only to the longest one.
    with told_as_checkpoint_error(f"--start: cannot import {start!r}"):
        tokenizer = PromptTokenizer(start, ANY_LENGTH)
        loaded = load_policy(
            start,
            unnorm_key="",
            action_dim=recordings.ACTION_DIM,
            chunk=args.chunk,
            num_images=data.frames.shape[1],
            max_prompt_length=max(len(tokenizer.prompt_ids(text)) for text in data.instructions),
            lora_rank=args.lora_rank,
            lora_alpha=args.lora_alpha,
            # Weights that train need float32 because steps are small; a frozen base does not.
            param_dtype=args.compute_dtype if args.lora_rank else "float32",
            compute_dtype=args.compute_dtype,
            keep_stop_token=args.keep_stop_token,
            remat="full" if args.remat else "none",
            seed=args.seed,
        )
    for note in loaded.notes:
        logging.info("policy import: %s", note)
    return loaded


def _train(args, model, prompts, training: Chunks, held_out: Chunks, setup, progress: Path):
    """Return the trained model and the held-out scores during training."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = make_optimizer(args.lr, args.steps)
    rng = np.random.default_rng((args.seed, args.steps))
    width = model.config.hidden_size
    readout = jnp.asarray(0.05 * rng.normal(size=(width, GOAL_DIM + 3)), jnp.float32)
    trained = params, readout
    state, history = (trained, jax.jit(optimizer.init)(trained)), []
    done = 0
    if progress.exists():
        state, facts = load_progress(progress, setup, state)
        done, history = facts["step"], facts["history"]
        logging.info("resumed at step %d", done)
    step, score = _compile(graphdef, optimizer, args.sd_bins, args.goal_weight)

    def score_if_due(number: int) -> None:
        due = number % args.score_every == 0 or number == args.steps
        if due and number not in [entry["step"] for entry in history]:
            scores = validate(partial(score, state[0], rest), held_out, prompts, args.batch)
            history.append({"step": number, **scores})
            logging.info("held-out: %s", history[-1])

    if done:  # it was saved before it was scored
        score_if_due(done)
    losses, began = [], time.perf_counter()
    for i in range(done, args.steps):
        which = np.random.default_rng((args.seed, i)).integers(len(training), size=args.batch)
        state, loss = step(state, rest, *_inputs(training.read(which), prompts))
        losses.append(loss)
        last = i + 1 == args.steps
        every = (CHECK_EVERY, args.score_every, args.save_every)
        if last or any((i + 1) % count == 0 for count in every):
            advice = f"Nothing of it was saved; try a lower --lr ({args.lr:g})"
            if progress.exists():
                advice += f" and remove {progress}"
            check_trained(i + 1, losses, state[0], advice)
        if (i + 1) % 100 == 0:
            rate, mean = (i + 1 - done) / (time.perf_counter() - began), np.mean(losses[-100:])
            logging.info("step %d/%d  loss %.4f  %.2f steps/s", i + 1, args.steps, mean, rate)
        if (i + 1) % args.save_every == 0 or last:
            save_progress(progress, setup, state, {"step": i + 1, "history": history})
        score_if_due(i + 1)
    return nnx.merge(graphdef, state[0][0], rest), history


def _compile(graphdef, optimizer, sd_bins: float, goal_weight: float):
    """Return jitted (state, rest, batch) -> state, loss and (trained, rest, batch) -> sums [3].

    Besides its token, every action slot must predict the goals through a linear read-out that is
    discarded afterwards, as on the tabletop (`policy.train`).
    """

    def outputs(trained, rest, obs, actions, valid, goals):
        """Sums of cross-entropy, right tokens and tokens of valid actions; error of the goals."""
        params, readout = trained
        model = nnx.merge(graphdef, params, rest)
        pixels = model.pixel_values(obs.images)
        forward = model.forward(pixels, obs.prompt_tokens, obs.prompt_mask)
        logits = model.action_logits(forward.slots).reshape(*actions.shape, -1)
        num_bins, dim = logits.shape[-1], actions.shape[-1]
        targets = soft_targets(actions, ActionStatistics.identity(dim), sd_bins, num_bins)
        # The two lowest ids mean the same action, so values are compared instead of ids.
        centres = jnp.asarray(bin_centres(num_bins))
        right = centres[logits.argmax(-1)] == centres[targets.argmax(-1)]
        losses = optax.softmax_cross_entropy(logits, targets)
        counted = jnp.broadcast_to(valid[..., None], actions.shape)
        summed = [(x * counted).sum() for x in (losses, right, jnp.ones_like(losses))]
        known = jnp.isfinite(goals)[:, None]
        off = jnp.abs(forward.slots @ readout - jnp.where(known, goals[:, None], 0)) * known
        goal_error = off.sum() / jnp.maximum(known.sum() * off.shape[1], 1)
        return jnp.stack(summed), goal_error

    def loss_fn(trained, *batch):
        (loss, _, count), goal_error = outputs(trained, *batch)
        return loss / count + goal_weight * goal_error

    # `rest` is an argument, because arrays that a jitted function closes over are copied into it.
    @partial(jax.jit, donate_argnums=0)
    def step(state, rest, *batch):
        trained, opt_state = state
        loss, gradient = jax.value_and_grad(loss_fn)(trained, rest, *batch)
        updates, opt_state = optimizer.update(gradient, opt_state, trained)
        return (optax.apply_updates(trained, updates), opt_state), loss

    return step, jax.jit(lambda *arguments: outputs(*arguments)[0])


def _inputs(batch: Batch, prompts) -> tuple[ObsBatch, jax.Array, jax.Array, jax.Array]:
    obs = ObsBatch(
        images=jnp.asarray(batch.frames),
        prompt_tokens=prompts[0][batch.task],
        prompt_mask=prompts[1][batch.task],
    )
    return obs, jnp.asarray(batch.actions), jnp.asarray(batch.valid), jnp.asarray(batch.goals)


def validate(score, chunks: Chunks, prompts, size: int) -> dict[str, float]:
    """Return loss per token (nats) and token accuracy (0..1) on at most HELD_OUT_CHUNKS chunks.

    Args:
        score: (obs, actions, valid, goals) -> sums of losses, right tokens, tokens.
        size: batch size; the last batch is filled with rows that do not count.
    """
    chosen = np.linspace(0, len(chunks) - 1, min(len(chunks), HELD_OUT_CHUNKS)).round().astype(int)
    total = np.zeros(3)
    for first in range(0, len(chosen), size):
        which = chosen[first : first + size]
        obs, actions, valid, goals = _inputs(chunks.read(np.resize(which, size)), prompts)
        counted = valid & (np.arange(size) < len(which))[:, None]
        total += np.asarray(score(obs, actions, counted, goals))
    return {"loss": float(total[0] / total[2]), "token_accuracy": float(total[1] / total[2])}


def save_progress(path: Path, setup: dict[str, Any], state: Any, facts: dict[str, Any]) -> None:
    """Write a tree of arrays, `facts` and the arguments of the run.

    Raises:
        StorageError: it cannot be written; an earlier one stays.
    """
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    arrays = {path_name(name): np.asarray(leaf) for name, leaf in leaves}
    texts = {"setup": setup, "facts": facts}
    with resume.saving(path, SafetensorError) as temporary:
        save_file(arrays, temporary, metadata={k: json.dumps(v) for k, v in texts.items()})


def load_progress(path: Path, setup: dict[str, Any], like: Any) -> tuple[Any, dict[str, Any]]:
    """Return (state, facts) of `save_progress`, shaped as `like`.

    Raises:
        CheckpointError: it is damaged, or was made with other arguments.
    """
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata()
            resume.check_same_run(path, json.loads(metadata["setup"]), setup)
            state = jax.tree_util.tree_map_with_path(
                lambda name, _: jnp.asarray(file.get_tensor(path_name(name))), like
            )
    except SafetensorError as error:
        raise resume.damaged(path, error) from error
    return state, json.loads(metadata["facts"])
