"""The optimiser: AdamW in two groups with one clipped norm; schedules advance once per iteration.

optax passes two extra arguments: `iteration` (finished iterations) and `only_value_head` (critic
warm-up). The state holds the learning rates and the gradient norm of the last step, for metrics.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from algos.types import path_name
from policies.ranges import CountOrZero, NotNegative, Positive, Range, Share

Schedule = Literal["constant", "cosine", "openpi_cosine", "native_constant", "native_cosine"]
Beta = Annotated[float, Range(0, 1, open="high")]
NATIVE_COSINE_FLOOR = 1e-6  # absolute; RLinf hands it to torch's CosineAnnealingLR
VALUE_HEAD = "value_head"


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule.

    Attributes:
        lr: peak learning rate of the policy.
        value_lr: peak learning rate of parameters with "value_head" in their path; it has the
            effect of a value-loss coefficient.
        betas: decay rates of Adam's moments.
        eps: added to the square root of the second moment.
        weight_decay: decoupled weight decay, for both groups.
        clip_grad: largest global L2 norm of the gradient; a larger gradient is scaled down to it.
        schedule: "constant" (with warm-up); "cosine" (warm-up, then cosine to the floor, Hugging
            Face's); "openpi_cosine" (warm-up that does not start at 0, cosine held at the floor
            after the end); "native_constant" and "native_cosine" (torch's, without warm-up).
        warmup_iterations: iterations until the peak; -1 = warmup_ratio x total_iterations.
        warmup_ratio: share of total_iterations; used when warmup_iterations is -1.
        total_iterations: iterations of the whole schedule; required by the cosine schedules.
        min_lr: floor of the cosines as a learning rate, at most lr; the floor of the value group is
            in proportion.
        min_lr_rate: floor as a share of lr; it takes precedence over min_lr.
        num_cycles: number of cosine waves until the end; 0.5 = half a wave, from lr to the floor.
    """

    lr: Positive = 2e-5
    value_lr: Positive = 3e-3
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Positive = 1e-5
    weight_decay: NotNegative = 0.01
    clip_grad: Positive = 1.0
    schedule: Schedule = "constant"
    warmup_iterations: Annotated[int, Range(-1)] = 0
    warmup_ratio: Share = 0.0
    total_iterations: CountOrZero = 0
    min_lr: NotNegative = 0.0
    min_lr_rate: Share | None = None
    num_cycles: Positive = 0.5


def problems(cfg: OptimizerConfig) -> list[str]:
    """Return every reason why these values do not work together, [] if there is none."""
    found = []
    if "cosine" in cfg.schedule and cfg.total_iterations < 1:
        found.append(
            f"config.optim.total_iterations: {cfg.schedule!r} needs it to be at least 1, "
            f"got {cfg.total_iterations}; set it to train.iterations"
        )
    if cfg.min_lr > cfg.lr:
        found.append(f"config.optim.min_lr: expected at most lr ({cfg.lr}), got {cfg.min_lr}")
    return found


def learning_rate_factor(cfg: OptimizerConfig, iteration: Array) -> Float[Array, "..."]:
    """Return the factor by which both peak learning rates are multiplied (iterations from 0).

    Source: RLinf's scheduler kinds: transformers' constant and min-lr cosine schedules, openpi's
    cosine, torch's CosineAnnealingLR.
    """
    now = jnp.asarray(iteration, jnp.result_type(float))
    if cfg.schedule == "native_constant":
        return jnp.ones_like(now)
    total = cfg.total_iterations
    if cfg.schedule == "native_cosine":
        floor = NATIVE_COSINE_FLOOR / cfg.lr
        return floor + (1.0 - floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * now / total))
    warmup = cfg.warmup_iterations
    if warmup < 0:
        warmup = int(cfg.warmup_ratio * total)
    ramp = now / max(1, warmup)
    if cfg.schedule == "constant":
        return jnp.where(now < warmup, ramp, 1.0)
    floor = cfg.min_lr / cfg.lr if cfg.min_lr_rate is None else cfg.min_lr_rate
    progress = (now - warmup) / max(1, total - warmup)
    if cfg.schedule == "openpi_cosine":
        start = 1.0 / (warmup + 1)
        ramp = start + (1.0 - start) * ramp
        progress = jnp.clip(progress, 0.0, 1.0)
    wave = 0.5 * (1.0 + jnp.cos(2.0 * math.pi * cfg.num_cycles * progress))
    return jnp.where(now < warmup, ramp, floor + (1.0 - floor) * jnp.maximum(wave, 0.0))


