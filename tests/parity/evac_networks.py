"""Golden vectors of EVAC's networks, one by one, and of the checkpoints' keys."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from evac_jax.evac import model_folders
from evac_jax.evac.config import EvacConfig, MapConfig
from evac_jax.evac.model import EvacModel
from evac_jax.sim.pose_model import PoseModel, PoseModelConfig
from evac_jax.sim.reward import RewardConfig, RewardNet
from tests.parity.evac_model import tiny_config
from tests.parity.report import VectorResult, compare

# Golden inputs of each file; everything else in it is an output to be matched.
INPUTS = {
    "unet": r"x|timesteps|context|fs|domain_id",
    "vae": r"x|noise|z_in",
    "cond": r"img|img\d+(x\d+)?_u8|delta_action(_\w+)?",
    "reward_model": r"x|sd\..+",
    "action_predictor": r"delta|prev|sd\..+",
}
KEY_FILES = ("full_model_keys", "aux_model_keys")
WEIGHTS = "sd_"
# The public reward and action networks under the names of `aux_model_keys.json`.
AUX_MODELS = {
    "reward_model": lambda: RewardNet(RewardConfig()),
    "action_predictor": lambda: PoseModel(PoseModelConfig()),
}
STATISTICS = ("abs_action_mean", "abs_action_std")  # stored beside the state dict, not in it


def claims(name: str) -> bool:
    """Whether a file of the manifest belongs to this module."""
    stem = Path(name).stem
    return stem in INPUTS or stem in KEY_FILES or stem.startswith(WEIGHTS)


def vectors(folder: Path, manifest: dict) -> set[str]:
    """Names of the golden outputs this module must match."""
    names = set()
    for file in filter(claims, manifest["files"]):
        stem = Path(file).stem
        if stem in INPUTS:
            keys = load_file(folder / file)
            names |= {f"{stem}/{key}" for key in keys if not re.fullmatch(INPUTS[stem], key)}
        elif stem.startswith(WEIGHTS):
            names.add(f"{stem}/keys and values")
        elif stem == "full_model_keys":
            keys = json.loads((folder / file).read_text())["keys"]
            names |= {f"{stem}/{_part(key)}" for key in keys}
        else:
            known = json.loads((folder / file).read_text())
            names |= {f"{stem}/{name}" for name, keys in known.items() if isinstance(keys, dict)}
    return names


def check(folder: Path, manifest: dict) -> Iterator[VectorResult]:
    """Compare every golden output of the folder's files."""
    files = {Path(file).stem: file for file in manifest["files"] if claims(file)}
    weights: dict[str, dict[str, Tensor]] = {
        stem: load_file(folder / file) for stem, file in files.items() if stem.startswith(WEIGHTS)
    }
    model = EvacModel(tiny_config(folder, manifest, MapConfig())).eval()
    yield from _check_weights(model, weights)
    for stem, run in (("unet", _check_unet), ("vae", _check_vae), ("cond", _check_cond)):
        if stem in files:
            golden, entry = load_file(folder / files[stem]), manifest["files"][files[stem]]
            with torch.no_grad():
                for key, ours in run(model, golden).items():
                    yield compare(f"{stem}/{key}", ours, golden[key], atol=entry["tolerance"])
    for stem, run in (("reward_model", _run_reward), ("action_predictor", _run_poses)):
        if stem in files:
            golden, entry = load_file(folder / files[stem]), manifest["files"][files[stem]]
            with torch.no_grad():
                for key, ours in run(golden).items():
                    yield compare(f"{stem}/{key}", ours, golden[key], atol=entry["tolerance"])
    if "full_model_keys" in files:
        yield from _check_full_keys(folder, files["full_model_keys"])
    if "aux_model_keys" in files:
        yield from _check_aux_keys(folder, files["aux_model_keys"])


def _check_weights(model: EvacModel, weights: dict) -> Iterator[VectorResult]:
    """Load all weight files at once, strictly; then each must come out of the model unchanged."""
    together = {key: value for state in weights.values() for key, value in state.items()}
    fit = model_folders.fit(model, {key: value.shape for key, value in together.items()})
    if not fit.ok:
        for stem in weights:
            yield VectorResult(f"{stem}/keys and values", np.inf, 0.0, False, fit.describe())
        return
    model.load_state_dict({k: v for k, v in together.items() if k not in fit.unused})
    ours = model.state_dict()
    for stem, state in weights.items():
        wrong = [k for k, v in state.items() if k in ours and not torch.equal(ours[k], v)]
        unused = sum(key in fit.unused for key in state)
        note = f"{len(state)} tensors, {unused} unused; changed: {wrong}"
        yield VectorResult(f"{stem}/keys and values", float(len(wrong)), 0.0, not wrong, note)


def _check_unet(model: EvacModel, golden: dict) -> dict[str, Tensor]:
    unet, config = model.unet, model.config
    inner, handles = {}, []
    for key in golden:
        if key.startswith("inter."):
            module = unet.get_submodule(key.removeprefix("inter."))
            last = module[-1] if isinstance(module, nn.ModuleList) else module

            def keep(_module, _inputs, output, key=key):
                inner.setdefault(key, []).append(_per_frame(output, config))

            handles.append(last.register_forward_hook(keep))
    sizes = {"n_history": config.n_previous, "n_view": config.n_view}
    x, timesteps, context, fps = (golden[key] for key in ("x", "timesteps", "context", "fs"))
    results = {"y": unet(x, timesteps, context, fps, golden["domain_id"], **sizes)}
    if "y_no_domain" in golden:
        prepared = unet.prepare_context(context, config.n_view)
        results["y_no_domain"] = unet(x, timesteps, prepared, fps, None, **sizes)
    for handle in handles:
        handle.remove()
    for key, calls in inner.items():
        # The manifest does not say in which of the two calls an inner output was recorded.
        results[key] = min(calls, key=lambda ours: _distance(ours, golden[key]))  # noqa: B023
    return results


