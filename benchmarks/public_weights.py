"""Writes random weights in the layouts of the published files, one tensor at a time.

    python -m benchmarks.public_weights --kind policy --sizes full --out DIR  # OpenVLA-OFT, 15 GB
    python -m benchmarks.public_weights --kind evac --sizes full --out DIR    # EVAC, 5 GB

`policy` is a Hugging Face folder in bfloat16: config.json with nothing but what published ones
hold, three shards and their index, statistics, and a tokenizer of Llama-2's kind. `evac` holds
evac.ckpt (Lightning's container, bfloat16, with the image tower and the tensors that nothing here
reads), resnet_rm.pth, action_predictor.pth, and starts/, RLinf's `.npy` episodes with scenes of the
miniature. `--sizes tiny` has the same layouts for tests of what reads them.

Matrices and kernels are N(0, 1 / inputs), norms and scales 1, all else 0, so that no network's
numbers grow or vanish. What a key gets depends on the seed and the key alone.
"""

import argparse
import dataclasses
import json
import math
import mmap
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evac_jax.evac.config import AutoencoderConfig, EvacConfig
from evac_jax.files.atomic import whole_folder
from evac_jax.miniature import sizes as miniature
from evac_jax.miniature.tasks import INSTRUCTIONS
from policies.openvla_oft.config import OpenVLAOFTConfig

SHARDS = 3
STARTS = 4  # start frames
UNNORM_KEY = "random"
BOUNDS = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
NORM_STATS = {UNNORM_KEY: {"action": BOUNDS}}
ONES = ("weight", "scale_factor", "running_var")  # ends of names of vectors that are scales
# Fields of text_config that published files hold although they are the defaults.
ALWAYS_TOLD = ("model_type", "pad_token_id", "torch_dtype", "vocab_size")
# What an EVAC file holds and no computation reads: CLIP's text side, and the noise schedule.
TEXT_POSITIONS, TEXT_TOKENS = 77, 49408
SCHEDULE = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"),
    *("sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod"),
    *("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance"),
    *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
)
SCALE_STEPS = 1400  # entries of scale_arr


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of everything that is written.

    Attributes:
        policy, world_model: see their classes.
        classifier, pose_model: width of the first stage, and of the hidden layers.
    """

    policy: OpenVLAOFTConfig
    world_model: EvacConfig
    classifier: int = 64
    pose_model: int = 64


SIZES = {
    "full": Sizes(OpenVLAOFTConfig(param_dtype="bfloat16"), EvacConfig()),
    "tiny": Sizes(
        dataclasses.replace(
            miniature.POLICY,
            dinov2=dataclasses.replace(miniature.POLICY.dinov2, depth=2),
            siglip=dataclasses.replace(miniature.POLICY.siglip, depth=2),
            num_layers=2,
            hidden_size=32,
            intermediate_size=32,
            param_dtype="bfloat16",
        ),
        miniature.WORLD_MODEL.replace(
            autoencoder=AutoencoderConfig(
                channels=8, channel_mult=(1, 1, 1, 1), num_res_blocks=1, norm_groups=4
            ),
            unet=miniature.WORLD_MODEL.unet.replace(channel_mult=(1, 1)),
        ),
        classifier=4,
        pose_model=8,
    ),
}


def spread(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return mean and standard deviation of a tensor's entries."""
    if len(shape) < 2:
        return float(key.endswith(ONES)), 0.0
    return 0.0, math.sqrt(shape[0] / math.prod(shape))


# The policy.


def policy_shapes(config: OpenVLAOFTConfig) -> dict[str, tuple[int, ...]]:
    """Return {key: shape} of a published checkpoint of these sizes, without a value head."""
    from policies.openvla_oft import hf_keys
    from policies.openvla_oft.import_hf import abstract_model

    shapes = {}
    for path, variable in hf_keys.parameters(abstract_model(config)):
        source = hf_keys.source_of(path, config)
        shapes |= dict.fromkeys(source.keys, source.hf_shape(variable.shape))
    return shapes


def policy_config(config: OpenVLAOFTConfig) -> dict[str, Any]:
    """Return config.json as published: without the fields that are the library's defaults."""
    usual = OpenVLAOFTConfig().to_hf()
    told = config.to_hf()
    if told["tiny_vision_overrides"] == usual["tiny_vision_overrides"]:
        del told["tiny_vision_overrides"]
    told["text_config"] = {
        name: value
        for name, value in told["text_config"].items()
        if name in ALWAYS_TOLD or value != usual["text_config"][name]
    }
    return told


