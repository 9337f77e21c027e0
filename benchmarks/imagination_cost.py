"""Counts what imagination at full size computes, moves and holds; nothing is computed.

    python -m benchmarks.imagination_cost [--envs 16] [--dtype bfloat16] [--steps 50] [--sizes full]

The real networks run on torch's meta device, stage by stage, for all environments of one simulator
at once. FLOPs are products and convolutions (torch's counter; a multiplication with its addition
is 2). Bytes are what every operation reads and writes, without any fusion but that of attention.
The peak is of tensors that live at once, without the weights (`tools.memory`). FLOPs per byte say
what bounds a stage: an H100 does 295 in the time of one byte of its memory (989 TFLOP/s in
bfloat16 and 3.35 TB/s by its data sheet). Drawing of maps, resizing and the pose model are left
out. The last line is

    weights_gb= chunk_tflop= chunk_tb= peak_gb=

of one chunk of all environments, 1e12 and 1e9.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.public_weights import SIZES
from evac_jax.evac.config import EvacConfig
from evac_jax.evac.model import EvacModel
from evac_jax.sim.reward import RewardConfig, RewardNet
from evac_jax.tools.command_line import KINDS
from evac_jax.tools.memory.simulator import peak_bytes, traffic_bytes


@dataclasses.dataclass(frozen=True)
class Cost:
    """One call of a stage.

    Attributes:
        calls: in a chunk; 0 for what an episode's start needs.
        flops, traffic, peak: operations, bytes moved, and bytes held at once.
    """

    calls: int
    flops: int
    traffic: int
    peak: int


def make_calls(
    config: EvacConfig, classifier: int, envs: int, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """Return {stage: a call of it} on the meta device."""
    with torch.device("meta"):
        model = EvacModel(config).eval().requires_grad_(False).to(dtype)
        judge = RewardNet(RewardConfig(width=classifier)).eval().requires_grad_(False)
    views, tower = envs * config.n_view, config.image_tower
    latent, (height, width) = config.autoencoder.latent_channels, config.latent_size
    tokens = config.image_tokens + config.unet.action_tokens

    def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=kind, device="meta")

    context = empty(views, tokens, config.unet.context_dim)
    with torch.no_grad():
        prepared = model.unet.prepare_context(context, config.n_view)
    volume = (config.frames, height, width)
    rest = empty(views, config.unet.in_channels - latent, *volume)
    noisy, times = empty(views, latent, *volume), empty(views, kind=torch.int64)
    side, frames = tower.image_size, envs * config.n_view * config.chunk

    def image_tokens() -> torch.Tensor:
        return model.image_proj_model(model.embedder.tokens(empty(views, 3, side, side)))

    return {
        "start: encoder": lambda: model.encode(empty(views, 3, *config.image_size)),
        "start: decoder": lambda: model.decode(empty(views, latent, height, width)),
        "start: image tokens": image_tokens,
        "encoder, maps": lambda: model.encode(empty(frames, 3, *config.image_size)),
        "action tokens": lambda: model.cond_stage_model(empty(envs, config.chunk, 14)),
        "keys and values": lambda: model.unet.prepare_context(context, config.n_view),
        "denoiser, a step": lambda: model.velocity(noisy, times, rest, prepared),
        "decoder": lambda: model.decode(empty(frames, latent, height, width)),
        "classifier": lambda: judge.probability(
            empty(envs * config.chunk, 3, *config.image_size, kind=torch.float32)
        ),
    }


def count(call: Callable[[], object], calls: int) -> Cost:
    """Return what a call costs."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return Cost(calls, counter.get_total_flops(), traffic_bytes(call), peak_bytes(call))


def costs(
    config: EvacConfig, classifier: int, envs: int, dtype: torch.dtype, steps: int
) -> dict[str, Cost]:
    """Return {stage: its cost}.

    Args:
        classifier: width of its first stage.
        envs: environments of one simulator.
        steps: denoising steps of a chunk.
    """
    # The second start frame, decoded and seen again, has tokens too.
    several = {"denoiser, a step": steps, "start: image tokens": 2}
    return {
        stage: count(call, several.get(stage, 1))
        for stage, call in make_calls(config, classifier, envs, dtype).items()
    }


def weight_bytes(config: EvacConfig, dtype: torch.dtype) -> int:
    """Return the bytes of the world model's weights."""
    with torch.device("meta"):
        return dtype.itemsize * sum(v.numel() for v in EvacModel(config).state_dict().values())


def table(found: dict[str, Cost]) -> str:
    """Return a line for each stage."""
    lines = [
        f"{'stage':22}{'calls':>6}{'TFLOP':>10}{'GB moved':>10}{'FLOP/byte':>11}{'peak GB':>9}"
    ]
    for stage, cost in found.items():
        lines.append(
            f"{stage:22}{cost.calls:6}{cost.flops / 1e12:10.3f}{cost.traffic / 1e9:10.2f}"
            f"{cost.flops / cost.traffic:11.0f}{cost.peak / 1e9:9.2f}"
        )
    return "\n".join(lines)


def last_line(found: dict[str, Cost], weights: int) -> str:
    """Return the line for programs."""
    chunk = {stage: cost for stage, cost in found.items() if not stage.startswith("start")}
    flops, traffic = (
        sum(cost.calls * getattr(cost, name) for cost in chunk.values())
        for name in ("flops", "traffic")
    )
    peak = max(cost.peak for cost in found.values())
    return (
        f"weights_gb={weights / 1e9:.2f} chunk_tflop={flops / 1e12:.1f} "
        f"chunk_tb={traffic / 1e12:.2f} peak_gb={peak / 1e9:.2f}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each stage; the last line is for programs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--envs", type=KINDS["count"], default=16)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--steps", type=KINDS["count"], default=50)
    parser.add_argument("--sizes", choices=SIZES, default="full")
    args = parser.parse_args(argv)
    sizes, dtype = SIZES[args.sizes], getattr(torch, args.dtype)
    found = costs(sizes.world_model, sizes.classifier, args.envs, dtype, args.steps)
    print(f"{args.envs} environments, {args.dtype}; a call is of all environments")
    print(table(found))
    print(last_line(found, weight_bytes(sizes.world_model, dtype)))


if __name__ == "__main__":
    main()