def _distance(ours: Tensor, golden: Tensor) -> float:
    return float((ours - golden).abs().max()) if ours.shape == golden.shape else float("inf")


def _per_frame(features: Tensor, config: EvacConfig) -> Tensor:
    """Our features, [(b t v) C H W] or [B T V H W C], as the golden's [(b v t) C H W]."""
    if features.dim() == 4:
        frames, views = config.frames, config.n_view
        features = features.unflatten(0, (-1, frames, views)).permute(0, 1, 2, 4, 5, 3)
    return features.permute(0, 2, 1, 5, 3, 4).flatten(0, 2)


def _check_vae(model: EvacModel, golden: dict) -> dict[str, Tensor]:
    autoencoder = model.first_stage_model
    mean, logvar = autoencoder.encode(golden["x"])
    return {
        "mean": mean,
        "logvar": logvar,
        "mean_scaled": autoencoder.encode_mean_scaled(golden["x"]),
        "sampled_scaled": autoencoder.encode_sample_scaled(golden["x"], noise=golden["noise"]),
        "decoded": autoencoder.decode_scaled(golden["z_in"]),
    }


def _check_cond(model: EvacModel, golden: dict) -> dict[str, Tensor]:
    tower, results = model.embedder, {}
    for key, value in golden.items():
        if match := re.fullmatch(r"preprocessed(\d+)", key):
            first = int(match[1])
            results[key] = tower.preprocess(golden["img"])[first : first + len(value)]
        elif match := re.fullmatch(r"pre(\d+(x\d+)?)", key):
            frames = golden[f"img{match[1]}_u8"].float() / 255 * 2 - 1
            frames = frames if frames.dim() == 4 else frames[None]
            pixels = tower.preprocess(frames)
            stride = -(-pixels.shape[-1] // value.shape[-1])
            pixels = pixels[..., ::stride, ::stride]
            results[key] = pixels if value.dim() == 4 else pixels[0]
        elif match := re.fullmatch(r"action_tokens_out(_\w+)?", key):
            results[key] = model.cond_stage_model(golden[f"delta_action{match[1] or ''}"])
    tokens = tower(golden["img"])
    return results | {"tokens": tokens, "image_tokens_out": model.image_proj_model(tokens)}


def _state(golden: dict) -> dict[str, Tensor]:
    return {k.removeprefix("sd."): v for k, v in golden.items() if k.startswith("sd.")}


def _run_reward(golden: dict) -> dict[str, Tensor]:
    state = _state(golden)
    net = RewardNet(RewardConfig(width=len(state["net.0.0.weight"]))).eval()
    net.load_state_dict(state)
    probability = net.probability(golden["x"])[:, None]
    # The reference's rule; a run's success begins at its threshold (`sim.episodes`).
    return {"prob": probability, "reward": (probability > 0.5).float()}


def _run_poses(golden: dict) -> dict[str, Tensor]:
    state = _state(golden)
    net = PoseModel(PoseModelConfig(hidden=len(state["network.0.weight"]))).eval()
    net.load_state_dict(state)
    arguments = golden["delta"], golden["prev"], golden["prev"]
    return {"forward": net(*arguments), "get_ee_pose": net.get_ee_pose(*arguments)}


def _part(key: str) -> str:
    """What a key of a whole checkpoint belongs to."""
    return key.rsplit(".", 1)[0].split(".")[0] if "." in key else "schedule buffers"


def _check_full_keys(folder: Path, file: str) -> Iterator[VectorResult]:
    full = json.loads((folder / file).read_text())
    config = tiny_config(folder, {"tiny_config": full["config"]}, MapConfig())
    with torch.device("meta"):
        model = EvacModel(config)
    shapes = {key: shape for key, (shape, _) in full["keys"].items()}
    fit = model_folders.fit(model, shapes)
    wrong = {*fit.missing, *fit.unexpected, *fit.mismatched}
    dtypes = {k: str(v.dtype).removeprefix("torch.") for k, v in model.state_dict().items()}
    wrong |= {k for k, (_, dtype) in full["keys"].items() if dtypes.get(k, dtype) != dtype}
    parts = {_part(key) for key in shapes} | {_part(key) for key in wrong}
    for part in sorted(parts):
        keys = [key for key in shapes if _part(key) == part]
        unused = sum(key in fit.unused for key in keys)
        bad = sorted(key for key in wrong if _part(key) == part)
        note = f"{len(keys)} keys, {unused} of them unused" + (f"; wrong: {bad[:5]}" if bad else "")
        yield VectorResult(f"full_model_keys/{part}", float(len(bad)), 0.0, not bad, note)


def _check_aux_keys(folder: Path, file: str) -> Iterator[VectorResult]:
    for name, keys in json.loads((folder / file).read_text()).items():
        if not isinstance(keys, dict):
            continue
        with torch.device("meta"):
            ours = {k: [list(v.shape), str(v.dtype).removeprefix("torch.")]
                    for k, v in AUX_MODELS[name]().state_dict().items()}  # fmt: skip
        golden = {key: list(value) for key, value in keys.items()}
        wrong = sorted(
            key
            for key in set(ours) | set(golden)
            if ours.get(key) != golden.get(key) and not (key in STATISTICS and key not in golden)
        )
        note = f"{len(golden)} keys" + (f"; wrong: {wrong[:5]}" if wrong else "")
        yield VectorResult(f"aux_model_keys/{name}", float(len(wrong)), 0.0, not wrong, note)