def write_policy(folder: Path, config: OpenVLAOFTConfig, seed: int = 0) -> dict[str, int]:
    """Write the new folder of a policy; return its numbers of parameters, tensors and shards."""
    import jax.numpy as jnp

    from policies.openvla_oft.checkpoint_files import INDEX, Entry, write_tensors
    from policies.openvla_oft.export_hf import make_tokenizer

    shapes = policy_shapes(config)
    total, done, weight_map = sum(map(math.prod, shapes.values())), 0, {}
    for key, shape in shapes.items():
        number = done * SHARDS // total + 1
        weight_map[key] = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        done += math.prod(shape)

    def draw(key: str) -> np.ndarray:
        mean, deviation = spread(key, shapes[key])
        if not deviation:
            return np.full(shapes[key], mean, np.float32)
        random = np.random.default_rng((seed, zlib.crc32(key.encode())))
        numbers = random.standard_normal(shapes[key], np.float32)
        return np.multiply(numbers, deviation, out=numbers).astype(jnp.bfloat16)

    files = {
        "config.json": policy_config(config),
        "preprocessor_config.json": config.preprocessor_to_hf(),
        "dataset_statistics.json": NORM_STATS,
        INDEX: {"metadata": {"total_size": 2 * total}, "weight_map": weight_map},
    }
    with whole_folder(folder) as partial:
        partial.mkdir()
        for name, values in files.items():
            (partial / name).write_text(json.dumps(values, indent=2) + "\n")
        make_tokenizer(INSTRUCTIONS, config).save(str(partial / "tokenizer.json"))
        for name in sorted(set(weight_map.values())):
            held = {
                k: Entry(name, "BF16", shapes[k]) for k, file in weight_map.items() if file == name
            }
            write_tensors(partial / name, held, draw)
    return {
        "parameters": total,
        "tensors": len(shapes),
        "shards": len(set(weight_map.values())),
    }


# The world model, and what judges and moves in it.


def evac_shapes(config: EvacConfig) -> dict[str, tuple[int, ...]]:
    """Return {key: shape} of a published checkpoint of these sizes."""
    import torch

    from evac_jax.evac.model import EvacModel

    with torch.device("meta"):
        held = {k: tuple(v.shape) for k, v in EvacModel(config).state_dict().items()}
    width, clip = config.image_tower.embed_dim, "embedder.model."
    text = {
        "positional_embedding": (TEXT_POSITIONS, width),
        "text_projection": (width, width),
        "logit_scale": (),
        "token_embedding.weight": (TEXT_TOKENS, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
    }
    schedule = dict.fromkeys(SCHEDULE, (config.num_timesteps,)) | {"scale_arr": (SCALE_STEPS,)}
    return held | {clip + key: shape for key, shape in text.items()} | schedule


def write_evac(folder: Path, sizes: Sizes, seed: int = 0) -> dict[str, int]:
    """Write evac.ckpt and all that goes with it; return its numbers of parameters and tensors."""
    import torch

    from evac_jax.sim.pose_model import PoseModel, PoseModelConfig
    from evac_jax.sim.reward import RewardConfig, RewardNet

    config, shapes = sizes.world_model, evac_shapes(sizes.world_model)
    with whole_folder(folder) as partial:
        partial.mkdir()
        (partial / "sizes.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        empty = {key: torch.empty(shape, dtype=torch.bfloat16) for key, shape in shapes.items()}
        path = partial / "evac.ckpt"
        # The file gets its length; its pages are written below, and memory need not hold them.
        with torch.serialization.skip_data():
            torch.save({"state_dict": empty, "global_step": 0}, path)
        del empty
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            content = torch.load(path, mmap=True, weights_only=True)
        _fill(content["state_dict"], seed)
        del content
        poses = _write_starts(partial / "starts", config.image_size)
        classifier = RewardNet(RewardConfig(width=sizes.classifier)).state_dict()
        torch.save(_fill(classifier, seed), partial / "resnet_rm.pth")
        network = _fill(PoseModel(PoseModelConfig(hidden=sizes.pose_model)).state_dict(), seed)
        statistics = {
            "abs_action_mean": torch.from_numpy(poses.mean(0, keepdims=True)),
            "abs_action_std": torch.from_numpy(poses.std(0, keepdims=True)).clamp(min=0.02),
        }
        network = {key: value for key, value in network.items() if key not in statistics}
        action_predictor = {"model_state_dict": network, **statistics}
        torch.save(action_predictor, partial / "action_predictor.pth")
    return {"parameters": sum(map(math.prod, shapes.values())), "tensors": len(shapes)}


def _fill(state: Mapping[str, Any], seed: int) -> Mapping[str, Any]:
    """Draw the entries of tensors in place; return them."""
    import torch

    for key, value in state.items():
        mean, deviation = spread(key, tuple(value.shape))
        if deviation and value.is_floating_point():
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()) + (seed << 32))
            value.normal_(mean, deviation, generator=generator)
        else:
            value.fill_(mean)
    return state


def _write_starts(folder: Path, size: tuple[int, int]) -> np.ndarray:
    """Write scenes of the miniature as RLinf's episodes; return their poses [N 8]."""
    from evac_jax.miniature.starts import MiniatureStarts

    folder.mkdir()
    starts = MiniatureStarts(image_size=size[0]).load(np.arange(STARTS))
    for number, (image, pose, task) in enumerate(
        zip(starts.images, starts.poses, starts.task, strict=True)
    ):
        frame = {
            "image": image[0],
            "init_ee_pose": pose,
            "delta_action": np.zeros(7, np.float32),
            "instruction": INSTRUCTIONS[task],
        }
        episode = np.empty(1, object)
        episode[0] = frame
        np.save(folder / f"episode_{number}.npy", episode, allow_pickle=True)
    return starts.poses


def main() -> None:
    """Write what the command line asks for; the last line is for programs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=("policy", "evac"), required=True)
    parser.add_argument("--sizes", choices=SIZES, default="full")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out: {args.out} exists; choose another folder or remove it")
    sizes = SIZES[args.sizes]
    told = (
        write_policy(args.out, sizes.policy)
        if args.kind == "policy"
        else write_evac(args.out, sizes)
    )
    print(" ".join(f"{name}={value}" for name, value in told.items()))


if __name__ == "__main__":
    main()
