"""Golden vectors of EVAC's parts that need no network weights."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from evac_jax.evac import conditioning, sampler, schedule, trajectory_maps
from evac_jax.evac.config import (
    AutoencoderConfig,
    EvacConfig,
    ImageTowerConfig,
    MapConfig,
    ResamplerConfig,
    UNetConfig,
)
from tests.parity import evac_upstream
from tests.parity.report import VectorResult, compare

NEAR_INTEGER = 1e-3  # a pixel coordinate this close to an integer may be truncated either way
FORK = MapConfig(renderer="fork", gripper_range=(-1.0, 1.0))
UPSTREAM = MapConfig(renderer="upstream", gripper_range=(0.0, 120.0))
UPSTREAM_YAW = 0.5236  # radians, see `MapConfig.tool_yaw`
STEP = re.compile(r"n(\d+)\.eta([\d.]+)\.(cfg\.)?i(\d+)\.(x_prev|pred_x0)")


def tiny_config(folder: Path, manifest: dict, maps: MapConfig) -> EvacConfig:
    """The configuration of a folder's network weights."""
    tiny = manifest["tiny_config"]
    resampler = ResamplerConfig(**tiny["rs"], output_dim=tiny["context_dim"])
    vision = tiny["clip"]["v"]
    factor = 2 ** (len(tiny["vae_mult"]) - 1)
    statistics = {}
    if (folder / "actions.safetensors").exists():
        actions = load_file(folder / "actions.safetensors")
        statistics = {f"delta_{k}": tuple(actions[f"stat_{k}"].tolist()) for k in ("mean", "std")}
    return EvacConfig(
        image_size=tuple(n * factor for n in tiny["latent"]),
        chunk=tiny["chunk"],
        n_previous=tiny["n_previous"],
        n_view=tiny["n_view"],
        unet=UNetConfig(
            model_channels=tiny["model_channels"],
            channel_mult=tuple(tiny["channel_mult"]),
            num_res_blocks=tiny["num_res_blocks"],
            attention_resolutions=tuple(tiny["attention_resolutions"]),
            num_head_channels=tiny["num_head_channels"],
            context_dim=tiny["context_dim"],
            action_tokens=tiny["rs"]["num_queries"],
        ),
        autoencoder=AutoencoderConfig(
            channels=tiny["vae_ch"],
            channel_mult=tuple(tiny["vae_mult"]),
            num_res_blocks=tiny["vae_res"],
        ),
        action_resampler=resampler.replace(embedding_dim=14),
        image_resampler=resampler.replace(embedding_dim=vision["width"]),
        image_tower=ImageTowerConfig(**vision, embed_dim=tiny["clip"]["embed_dim"]),
        maps=maps,
        **statistics,
    )


def check_schedule(folder, manifest, golden, entry):
    config, atol = EvacConfig(), entry["tolerance"]
    tables = schedule.checkpoint_tables(config)
    etas = {}
    for key in golden:
        if match := re.fullmatch(r"ddim(\d+)\.eta([\d.]+)\.sigmas", key):
            etas[int(match[1])] = float(match[2])
    for key, value in golden.items():
        if match := re.fullmatch(r"ddim(\d+)\.(?:eta([\d.]+)\.)?(\w+)", key):
            steps = int(match[1])
            eta = float(match[2]) if match[2] else etas.get(steps, 0.0)
            ours = getattr(schedule.ddim_table(config, steps, eta), match[3])
        else:
            ours = tables[key]
        yield compare(key, ours, value, atol=atol)


def check_cmaps(folder, manifest, golden, entry):
    for key, value in golden.items():
        anchors = getattr(trajectory_maps, key.upper())
        yield compare(key, trajectory_maps.color_table(anchors), value, atol=entry["tolerance"])


def _compare_maps(name, ours: Tensor, golden: Tensor, uv: Tensor, atol: float) -> VectorResult:
    """Pixel-exact comparison [V, T, 3, H, W], lenient on frames truncated by a hair."""
    result = compare(name, ours, golden, atol=atol)
    if result.ok or ours.shape != golden.shape:
        return result
    near = ((uv - uv.round()).abs() < NEAR_INTEGER).flatten(2).any(2)  # [V T]
    strict = ~near
    clear = compare(name, ours[strict], golden[strict], atol=atol)
    note = f"{int(near.sum())} frames with a coordinate within {NEAR_INTEGER} of an integer"
    return VectorResult(name, clear.error, atol, clear.ok, note)


