"""Converts a published weight file, once, to a folder that evac_jax can load.

    python -m evac_jax.tools.world_model.import_evac --weights evac.ckpt --out weights/world_model
    ... --weights resnet_rm.pth --out weights/reward
    ... --weights action_predictor.pth --out weights/pose_model

The keys show what the file contains: an EVAC world model, the success classifier or the action
predictor of RLinf's EVAC environment. All keys must match, nothing in the file is run, and the
folder appears only when it is complete. See docs/bring_your_world_model.md.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from absl import logging
from torch import Tensor, nn

from evac_jax.config import hub
from evac_jax.errors import CheckpointError, ConfigError
from evac_jax.evac import model_folders
from evac_jax.evac.config import EvacConfig, JsonConfig, MapConfig
from evac_jax.evac.model import EvacModel
from evac_jax.evac.weight_files import find_file, read_weights
from evac_jax.files import cards
from evac_jax.files.atomic import whole_folder
from evac_jax.sim.pose_model import PoseModel, PoseModelConfig
from evac_jax.sim.reward import RewardConfig, RewardNet
from evac_jax.telemetry.reading import ReadProgress
from evac_jax.tools.command_line import Parser, refuse_existing, run_tool

# The two published variants: RLinf's for LIBERO, and AgiBot's own.
SIZES = {
    "full": EvacConfig(),
    "upstream": EvacConfig(
        image_size=(320, 512),
        chunk=16,
        maps=MapConfig(renderer="upstream", tool_yaw=0.5236, gripper_range=(0.0, 120.0)),
    ),
}
# Kind -> class, and the beginning of the keys in its file.
KINDS = {
    "evac": (EvacModel, "model.diffusion_model."),
    "reward": (RewardNet, "net."),
    "pose_model": (PoseModel, "network."),
}
DTYPES = ("float32", "bfloat16", "float16")
TOWER = "embedder.model."
TOWER_FILE = "open_clip_pytorch_model.bin of laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def kind_of(keys: Iterable[str], name: str) -> str:
    """Return the kind of model that a file's keys belong to, a key of `KINDS`.

    Raises:
        CheckpointError: they belong to no known kind.
    """
    keys = sorted(keys)
    for kind, (_, prefix) in KINDS.items():
        if any(key.startswith(prefix) for key in keys):
            return kind
    known = ", ".join(f"{kind} ({prefix}*)" for kind, (_, prefix) in KINDS.items())
    raise CheckpointError(
        f"{name}: keys of no model known here; expected one of {known}, got {keys[:5]}"
    )


def with_tower(state: Mapping[str, Tensor], file: str, name: str) -> dict[str, Tensor]:
    """Return an EVAC state dict with the image tower of an open_clip file added.

    Only `visual.*` of that file is used; the text side is not.

    Raises:
        CheckpointError: the file has no image tower, or `state` already has one.
    """
    if any(key.startswith(f"{TOWER}visual.") for key in state):
        raise CheckpointError(f"{name} has its own image tower ({TOWER}visual.*): omit --open_clip")
    tower = {key: value for key, value in read_weights(file).items() if key.startswith("visual.")}
    if not tower:
        raise CheckpointError(
            f"--open_clip: {file} has no visual.* weights; expected open_clip's own layout, as in "
            f"{TOWER_FILE} (the layouts of transformers and of OpenAI are not read)"
        )
    return {**state, **{TOWER + key: value for key, value in tower.items()}}


def config_of(
    kind: str, state: Mapping[str, Tensor], size: str, config_file: str | None
) -> JsonConfig:
    """Return the sizes: EVAC's from the arguments, those of small networks from their first layer.

    Raises:
        ConfigError: the file of sizes cannot be read or used.
    """
    if kind == "evac":
        return read_config(config_file) if config_file else SIZES[size]
    if config_file:
        raise ConfigError(f"--config: the sizes of a {kind} are read from its weights; omit it")
    first, field = {
        "reward": ("net.0.0.weight", "width"),
        "pose_model": ("network.0.weight", "hidden"),
    }[kind]
    cls = {"reward": RewardConfig, "pose_model": PoseModelConfig}[kind]
    return cls(**{field: len(state[first])}) if first in state and state[first].ndim else cls()


def read_config(file: str) -> EvacConfig:
    """Return the sizes in a JSON file: those of `EvacConfig`, or a config.json with them.

    Raises:
        ConfigError: it cannot be read, or the sizes are not valid.
    """
    try:
        values = json.loads(Path(file).read_text())
        return EvacConfig.from_dict(values.get("config", values))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"--config={file}: not a readable file of sizes ({error})") from error


def fitted(
    kind: str, config: JsonConfig, state: Mapping[str, Tensor], name: str
) -> model_folders.Fit:
    """Return the comparison of weights and model.

    Raises:
        CheckpointError: they do not fit; the message names a variant that would.
    """
    model = _on_meta(kind, config)
    try:
        return model_folders.require_fit(model, state, name)
    except CheckpointError as error:
        raise CheckpointError("\n".join([str(error), *_advice(kind, config, state)])) from error


def _on_meta(kind: str, config: JsonConfig) -> nn.Module:
    with torch.device("meta"):
        return KINDS[kind][0](config)


def _advice(kind: str, config: JsonConfig, state: Mapping[str, Tensor]) -> list[str]:
    if kind == "pose_model" and "abs_action_mean" not in state:
        return [
            "  The pose's statistics are not in the file: take the whole published checkpoint, "
            "with abs_action_mean and abs_action_std beside model_state_dict."
        ]
    if kind != "evac":
        return []
    advice = []
    if not any(key.startswith(f"{TOWER}visual.") for key in state):
        advice.append(f"  The image tower is not in the file: --open_clip FILE, {TOWER_FILE}.")
    shapes = {key: value.shape for key, value in state.items()}
    for size, other in SIZES.items():
        if other != config and not model_folders.fit(_on_meta(kind, other), shapes).mismatched:
            advice.append(f"  Its shapes are those of --size {size}.")
    return advice


def convert(
    weights: Path,
    out: Path,
    *,
    kind: str | None = None,
    open_clip: str | None = None,
    size: str = "full",
    config_file: str | None = None,
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Write the folder `out`; return its card. Arguments as on the command line.

    Raises:
        CheckpointError: the file is damaged, refused or does not fit.
        ConfigError: the sizes are not valid.
        DataError: `out` exists.
        StorageError: `out` cannot be made.
    """
    refuse_existing(out)
    name, state = str(weights), read_weights(weights)
    kind = kind or kind_of(state, name)
    sources = [find_file(weights)]
    if open_clip:
        if kind != "evac":
            raise ConfigError(f"--open_clip: a {kind} has no image tower; omit it")
        state = with_tower(state, open_clip, name)
        sources.append(find_file(open_clip))
    config = config_of(kind, state, size, config_file)
    result = fitted(kind, config, state, name)
    state = {key: value for key, value in state.items() if key not in result.unused}
    stored = getattr(torch, dtype) if dtype else _own_dtype(state)
    with whole_folder(out) as partial:
        cls = KINDS[kind][0].__name__
        model_folders.save_weights(partial, cls, config, state, stored, progress)
        card = cards.card(
            model=cls,
            parameters=sum(value.numel() for value in state.values()),
            stored_as=str(stored).removeprefix("torch."),
            sources=[_source(file) for file in sources],
            left_out=result.unused,
            sha256=cards.sha256(partial / model_folders.WEIGHTS_FILE),
        )
        cards.write_json(partial / "card.json", card)
    return card