def global_norm(tree: optax.Updates) -> Float[Array, ""]:
    """Return the L2 norm over all leaves of a tree of real arrays.

    `optax.tree.norm` also squares imaginary parts, which makes tracing slower.
    """
    return jnp.sqrt(optax.tree.sum(jax.tree.map(jnp.square, tree)))


def clip_by_global_norm(
    gradients: optax.Updates, max_norm: float
) -> tuple[optax.Updates, Float[Array, ""]]:
    """Return (gradients scaled down to `max_norm` when they exceed it, their norm before)."""
    norm = global_norm(gradients)
    scale = jnp.where(norm > max_norm, max_norm / norm, 1.0)
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients), norm


class OptimizerState(NamedTuple):
    """State of `make_optimizer`'s transformation.

    Attributes:
        adam: moments of every trainable parameter.
        start: iteration of the first step since `init`, where the schedule begins; -1 = none yet.
        lr: learning rate of the policy in the last step; 0 while only the value head trains.
        value_lr: learning rate of the value head in the last step.
        grad_norm: global norm of the last gradient before clipping.
    """

    adam: optax.OptState
    start: Array
    lr: Array
    value_lr: Array
    grad_norm: Array


def make_optimizer(
    cfg: OptimizerConfig, trainable: Callable[[str], bool] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Return the optimiser of a policy with an optional value head.

    Moments are float32 (or wider), whatever the dtype of the parameters.

    Args:
        trainable: whether the parameter at a path trains; None = all do. Frozen parameters have no
            moments and no decay, and do not count in the norm. (To save their gradients too, leave
            them out of the tree and close over them in `apply`.)

    Source: RLinf's AdamW groups. Differences: 1. "value_head" in the path selects the value group.
    """
    adam = optax.scale_by_adam(b1=cfg.betas[0], b2=cfg.betas[1], eps=cfg.eps)

    def kept(tree: optax.Params) -> optax.Params:
        """Trainable leaves in float32, the others replaced by None (an empty subtree)."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
                if trainable is None or trainable(path_name(path))
                else None
            ),
            tree,
        )

    def per_group(tree: optax.Params, policy: Array, value: Array) -> optax.Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * (value if VALUE_HEAD in path_name(path) else policy), tree
        )

    def init(params: optax.Params) -> OptimizerState:
        zero = jnp.zeros((), jnp.float32)
        return OptimizerState(adam.init(kept(params)), jnp.asarray(-1, jnp.int32), zero, zero, zero)

    def update(updates, state, params=None, *, iteration, only_value_head=False, **_):
        if params is None:
            raise ValueError("the optimiser needs params: weight decay acts on them")
        policy_on = jnp.where(only_value_head, 0.0, 1.0)
        gradients = per_group(kept(updates), policy_on, jnp.ones(()))
        gradients, norm = clip_by_global_norm(gradients, cfg.clip_grad)
        steps, adam_state = adam.update(gradients, state.adam)
        start = jnp.where(state.start < 0, jnp.asarray(iteration, jnp.int32), state.start)
        factor = learning_rate_factor(cfg, iteration - start)
        lr, value_lr = cfg.lr * factor * policy_on, cfg.value_lr * factor
        decayed = jax.tree.map(lambda s, p: s + cfg.weight_decay * p, steps, kept(params))
        steps = per_group(decayed, -lr, -value_lr)
        # Insert zeros for the parameters that `kept` left out.
        full = jax.tree.map(
            lambda step, leaf: jnp.zeros_like(leaf) if step is None else step,
            steps,
            updates,
            is_leaf=lambda leaf: leaf is None,
        )
        state = OptimizerState(
            adam_state,
            start,
            *(jnp.asarray(x, jnp.float32) for x in (lr, value_lr, norm)),
        )
        return full, state

    # `iteration` has no default on purpose: a caller that forgets it must fail.
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
