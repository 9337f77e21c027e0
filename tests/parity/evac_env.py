"""Golden vectors of the reference environment: reset and chunk steps, defects included.

The main vectors have the conditioning-image defect repaired; `asis.*` are the unrepaired latents.
Network weights and start noise come from the folder's other files.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from evac_jax.sim.actions import both_arms
from evac_jax.sim.env import WorldModelEnv
from evac_jax.sim.env_config import WorldModelEnvConfig
from evac_jax.sim.initial_states import Starts
from evac_jax.sim.pose_model import PoseModel, PoseModelConfig
from evac_jax.sim.reward import RewardConfig, RewardEnsemble, RewardNet
from tests.parity.evac_model import tiny_model
from tests.parity.report import VectorResult, compare

FILE = "env.safetensors"
INPUTS = re.compile(
    r"init_images_u8|init_ee_pose|intrinsic|c2w|order_first_is|(rew|ap)_sd\..*|chunk\d+\.policy_action"
)


def claims(name: str) -> bool:
    """Whether a file of the manifest belongs to this module."""
    return name == FILE


def vectors(folder: Path, manifest: dict) -> set[str]:
    """Names of the golden outputs this module must match."""
    if FILE not in manifest["files"]:
        return set()
    return {f"env/{key}" for key in load_file(folder / FILE) if not INPUTS.fullmatch(key)}


class GoldenStarts:
    """The folder's start frames in the order in which the reference drew them."""

    def __init__(self, golden: dict[str, Tensor]):
        images, poses = golden["init_images_u8"], golden["init_ee_pose"]
        drawn = golden["reset_obs_state"][:, : poses.shape[1]]
        order = (drawn[:, None] - poses).abs().sum(-1).argmin(1)
        self._images = (images if images.dim() == 5 else images[:, None])[order].numpy()
        self._poses = poses[order].numpy()
        self.num_starts, self.instructions, self.camera = len(order), ("unknown",), None
        self.camera_size = None

    def load(self, ids):
        return Starts(self._images[ids], self._poses[ids], np.zeros(len(ids), np.int32))


class GoldenNoise:
    """Start noise of each chunk as stored with the rollout vectors."""

    def __init__(self, folder: Path):
        self._chunks, self._chunk = {}, 0
        for file in sorted(folder.glob("rollout*.safetensors")):
            for key, value in load_file(file).items():
                if match := re.fullmatch(r"chunk(\d+)\.noise", key):
                    self._chunks[int(match[1])] = value

    def __call__(self, draw: int, shape: tuple[int, ...]) -> Tensor:
        if draw:
            raise ValueError("the golden rollouts are deterministic after their start noise")
        return self._chunks[self._chunk].reshape(shape)

    def next_chunk(self) -> None:
        self._chunk += 1


def _sub_state(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}


def _chunks(golden: dict[str, Tensor], pattern: str) -> list[int]:
    return sorted(int(m[1]) for key in golden if (m := re.fullmatch(pattern, key)))


