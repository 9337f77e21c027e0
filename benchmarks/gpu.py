"""The full-size system on one NVIDIA GPU: its speed as a share of the GPU's matmul rate.

    python -m benchmarks.gpu [--parts matmul unet chunk policy exchange] [--compile] [--out FILE]

matmul    bfloat16 product of two 8192 x 8192 matrices by torch and by JAX; the faster one is "the
          rate" below
unet      EVAC's full-size denoiser, 16 environments, one step
chunk     a chunk of 16 environments after the first: maps, 50 denoising steps, decoding, classifier
policy    OpenVLA-OFT: a decision for 16 environments and one optimiser step; all weights of as many
          Llama layers as fit, and adapters of rank 32 on all 32 layers
exchange  64 frames of 256 x 256 (12.6 MB) from a real simulator process by CUDA IPC and DLPack

Weights are random and are made on the GPU in bfloat16. `benchmarks.flops` counts operations; what
the backward pass computes a second time does not count. Each part runs in a separate process, so
that none holds memory that another needs. Figures are medians after a warm-up. The benchmark is
designed to end within ten minutes. NOT run yet: no GPU was at hand (docs/performance.md).
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import flops, machine

ROOT = Path(__file__).parents[1]
PARTS = ("matmul", "unet", "chunk", "policy", "exchange")
PART_LIMIT_S = 240
ENVS, STEPS, MATMUL = 16, 50, 8192
MICRO_BATCH, MICRO_BATCHES = 16, 2
LAYERS_TRIED = (32, 24, 16, 12, 8, 4)
RANK = 32


def seconds(call: Callable[[], Any], repeats: int, wait: Callable[[Any], Any]) -> float:
    """Return the median time of a call, which `wait` completes, after one call to warm up."""
    wait(call())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        wait(call())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _wait_torch(device: str) -> Callable[[Any], None]:
    import torch

    return lambda _: torch.cuda.synchronize(device) if device.startswith("cuda") else None


# Parts. Sizes and device are arguments, so that tests can run them at small sizes on a CPU.


def matmul(device: str, size: int = MATMUL, repeats: int = 30) -> dict[str, float]:
    """Return the rates of a bfloat16 product by torch and by JAX, 1e12 operations/s."""
    import jax
    import jax.numpy as jnp
    import torch

    work = 2e-12 * size**3
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    told = {"torch_tflops": work / seconds(lambda: a @ b, repeats, _wait_torch(device))}
    key = jax.random.key(0, impl="rbg")
    x = jax.random.normal(key, (size, size), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    took = seconds(lambda: product(x, x), repeats, jax.block_until_ready)
    return told | {"jax_tflops": work / took}


def make_world_model(config, device: str):
    """Return an EVAC model with random weights, made on the device in bfloat16.

    No weight is zero, not even those whose initial value is zero in training. Products of zeros
    need little power, so the GPU would run faster than in real use.
    """
    import torch

    from evac_jax.evac.model import EvacModel

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = EvacModel(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif name.endswith("weight"):
                parameter.fill_(1.0)
    return model.eval().requires_grad_(False)


def unet(device: str, config, envs: int, repeats: int = 10, compiled: bool = False) -> dict:
    """Return time and rate of one denoising step."""
    import torch

    model = make_world_model(config, device)
    views, frames, (height, width) = config.n_view, config.frames, config.latent_size
    latent, dtype = config.autoencoder.latent_channels, torch.bfloat16

    def draw(*shape):
        return torch.randn(envs * views, *shape, device=device, dtype=dtype)

    x = draw(latent, frames, height, width)
    concat = draw(config.unet.in_channels - latent, frames, height, width)
    tokens = draw(config.image_tokens + config.unet.action_tokens, config.unet.context_dim)
    times = torch.full((envs * views,), 500, device=device)
    run = torch.compile(model.velocity) if compiled else model.velocity
    with torch.no_grad():
        context = model.unet.prepare_context(tokens, views)
        took = seconds(lambda: run(x, times, concat, context), repeats, _wait_torch(device))
    work = envs * flops.unet(config) / 1e12
    return {"step_s": took, "tflop": work, "tflops": work / took, "compiled": compiled}


def chunk(device: str, config, envs: int, steps: int, repeats: int = 1) -> dict:
    """Return the time of a chunk after the first one, classifier included."""
    import torch

    from evac_jax.evac.model import Camera
    from evac_jax.sim.reward import RewardConfig, RewardNet

    model = make_world_model(config, device)
    with torch.device(device):
        reward = RewardNet(RewardConfig()).eval().requires_grad_(False)
    views, (height, width) = config.n_view, config.image_size
    state = model.start(
        (torch.rand(envs, views, 3, height, width, device=device) * 2 - 1).bfloat16(),
        capacity_chunks=repeats + 2,
    )
    # One arm above the table that moves a little; the camera is half a metre above, looking down.
    poses = torch.zeros(envs, config.n_previous + config.chunk, 16, device=device)
    poses[..., :3] = torch.linspace(0, 0.05, poses.shape[1], device=device)[:, None]
    poses[..., 6], poses[..., 8:] = 1.0, poses[..., :8].clone()
    intrinsic = torch.tensor(
        [[width / 2, 0, width / 2], [0, height / 2, height / 2], [0, 0, 1.0]], device=device
    )
    c2w = torch.eye(4, device=device)
    c2w[2, 3] = 0.5
    camera = Camera(intrinsic.expand(1, views, 3, 3), c2w.expand(1, views, 4, 4))

    def play():
        nonlocal state
        state, frames = model.imagine(state, poses, camera, steps=steps, eta=1.0)
        judged = frames[:, 0].flatten(0, 1).float()
        return torch.cat([reward.probability(part) for part in judged.split(256)])

    with torch.no_grad():
        play()  # the first chunk; `seconds` warms up with the second one
        took = seconds(play, repeats, _wait_torch(device))
    work = envs * flops.chunk(config, steps) / 1e12
    return {"chunk_s": took, "tflop": work, "tflops": work / took}


def make_policy(sizes):
    """Return (graphdef, trained parameters, the rest) of a policy made on the device."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from policies.openvla_oft.import_hf import abstract_model

    keys = iter(jax.random.split(jax.random.key(0, impl="rbg"), 1000))

    def draw(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        width = leaf.shape[-2] if leaf.ndim > 1 else 1
        make = jax.jit(
            lambda key: jax.random.normal(key, leaf.shape, leaf.dtype) * float(width) ** -0.5
        )
        return make(next(keys))

    graphdef, params, rest = nnx.split(abstract_model(sizes), nnx.Param, ...)
    return graphdef, jax.tree.map(draw, params), jax.tree.map(draw, rest)


def policy(sizes, envs: int, micro_batch: int, frame: int, repeats: int = 3) -> dict:
    """Return time and rate of a decision and of one optimiser step of GRPO."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from algos import grpo
    from algos.optim import OptimizerConfig, make_optimizer
    from algos.types import RolloutBatch
    from algos.update import init_state
    from policies.types import ObsBatch

    graphdef, params, rest = make_policy(sizes)
    key, samples = jax.random.key(0), micro_batch * MICRO_BATCHES
    length, tokens = sizes.max_prompt_length, (sizes.chunk, sizes.action_dim)

    def frames(count):
        shape = (count, sizes.num_images, frame, frame, 3)
        return jax.random.randint(key, shape, 0, 256).astype(jnp.uint8)

    def prompts(count):
        tokens = jnp.ones((count, length), jnp.int32)
        return {"prompt_tokens": tokens, "prompt_mask": tokens.astype(bool)}

    obs = ObsBatch(images=frames(envs), **prompts(envs))
    sample = jax.jit(lambda p, r, o, k: nnx.merge(graphdef, p, r).sample(o, k, temperature=1.6))

    def evaluate(rest, params, obs, tokens):
        return nnx.merge(graphdef, params, rest).evaluate(obs, tokens, temperature=1.6)

    optimizer = make_optimizer(OptimizerConfig())
    config = grpo.Config(group_size=2, global_batch=samples, micro_batch=micro_batch)
    rewards = jnp.zeros((samples, 1, sizes.chunk)).at[::2, :, -1].set(1.0)
    batch = RolloutBatch(
        images=frames(samples)[:, None],
        **prompts(samples),
        tokens=jnp.full((samples, 1, *tokens), sizes.first_action_token),
        log_probs=jnp.full((samples, 1, *tokens), -5.5),
        values=None,
        rewards=rewards,
        terminated=rewards > 0,
        truncated=jnp.zeros(rewards.shape, bool),
    )

    def update(state, rest, batch, key):
        step = grpo.make_update(lambda *a: evaluate(rest, *a), optimizer, config)
        return step(state, batch, key)

    state = jax.jit(lambda p: init_state(p, optimizer), donate_argnums=0)(params)
    decided = seconds(lambda: sample(state.params, rest, obs, key), repeats, jax.block_until_ready)
    jitted = jax.jit(update, donate_argnums=0)

    def learn():
        nonlocal state
        state, metrics = jitted(state, rest, batch, key)
        return metrics

    learned = seconds(learn, repeats, jax.block_until_ready)
    forward = flops.forward(sizes) / 1e12
    # Frozen weights need no gradient, so the backward pass costs one forward pass less.
    passes = 2 if sizes.lora_rank else 3
    told = {"layers": sizes.num_layers, "lora_rank": sizes.lora_rank}
    told |= {"sample_s": decided, "sample_tflops": envs * forward / decided}
    return told | {"update_s": learned, "update_tflops": passes * samples * forward / learned}


def exchange(device: str, num_envs: int = 64, size: int = 256, repeats: int = 100) -> dict:
    """Return milliseconds per exchange of frames that stay on the device."""
    from benchmarks.bridge import time_bridge

    times = time_bridge(num_envs, size, repeats, device)
    return {"exchange_ms": statistics.median(times), "fastest_ms": min(times)}


def _full_policy(part: str):
    from policies.openvla_oft.config import OpenVLAOFTConfig

    kind, _, number = part.partition(":")
    shared: dict[str, Any] = {"param_dtype": "bfloat16", "compute_dtype": "bfloat16"}
    shared |= {"remat": "full"}
    if kind == "policy-lora":
        return OpenVLAOFTConfig(lora_rank=RANK, **shared)
    return OpenVLAOFTConfig(num_layers=int(number), **shared)


def measure(part: str, compiled: bool) -> dict[str, Any]:
    """Measure one part in this process, at full size."""
    from evac_jax.evac.config import EvacConfig

    device = "cuda:0"
    if part == "matmul":
        return matmul(device)
    if part == "unet":
        return unet(device, EvacConfig(), ENVS, compiled=compiled)
    if part == "chunk":
        return chunk(device, EvacConfig(), ENVS, STEPS)
    if part == "exchange":
        return exchange(device)
    return policy(_full_policy(part), ENVS, MICRO_BATCH, 256)


def run_child(part: str, compiled: bool, environment: dict[str, str]) -> dict[str, Any] | None:
    """Measure one part in a separate process; None if it failed or took too long."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        command = [sys.executable, "-m", "benchmarks.gpu", "--here", part, "--out", str(out)]
        command += ["--compile"] * compiled
        # torch and JAX share the GPU, so neither may reserve memory that it does not need.
        settings = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        try:
            subprocess.run(
                command, cwd=ROOT, env=environment | settings, check=True, timeout=PART_LIMIT_S
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            print(f"{part}: {error}", file=sys.stderr, flush=True)
            return None
        return json.loads(out.read_text())


def largest_policy(memory_bytes: float) -> int:
    """Return the most Llama layers whose full fine-tuning should fit, 0 if none does."""
    from evac_jax.config.build import default_config
    from evac_jax.memory import trainer
    from evac_jax.memory.parts import peak
    from evac_jax.shapes import EpisodeShapes

    config = default_config("grpo")
    samples = MICRO_BATCH * MICRO_BATCHES
    config = dataclasses.replace(
        config,
        algo=dataclasses.replace(config.algo, global_batch=samples, micro_batch=MICRO_BATCH),
        env=dataclasses.replace(config.env, num_envs=samples),
    )
    episode = EpisodeShapes((1, 256, 256, 3), 8, 8)
    for layers in LAYERS_TRIED:
        parts = trainer.trainer_parts(config, _full_policy(f"policy:{layers}"), episode, 1, "cuda")
        if peak(parts)[0] < 0.85 * memory_bytes:
            return layers
    return 0


def check_gpu() -> tuple[str, float]:
    """Return the GPU's name and memory.

    Raises:
        SystemExit: there is no CUDA device, or one of the two libraries was built without CUDA.
    """
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(
            f"benchmarks.gpu needs an NVIDIA GPU: torch {torch.__version__} sees none here"
        )
    code = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if (backend := done.stdout.strip()) != "gpu":
        raise SystemExit(
            f"benchmarks.gpu needs JAX with CUDA: its backend here is {backend or 'none'!r}; "
            "install jax[cuda12] of the version in requirements.txt"
        )
    facts = torch.cuda.get_device_properties(0)
    return facts.name, facts.total_memory


def summary(told: dict[str, dict | None]) -> dict[str, float]:
    """Return the figures of the last line, without those of missing parts."""
    parts = {name: part or {} for name, part in told.items()}
    rate = max(parts.get("matmul", {}).values(), default=0.0)
    found = {}
    for name, part, figure in (
        ("unet_mfu", "unet", "tflops"),
        ("update_mfu", "policy", "update_tflops"),
    ):
        if rate and (reached := parts.get(part, {}).get(figure)):
            found[name] = reached / rate
    for name, part in (("chunk_s", "chunk"), ("exchange_ms", "exchange")):
        if name in parts.get(part, {}):
            found[name] = parts[part][name]
    return found


def main() -> None:
    """Print the result of each part; the last line is for programs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--compile", action="store_true", help="the denoiser by torch.compile")
    parser.add_argument("--out", type=Path, help="also write the numbers to this file, JSON")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        args.out.write_text(json.dumps(measure(args.here, args.compile)))
        return
    name, memory = check_gpu()
    theirs = dict(os.environ)
    os.environ["JAX_PLATFORMS"] = "cpu"  # this process leaves the GPU to its children
    facts = machine.describe() | {"gpu": name, "gpu_gb": memory / 1e9}
    facts["date"] = datetime.now(UTC).date().isoformat()
    machine.show(facts)
    print(f"GPU: {name}, {memory / 1e9:.0f} GB; {facts['date']}")
    told: dict[str, dict | None] = {}
    for part in args.parts:
        if part == "policy":
            told["policy-lora"] = run_child("policy-lora", args.compile, theirs)
            print(f"policy-lora: {json.dumps(told['policy-lora'])}", flush=True)
            layers = largest_policy(memory)
            told[part] = run_child(f"policy:{layers}", args.compile, theirs) if layers else None
        else:
            told[part] = run_child(part, args.compile, theirs)
        print(f"{part}: {json.dumps(told[part])}", flush=True)
    if args.out:
        args.out.write_text(json.dumps({"machine": facts} | told, indent=2) + "\n")
    print(" ".join(f"{name}={value:.3f}" for name, value in summary(told).items()))
    if any(part is None for part in told.values()):
        raise SystemExit("some parts failed: see above")


if __name__ == "__main__":
    main()