def check_traj_maps(folder, manifest, golden, entry):
    for name in sorted({key.rsplit(".", 1)[0] for key in golden}):
        base = FORK if name.startswith("fork.") else UPSTREAM
        config = base.replace(radius=int(golden[f"{name}.radius"]))
        pose, intrinsic = golden[f"{name}.pose"][None], golden[f"{name}.K"][None]
        w2c, maps = golden[f"{name}.w2c"], golden[f"{name}.map_u8"].permute(1, 2, 0, 3, 4)
        w2c = (w2c[:, None] if w2c.dim() == 3 else w2c)[None]  # [1 V T 4 4]
        size = tuple(maps.shape[-2:])
        arms = [pose[..., :8]] if base is FORK else [pose[..., :8], pose[..., 8:]]
        uv = [trajectory_maps.project(arm, intrinsic, w2c, config, size)[0] for arm in arms]
        if f"{name}.uv" in golden:
            expected = golden[f"{name}.uv"]
            # Only coordinates near the canvas matter, and the goldens are float32.
            visible = (expected.abs() < 4 * max(size)).all(-1)
            yield compare(f"{name}.uv", uv[0][visible], expected[visible], atol=NEAR_INTEGER)
        ours = trajectory_maps.draw_maps(pose, intrinsic, w2c, config, size)[0]
        yield _compare_maps(f"{name}.map_u8", ours, maps, torch.cat(uv, -2), entry["tolerance"])


def check_rays(folder, manifest, golden, entry):
    size = tuple(golden["origin"].shape[1:3])
    found = re.search(r"image size \((\d+), *(\d+)\)", entry["what"])
    image_size = (int(found[1]), int(found[2]))
    scaled = conditioning.scale_intrinsic(golden["K"], image_size, size)
    direction, origin = conditioning.ray_maps(scaled, golden["c2w"], size)
    ours = {"K_latent": scaled, "direction": direction.movedim(-3, -1)}
    ours["origin"] = origin.movedim(-3, -1)
    for name, value in ours.items():
        yield compare(name, value, golden[name], atol=entry["tolerance"])


def check_actions(folder, manifest, golden, entry):
    config = tiny_config(folder, manifest, FORK)
    poses = golden["abs_in"][None]
    # The prepended rows of upstream's poses: as many as the golden has more than the input.
    front = golden["up_abs_vis"].shape[0] - poses.shape[1]
    past = poses.shape[1] - golden["fork_delta_norm"].shape[0]
    extended = torch.cat((poses[:, :1].expand(-1, front, -1), poses), 1)
    ours = {
        "fork_abs_vis": trajectory_maps.tool_yaw(poses, UPSTREAM_YAW),
        "up_abs_vis": trajectory_maps.tool_yaw(extended, UPSTREAM_YAW),
        "fork_delta_norm": conditioning.delta_actions(poses[:, past - 1 :], config),
        "up_delta_norm": evac_upstream.sequence_deltas(poses, config),
        "up_delta_raw": evac_upstream.sequence_deltas(poses, config, normalize=False),
    }
    for name, value in ours.items():
        atol = entry["atol_norm"] if name.endswith("_norm") else entry["tolerance"]
        yield compare(name, value[0], golden[name], atol=atol)


def check_ddim_step(folder, manifest, golden, entry):
    for name, value in golden.items():
        if not (match := STEP.fullmatch(name)):
            continue
        steps, eta, guided, index, which = match.groups()
        v = golden["v_cond"]
        if guided:
            scale = float(re.search(r"guidance ([\d.]+) ", entry["what"])[1])
            v = sampler.guide(v, golden["v_uncond"], scale)
        table = schedule.ddim_table(EvacConfig(), int(steps), float(eta))
        pair = sampler.ddim_update(golden["x"], v, int(index), table, golden["noise"])
        ours = pair[0] if which == "x_prev" else pair[1]
        yield compare(name, ours, value, atol=entry["tolerance"])
