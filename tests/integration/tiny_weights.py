"""Random weights at the smallest sizes that work; tests get them from the fixture `weights`.

For tests of the machinery, where it does not matter what is imagined. EVAC's outputs begin at zero,
so all frames are alike and all episodes end alike: GRPO learns from its entropy bonus alone.
"""

import dataclasses
from pathlib import Path

from evac_jax.evac.config import AutoencoderConfig
from evac_jax.evac.model import EvacModel
from evac_jax.evac.model_folders import save_model
from evac_jax.files import cards
from evac_jax.miniature.sizes import POLICY, WORLD_MODEL
from evac_jax.miniature.tasks import INSTRUCTIONS
from evac_jax.sim.pose_model import PoseModel, PoseModelConfig
from evac_jax.sim.reward import RewardConfig, RewardNet

# The towers stay wide, so that some of their arrays are worth cutting over devices.
SMALL_POLICY = dataclasses.replace(
    POLICY,
    dinov2=dataclasses.replace(POLICY.dinov2, depth=2),
    siglip=dataclasses.replace(POLICY.siglip, depth=2),
    num_layers=1,
    hidden_size=32,
    intermediate_size=32,
)


def write(folder: Path) -> None:
    """Write world_model/, reward/, pose_model/ and policy/ into `folder`."""
    import torch

    torch.manual_seed(0)
    small = WORLD_MODEL.replace(
        autoencoder=AutoencoderConfig(
            channels=8, channel_mult=(1, 1, 1, 1), num_res_blocks=1, norm_groups=4
        ),
        unet=WORLD_MODEL.unet.replace(channel_mult=(1, 1)),
    )
    save_model(folder / "world_model", EvacModel(small))
    classifier = RewardNet(RewardConfig(width=4, num_instructions=len(INSTRUCTIONS)))
    save_model(folder / "reward", classifier)
    cards.write_json(folder / "reward" / "card.json", {"instructions": INSTRUCTIONS})
    save_model(folder / "pose_model", PoseModel(PoseModelConfig(hidden=8)))
    write_policy(folder / "policy")


def write_policy(folder: Path) -> None:
    """Write a policy folder."""
    from flax import nnx

    from evac_jax.tools.policy.train import NORM_STATS
    from policies.openvla_oft.export_hf import create_policy_folder
    from policies.openvla_oft.model import OpenVLAOFT

    model = OpenVLAOFT(SMALL_POLICY, rngs=nnx.Rngs(0))
    create_policy_folder(model, folder, tasks=INSTRUCTIONS, norm_stats=NORM_STATS)
