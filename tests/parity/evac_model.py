"""Golden vectors of EVAC's conditioning, diffusion and whole-chunk procedure."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from evac_jax.evac import conditioning, schedule, trajectory_maps
from evac_jax.evac.config import MapConfig
from evac_jax.evac.diffusion_loss import diffusion_loss
from evac_jax.evac.model import Camera, Conditioning, EvacModel, history_places
from tests.parity import evac_pieces, evac_upstream
from tests.parity.evac_pieces import FORK, UPSTREAM, UPSTREAM_YAW, tiny_config
from tests.parity.report import VectorResult, compare

CHUNK = re.compile(r"chunk(\d+)\.(\w+)")
# Golden inputs of each file; everything else in it is an output to be matched.
INPUTS = {
    "schedule": r"",
    "cmaps": r"",
    "traj_maps": r".*\.(pose|K|w2c|radius)",
    "rays": r"K|c2w",
    "actions": r"abs_in|stat_mean|stat_std",
    "ddim_step": r"x|v_cond|v_uncond|noise",
    "conditioning": r"video|traj_u8|delta_action|intrinsic|extrinsic|cond_id|pre_z",
    "train_loss": r"t|noise|z|c_concat|c_crossattn|fs|domain_id",
    "rollout": r"intrinsic|c2w|first_image_u8|chunk\d+\.(pose_window|noise)",
    "rollout_third": r"chunk\d+\.(pose_window|noise)",
    "inference": r"memory_u8|abs_raw|c2w|K|chunk\d+\.noise",
}


def claims(name: str) -> bool:
    """Whether a file of the manifest belongs to this module."""
    return Path(name).stem in INPUTS


def vectors(folder: Path, manifest: dict) -> set[str]:
    """Names of the golden outputs this module must match."""
    names = set()
    for file in filter(claims, manifest["files"]):
        stem = Path(file).stem
        for key in load_file(folder / file):
            if not re.fullmatch(INPUTS[stem], key):
                names.add(f"{stem}/{key}")
    return names


def tiny_model(folder: Path, manifest: dict, maps: MapConfig = FORK) -> EvacModel:
    """The whole model with a folder's weights, in eval mode."""
    model = EvacModel(tiny_config(folder, manifest, maps))
    state = {}
    for file in sorted(folder.glob("sd_*.safetensors")):
        state |= load_file(file)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or any(not key.startswith("embedder.model.") for key in unexpected):
        raise ValueError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    return model.eval()


def check(folder: Path, manifest: dict) -> Iterator[VectorResult]:
    """Compare every golden output of the folder's files."""
    for file, entry in manifest["files"].items():
        if claims(file) and Path(file).stem != "rollout_third":  # continues "rollout"
            stem = Path(file).stem
            run: Callable = RUN.get(stem) or getattr(evac_pieces, f"check_{stem}")
            for result in run(folder, manifest, load_file(folder / file), entry):
                name = result.name if "/" in result.name else f"{stem}/{result.name}"
                yield VectorResult(name, result.error, result.tolerance, result.ok, result.note)


@torch.no_grad()
def _check_conditioning(folder, manifest, golden, entry):
    model = tiny_model(folder, manifest)
    config, atol = model.config, entry["tolerance"]
    past, chunk, views = config.n_previous, config.chunk, golden["video"].shape[2]
    video = golden["video"].permute(0, 2, 3, 1, 4, 5)  # [B V T 3 H W]
    maps = golden["traj_u8"].permute(0, 2, 3, 1, 4, 5)[:, :, past:]
    latents = model.encode(video).transpose(2, 3)
    yield compare("z", latents.flatten(0, 1), golden["z"], atol=atol)
    frame = golden["cond_id"] + video.shape[2]
    start = video[torch.arange(len(video)), :, frame]
    tokens = model.image_tokens(start)
    yield compare("img_emb", tokens.flatten(0, 1), golden["img_emb"], atol=atol)
    context = model.join_context(tokens, golden["delta_action"])
    yield compare("c_crossattn", context.flatten(0, 1), golden["c_crossattn"], atol=atol)
    map_latents = model.encode(trajectory_maps.normalize_maps(maps)).transpose(2, 3)
    rays = model.rays(golden["intrinsic"], golden["extrinsic"])
    given = golden["pre_z"].unflatten(0, (-1, views))
    for name, source in (("c_concat", latents), ("c_concat_pre_z", given)):
        condition = conditioning.image_condition(source[:, :, :, :past], chunk)
        ours = conditioning.concat_channels(condition, map_latents, rays, torch.ones(1))
        yield compare(name, ours.flatten(0, 1), golden[name], atol=atol)