def _source(file: Path) -> dict[str, object]:
    """What a card says of a file; if it is in the Hugging Face Hub's cache, its address too."""
    address = hub.address_of(str(file.absolute()))
    facts = {"file": file.name, "bytes": file.stat().st_size, "sha256": cards.sha256(file)}
    return facts | ({"address": address} if hub.is_address(address) else {})


def _own_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """The precision of most weights; float64 is reduced, because nothing here computes in it."""
    kinds = [value.dtype for value in state.values() if value.is_floating_point()]
    most = max(set(kinds), key=kinds.count)
    return torch.float32 if most == torch.float64 else most


def _parser() -> Parser:
    parser = Parser("world_model.import_evac", __doc__)
    add = parser.add_argument
    add(
        "--weights",
        required=True,
        type=Path,
        help=".ckpt, .pt, .pth or .safetensors, or a DeepSpeed folder with "
        "checkpoint/mp_rank_00_model_states.pt",
    )
    add("--out", required=True, type=Path, help="new folder")
    add("--kind", choices=KINDS, help="what the file holds; left out, its keys tell")
    add("--open_clip", help="file of the image tower, if --weights does not hold it")
    add(
        "--size",
        choices=SIZES,
        default="full",
        help="full: RLinf's for LIBERO, 256x256 and 8 frames per chunk; upstream: AgiBot's own, "
        "320x512 and 16 frames",
    )
    add("--config", help="JSON file of other sizes (EvacConfig), instead of --size")
    add("--dtype", choices=DTYPES, help="store in this precision; left out, in the file's own")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = _parser().parse_args(argv)
    logging.set_verbosity(logging.INFO)
    with ReadProgress("weights") as progress:
        card = convert(
            args.weights,
            args.out,
            kind=args.kind,
            open_clip=args.open_clip,
            size=args.size,
            config_file=args.config,
            dtype=args.dtype,
            progress=progress,
        )
    facts = (card["model"], card["parameters"], card["stored_as"], len(card["left_out"]), args.out)
    logging.info("%s, %d weights as %s, %d unused keys left out -> %s", *facts)


if __name__ == "__main__":
    run_tool(main)