class Recorded:
    """An environment on the folder's weights, and what its networks were asked and answered."""

    def __init__(self, folder: Path, manifest: dict, golden: dict[str, Tensor], *, as_is: bool):
        entry, rollout = manifest["files"][FILE], manifest["files"]["rollout.safetensors"]
        model = tiny_model(folder, manifest)
        rewards = torch.stack(
            [golden[f"chunk{i}.reward"] for i in _chunks(golden, r"chunk(\d+)\.reward")]
        )
        ended = [
            i + 1
            for i in _chunks(golden, r"chunk(\d+)\.truncations")
            if golden[f"chunk{i}.truncations"].any()
        ]
        coef = re.search(r"reward_coef[ =]*([\d.]*\d)", entry["what"])
        reward_state = _sub_state(golden, "rew_sd.")
        reward = RewardNet(RewardConfig(width=reward_state["net.0.0.weight"].shape[0]))
        reward.load_state_dict(reward_state)
        pose_state = _sub_state(golden, "ap_sd.")
        pose = PoseModel(PoseModelConfig(hidden=pose_state["network.0.weight"].shape[0]))
        pose.load_state_dict(pose_state)
        source = GoldenStarts(golden)
        self.env = WorldModelEnv(
            model,
            RewardEnsemble([reward.eval()]),
            pose.eval(),
            source,
            WorldModelEnvConfig(
                num_envs=source.num_starts,
                steps=rollout["ddim_steps"],
                eta=rollout["eta"],
                max_episode_steps=(ended[0] if ended else len(rewards) + 1) * model.config.chunk,
                coefficient=float(coef[1]) if coef else float(rewards.abs().max()),
                relative="relative reward" in entry["what"] or bool((rewards < 0).any()),
                gripper="none",
                camera={name: golden[name].numpy() for name in ("intrinsic", "c2w")},
                reference_compat=True,
                shared_conditioning_image=as_is,
            ),
        )
        self.noise = GoldenNoise(folder)
        self.frames = torch.zeros(source.num_starts, *self.env.spec.image_shape, dtype=torch.uint8)
        self.clip = self.frames[:0, None].expand(-1, model.config.chunk, -1, -1, -1, -1)
        denoise, probability = model.denoise, reward.probability

        def recording_denoise(conditioning, *args, **kwargs):
            self.conditioning = conditioning
            self.latents = denoise(conditioning, *args, **kwargs)
            return self.latents

        def recording_probability(*args, **kwargs):
            self.probability = probability(*args, **kwargs)
            return self.probability

        model.denoise, reward.probability = recording_denoise, recording_probability

    def reset(self):
        result = self.env.reset(np.arange(len(self.frames)), 0, self.frames, self.clip)
        self.env.noise = self.noise
        return result

    def step(self, actions: Tensor):
        return self.env.step(actions.numpy(), self.frames, self.clip)

    def observed(self, prefix: str) -> dict[str, Tensor]:
        image = self.frames if self.frames.shape[1] > 1 else self.frames[:, 0]
        return {
            f"{prefix}_image": image.clone(),
            f"{prefix}_state": both_arms(self.env.window.current).clone(),
        }


def _last_action(flags: np.ndarray, chunk: int) -> np.ndarray:
    out = np.zeros((len(flags), chunk))
    out[:, -1] = flags
    return out


def _play(folder: Path, manifest: dict, golden: dict[str, Tensor]) -> Iterator[tuple[str, object]]:
    played = Recorded(folder, manifest, golden, as_is=False)
    env, chunk = played.env, played.env.spec.action.chunk
    played.reset()
    yield from played.observed("reset_obs").items()
    for i in _chunks(golden, r"chunk(\d+)\.policy_action"):
        result = played.step(golden[f"chunk{i}.policy_action"])
        ours = played.observed("obs") | {
            "action_buffer": both_arms(env.window.poses).clone(),
            "reward_prob": played.probability.unflatten(0, (-1, chunk)),
            "reward": result.rewards,
            "terminations": _last_action(result.terminated, chunk),
            "truncations": _last_action(result.truncated, chunk),
            "returns": result.episode["return"],
        }
        for name, value in ours.items():
            yield f"chunk{i}.{name}", value


def _play_as_is(
    folder: Path, manifest: dict, golden: dict[str, Tensor]
) -> Iterator[tuple[str, object]]:
    played = Recorded(folder, manifest, golden, as_is=True)
    played.reset()
    for i in _chunks(golden, r"asis\.chunk(\d+)\.samples"):
        played.step(golden[f"chunk{i}.policy_action"])
        samples = torch.cat((played.conditioning.history, played.latents), 3)  # [B V 4 T h w]
        yield f"asis.chunk{i}.samples", samples.flatten(0, 1)
        yield f"asis.chunk{i}.c_crossattn", played.conditioning.context.flatten(0, 1)


def check(folder: Path, manifest: dict) -> Iterator[VectorResult]:
    """Replay the reference's episode and compare everything it reported."""
    if FILE not in manifest["files"]:
        return
    golden, entry = load_file(folder / FILE), manifest["files"][FILE]
    for play in (_play, _play_as_is):
        for name, ours in play(folder, manifest, golden):
            if name in golden:
                images = golden[name].dtype == torch.uint8 and name.endswith("_image")
                atol = entry["image_tolerance_u8"] if images else entry["tolerance"]
                yield compare(f"env/{name}", ours, golden[name], atol=atol)