def _check_train_loss(folder, manifest, golden, entry):
    model = tiny_model(folder, manifest)
    views = model.config.n_view

    rows = len(golden["z"])

    def per_view(name):
        return golden[name].unflatten(0, (-1, views))

    def per_row(name):
        values = golden[name]
        return values.repeat_interleave(rows // len(values))

    with torch.enable_grad():
        loss = diffusion_loss(
            model,
            schedule.Schedule.create(model.config),
            per_view("z"),
            per_view("c_concat"),
            per_view("c_crossattn"),
            per_row("t")[::views],  # shared by the views
            per_view("noise"),
            fps=per_row("fs"),
            domain_id=per_row("domain_id"),
        )
        loss.backward()
    yield compare("loss", loss.detach(), golden["loss"], atol=entry["tolerance"])
    parameters = dict(model.unet.named_parameters())
    for name, value in golden.items():
        kind, _, key = name.partition(".")
        if kind not in ("grad", "grad_norm"):
            continue
        grad = parameters[key].grad
        ours = grad if kind == "grad" else grad.norm()
        yield compare(
            name, ours, value, atol=entry["grad_rel_tolerance"] * float(value.abs().max())
        )


class _MapStore:
    """The reference's store of drawn maps, to rebuild its (unused) history maps."""

    def __init__(self, past: int):
        self._past, self._maps = past, None

    def window(self, maps: Tensor) -> Tensor:
        """Maps [B, V, T, ...] as the reference would pass them for the next chunk."""
        past = self._past
        if self._maps is None:
            self._maps = maps
            return maps
        places = history_places(torch.tensor([self._maps.shape[2]]), past)[0, :-1]
        result = torch.cat((self._maps[:, :, places], maps[:, :, past - 1 :]), 2)
        self._maps = torch.cat((self._maps, maps[:, :, past:]), 2)
        return result


def _arrange(ours: Tensor, golden: Tensor) -> Tensor:
    """[B, V, ...] in the golden's order: (b v) joined, or b c v for six axes."""
    return ours.transpose(1, 2) if golden.dim() == ours.dim() else ours.flatten(0, 1)


def _play_chunk(model, state, store, window, camera, noise, *, steps, eta, deltas, guidance):
    """One chunk, with every intermediate that a golden may hold, as [B, V, ...]."""
    config = model.config
    past = config.n_previous
    first = bool((state.length == 0).all())
    conditions = model.condition(state, window, camera, deltas=deltas)
    w2c = torch.linalg.inv(camera.along(config.frames).double()).float()
    maps = trajectory_maps.draw_maps(window, camera.intrinsic, w2c, config.maps, config.image_size)
    history = model.decode(conditions.history.transpose(2, 3))
    state, frames = model.imagine(
        state,
        window,
        camera,
        steps=steps,
        eta=eta,
        noise=noise,
        deltas=deltas,
        guidance=guidance,
    )
    end = int(state.length[0])
    new = state.latents[:, end - config.chunk : end].permute(0, 2, 3, 1, 4, 5)
    decoded = torch.cat((history, frames), 2) if first else frames
    ours = {
        "traj_u8": store.window(maps).transpose(2, 3),
        "delta_action": (conditioning.window_deltas(window, config) if deltas is None else deltas)[
            :, None
        ],
        "c_concat": conditions.concat,
        "c_crossattn": conditions.context,
        "samples": torch.cat((conditions.history, new), 3),
        "frames": decoded.transpose(2, 3),
        "video_in_first3": history.clamp(-1, 1)[:, :, :past].transpose(2, 3),
    }
    if guidance != 1.0:
        branch: Conditioning = model.unconditional(conditions)
        ours |= {"uc_c_concat": branch.concat, "uc_c_crossattn": branch.context}
    return state, ours


@torch.no_grad()
def _check_rollout(folder, manifest, golden, entry):
    model = tiny_model(folder, manifest)
    config = model.config
    tolerances = dict.fromkeys(golden, ("rollout", entry["tolerance"]))
    third = manifest["files"].get("rollout_third.safetensors")
    if third is not None:
        more = load_file(folder / "rollout_third.safetensors")
        tolerances |= dict.fromkeys(more, ("rollout_third", third["tolerance"]))
        golden = golden | more
    images = golden["first_image_u8"].permute(0, 3, 1, 2).float() / 255 * 2 - 1
    images = images.unflatten(0, (-1, config.n_view))
    camera = Camera(
        golden["intrinsic"].reshape(1, -1, 3, 3).expand(-1, config.n_view, -1, -1),
        golden["c2w"].reshape(1, -1, 4, 4).expand(-1, config.n_view, -1, -1),
    )
    chunks = sorted({int(m[1]) for key in golden if (m := CHUNK.fullmatch(key))})
    state = model.start(images, len(chunks))
    store = _MapStore(config.n_previous)
    for k in chunks:
        state, ours = _play_chunk(
            model,
            state,
            store,
            golden[f"chunk{k}.pose_window"],
            camera,
            golden[f"chunk{k}.noise"].unflatten(0, (-1, config.n_view)),
            steps=entry["ddim_steps"],
            eta=entry["eta"],
            deltas=None,
            guidance=1.0,
        )
        if k == 0:  # the reference's first input is the picture itself, not its reconstruction
            ours["video_in_first3"] = images[:, :, :, None].expand_as(ours["video_in_first3"])
        for name, value in ours.items():
            key = f"chunk{k}.{name}"
            if key in golden:
                file, atol = tolerances[key]
                yield compare(f"{file}/{key}", _arrange(value, golden[key]), golden[key], atol=atol)


@contextlib.contextmanager
def _channels_last_encoding(model: EvacModel):
    """Encode with the memory layout that the reference's first-chunk maps have.

    They come from pictures [h, w, c]. On the CPU torch's channels-last group norm is the less
    exact one: its 4e-5 against float64 is in the goldens and grows five-fold by the second chunk.
    """
    autoencoder = model.first_stage_model
    encode = autoencoder.encode_mean_scaled
    autoencoder.encode_mean_scaled = lambda x: encode(
        x.contiguous(memory_format=torch.channels_last)
    )
    try:
        yield
    finally:
        del autoencoder.encode_mean_scaled


@torch.no_grad()
def _check_inference(folder, manifest, golden, entry):
    model = tiny_model(folder, manifest, UPSTREAM)
    config, atol = model.config, entry["tolerance"]
    past, chunk = config.n_previous, config.chunk
    raw = golden["abs_raw"][None]
    extended = torch.cat((raw[:, :1].expand(-1, past - 1, -1), raw), 1)
    poses = trajectory_maps.tool_yaw(extended, UPSTREAM_YAW)
    deltas = evac_upstream.sequence_deltas(raw, config)
    if "action_vis" in golden:
        yield compare("action_vis", poses[0], golden["action_vis"], atol=1e-5)
    if "delta_norm" in golden:
        yield compare("delta_norm", deltas[0], golden["delta_norm"], atol=1e-3)

    memory = golden["memory_u8"].permute(0, 3, 1, 2).float() / 255
    frames = evac_upstream.resize_memory(memory, config.image_size)[None]
    size = tuple(memory.shape[-2:])
    intrinsic = conditioning.scale_intrinsic(golden["K"], size, config.image_size)[None]
    chunks = sorted({int(m[1]) for key in golden if (m := CHUNK.search(key))})
    steps, eta = _numbers(entry)
    scales = sorted({m[1] for key in golden if (m := re.match(r"cfg([\d.]+)\.", key))}, key=float)
    for scale in scales:
        state = model.start(frames, len(chunks))
        store = _MapStore(past)
        for k in chunks:
            at = torch.arange(k * chunk, k * chunk + config.frames)
            camera = Camera(intrinsic, _padded(golden["c2w"][None], at, 2))
            layout = _channels_last_encoding(model) if k == 0 else contextlib.nullcontext()
            with layout:
                state, ours = _play_chunk(
                    model,
                    state,
                    store,
                    _padded(poses, at, 1),
                    camera,
                    golden[f"chunk{k}.noise"].unflatten(0, (-1, config.n_view)),
                    steps=steps,
                    eta=eta,
                    deltas=evac_upstream.upstream_delta_slice(deltas, k, config),
                    guidance=float(scale),
                )
            for name, value in ours.items():
                for key in (f"cfg{scale}.chunk{k}.{name}", f"chunk{k}.{name}"):
                    if key in golden and not (name == "traj_u8" and scale != scales[0]):
                        special = f"tolerance_cfg{scale.replace('.', '')}_chunk{k}"
                        yield compare(
                            key,
                            _arrange(value, golden[key]),
                            golden[key],
                            atol=entry.get(special, atol),
                        )


def _numbers(entry: dict) -> tuple[int, float]:
    """DDIM steps and eta of an entry, given as fields or in its description."""
    steps = entry.get("ddim_steps") or re.search(r"(\d+) steps", entry["what"])[1]
    eta = entry["eta"] if "eta" in entry else re.search(r"eta ([\d.]+)", entry["what"])[1]
    return int(steps), float(eta)


def _padded(values: Tensor, places: Tensor, axis: int) -> Tensor:
    """Entries along an axis; places beyond the end read the last one."""
    return values.index_select(axis, places.clamp(max=values.shape[axis] - 1))


RUN = {
    "conditioning": _check_conditioning,
    "train_loss": _check_train_loss,
    "rollout": _check_rollout,
    "inference": _check_inference,
}
