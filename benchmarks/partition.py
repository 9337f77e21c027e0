"""Compares what the compiled full-size update sends between devices with the formulae.

    python -m benchmarks.partition [--meshes 1x8 2x4] [--free] [--layers 32] [--out FILE]

Nothing is allocated and nothing runs. The real update of the 7B policy is compiled for virtual CPU
devices from shapes alone, and the collectives of the program are added up. They are compared with
the bytes of FSDP by `cost_model.fsdp_bytes`. --free compiles the same update without fixing the
sharding of activations (`policies/activations.py`). Everything is float32 here, because a CPU
computes bfloat16 in float32. A CPU has no reduce-scatter, so a sum over devices is an all-reduce.
Each mesh takes half a minute of CPU time and about 2 GB.
"""

import argparse
import dataclasses
import importlib
import json
import os
import re
from pathlib import Path
from typing import Any

from benchmarks.collectives import collectives
from benchmarks.cost_model import Work, fsdp_bytes

MICRO_BATCH, MICRO_BATCHES, EPISODES, CHUNKS = 32, 2, 16, 4


def mesh_of(text: str) -> tuple[int, int]:
    """Return (data, fsdp) of a name such as 2x4."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected DATAxFSDP such as 2x4, got {text!r}")
    return int(match[1]), int(match[2])


def compile_update(
    sizes, mesh, *, free: bool = False, frame: int, options: dict[str, Any] | None = None
):
    """Return the compiled update of GRPO and the parameters' shapes with their shardings.

    Args:
        sizes: the policy, an `OpenVLAOFTConfig`.
        mesh: devices, data x fsdp.
        free: do not fix the sharding of activations.
        frame: pixels per side of the episodes' frames.
        options: for XLA.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from algos import ALGORITHMS
    from algos.optim import OptimizerConfig, make_optimizer
    from algos.update import init_state
    from evac_jax.config.build import algorithm_config
    from evac_jax.devices import sharding
    from policies.activations import activations_at
    from policies.openvla_oft.import_hf import abstract_model

    optimizer, on_batch = make_optimizer(OptimizerConfig()), sharding.batch_sharding(mesh)
    graphdef, params, rest = nnx.split(abstract_model(sizes), nnx.Param, ...)
    config = dataclasses.replace(
        algorithm_config("grpo")(),
        global_batch=MICRO_BATCH * MICRO_BATCHES,
        micro_batch=MICRO_BATCH,
    )

    def placed(tree):
        places = sharding.tree_shardings(mesh, tree)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places
        )

    def update(state, rest, batch, key):
        def evaluate(params, obs, tokens):
            with activations_at(None if free else on_batch):
                return nnx.merge(graphdef, params, rest).evaluate(obs, tokens)

        step = importlib.import_module(ALGORITHMS["grpo"]).make_update(
            evaluate,
            optimizer,
            config,
            constrain=lambda tree: jax.lax.with_sharding_constraint(tree, on_batch),
        )
        return step(state, batch, key)

    state = placed(jax.eval_shape(lambda p: init_state(p, optimizer), params))
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(update, donate_argnums=0, out_shardings=(places, sharding.replicated(mesh)))
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_batch),
        _batch(sizes, frame, jnp),
    )
    lowered = jitted.lower(state, placed(rest), batch, key)
    return lowered.compile(compiler_options=options), state.params


def cut_entries(params, pattern: str = "") -> int:
    """Return how many entries of parameters are sharded; only paths that match `pattern` count."""
    import jax

    from algos.types import path_name

    return sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if re.search(pattern, path_name(path)) and not leaf.sharding.is_fully_replicated
    )


def _batch(sizes, frame: int, jnp):
    import jax

    from algos.types import RolloutBatch

    def shape(*after, dtype):
        return jax.ShapeDtypeStruct((EPISODES, *after), dtype)

    tokens = (CHUNKS, sizes.chunk, sizes.action_dim)
    return RolloutBatch(
        images=shape(CHUNKS, sizes.num_images, frame, frame, 3, dtype=jnp.uint8),
        prompt_tokens=shape(sizes.max_prompt_length, dtype=jnp.int32),
        prompt_mask=shape(sizes.max_prompt_length, dtype=jnp.bool_),
        tokens=shape(*tokens, dtype=jnp.int32),
        log_probs=shape(*tokens, dtype=jnp.float32),
        values=None,
        rewards=shape(*tokens[:2], dtype=jnp.float32),
        terminated=shape(*tokens[:2], dtype=jnp.bool_),
        truncated=shape(*tokens[:2], dtype=jnp.bool_),
    )


def account(program, cut: int, mesh: tuple[int, int]) -> dict[str, Any]:
    """Return what a compiled update sends and what the formulae say, in bytes of the results."""
    sent = collectives(program.as_text())
    work = Work(weight_bytes=4, gradient_bytes=4)
    law = fsdp_bytes(cut, work, fsdp=mesh[1], data=mesh[0])
    return {
        "mesh": f"{mesh[0]}x{mesh[1]}",
        "sent": sent,
        "law": {
            "all-gather": MICRO_BATCHES * law["gather"],
            "all-reduce": MICRO_BATCHES * (law["scatter"] + law["reduce"]),
        },
    }


def main() -> None:
    """Print one row per mesh; the last line is for programs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--meshes", type=mesh_of, nargs="+", default=[(1, 8), (2, 4)])
    parser.add_argument("--free", action="store_true", help="let XLA choose where activations lie")
    parser.add_argument("--layers", type=int, default=32, help="of the Llama")
    parser.add_argument("--out", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    count = max(data * fsdp for data, fsdp in args.meshes)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
    import jax

    from evac_jax.devices import sharding
    from policies.openvla_oft.config import OpenVLAOFTConfig

    sizes = OpenVLAOFTConfig(num_layers=args.layers, remat="full")
    print(f"{'mesh':6}{'collective':20}{'count':>7}{'GB sent':>10}{'GB by law':>11}{'ratio':>7}")
    rows = []
    for data, fsdp in args.meshes:
        mesh = sharding.make_mesh(data, fsdp, jax.devices()[: data * fsdp])
        # Only the partitioned program is read, so its machine code need not be optimised.
        options = {"xla_backend_optimization_level": 0}
        program, params = compile_update(sizes, mesh, free=args.free, frame=256, options=options)
        rows.append(account(program, cut_entries(params), (data, fsdp)))
        for kind, found in sorted(rows[-1]["sent"].items()):
            law = rows[-1]["law"].get(kind, 0)
            compared = f"{law / 1e9:11.1f}{found['bytes'] / law:7.3f}" if law else f"{'-':>11}"
            print(
                f"{data}x{fsdp:<4}{kind:20}{found['count']:7}{found['bytes'] / 1e9:10.1f}{compared}"
            )
    if args.out:
        args.out.write_text(json.dumps({"free": args.free, "rows": rows}, indent=2) + "\n")
    sent = sum(found["bytes"] for row in rows for found in row["sent"].values())
    law = sum(sum(row["law"].values()) for row in rows)
    print(f"sent_gb={sent / 1e9:.1f} law_gb={law / 1e9:.1f} ratio={sent / law:.3f}")


if __name__ == "__main__":
    main()
