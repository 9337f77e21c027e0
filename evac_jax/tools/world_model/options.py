"""The command line of `world_model.train`, and the model that it selects."""

import argparse

import torch

from evac_jax.errors import CheckpointError, ConfigError
from evac_jax.evac import model_folders
from evac_jax.evac.autoencoder import Autoencoder
from evac_jax.evac.model import EvacModel
from evac_jax.files.recordings import Episodes
from evac_jax.tools import sizes, torch_training
from evac_jax.tools.command_line import Parser, not_negative
from evac_jax.tools.world_model.data import fitted_deltas

# What --train may name -> child of EvacModel. The autoencoder never trains here.
PARTS = {
    "unet": "model",
    "image_resampler": "image_proj_model",
    "action_resampler": "cond_stage_model",
    "image_tower": "embedder",
}


def parse(argv: list[str] | None = None, doc: str | None = None) -> argparse.Namespace:
    """Return the checked arguments; exits with a message if they do not fit together.

    Args:
        argv: the command line; None = this process's.
        doc: the tool's docstring, for --help.
    """
    parser = Parser("world_model.train", doc)
    add = parser.add_argument
    add("--data", required=True, nargs="+", help="folders of episodes")
    add("--autoencoder", help="from scratch: folder of train_autoencoder, or of a world model")
    text = f"{sizes.HELP} an EvacConfig; default: {sizes.DEFAULT}"
    add("--sizes", "--config", metavar="NAME|FILE", help=text)
    add(
        "--fit_deltas",
        action="store_true",
        help="from scratch: normalise changes of pose as these episodes have them",
    )
    add("--start", help="fine-tune: folder of a world model to go on from")
    add("--out", required=True, help="folder for weights, card, progress and events")
    add("--cache", help="folder of latents, may be shared by runs; default <out>/cache")
    add("--encode_processes", type="count", default=1, help="that fill the cache, CPU only")
    add("--train", default="all", help=f"all, or parts joined by +: {', '.join(PARTS)}")
    add("--weight", type=_weight, nargs="+", default=[], help="source=factor, e.g. policy=2")
    add("--steps", type="count", default=8000, help="of the optimizer")
    add("--batch", type="count", default=16, help="windows per process and pass")
    add("--accumulate", type="count", default=1, help="passes per step")
    add("--optimizer", choices=torch_training.OPTIMIZERS, default="adamw", help="muon: of matrices")
    add("--lr", type="positive", default=1.2e-3, help="highest learning rate")
    add("--warmup", type="natural", default=200, help="steps")
    add("--weight_decay", type="not_negative", default=0.01, help="of either optimizer")
    add("--clip", type="positive", default=1.0, help="largest gradient norm")
    add(
        "--ema",
        type="share_below_1",
        default=0.997,
        help="decay of the moving average of the weights",
    )
    add("--dtype", choices=tuple(torch_training.DTYPES), default="float32", help="of the passes")
    add("--dropout", type="dropout", default=0.05, help="p of the condition dropout, 0 to 0.25")
    add(
        "--few_steps",
        action="store_true",
        help="train on the timesteps of --ddim_steps alone: for a model that is always sampled so",
    )
    add(
        "--moving_weight",
        type="not_negative",
        default=5.0,
        help="of latent cells that move; 1 is none",
    )
    add(
        "--patience",
        type="natural",
        default=0,
        help="validations without a better one; 0: no stop",
    )
    add("--validation_windows", type="count", default=96, help="of the held-out loss")
    add("--rollouts", type="count", default=48, help="held-out episodes imagined per validation")
    add("--rollout_chunks", type="count", default=4, help="imagined of each of these episodes")
    add("--ddim_steps", type="count", default=4, help="denoising steps of the roll-outs")
    add("--eta", type="share", default=0.0, help="of the roll-outs")
    add("--save_every", type="count", default=500, help="steps between validations")
    add("--log_every", type="count", default=100, help="steps between lines of the log")
    parser.add_device()
    parser.add_threads()
    parser.add_seed("weights, batches and noise")
    args = parser.parse_args(argv)
    if bool(args.autoencoder) == bool(args.start):
        parser.error("give either --autoencoder (from scratch) or --start (fine-tuning)")
    if args.start and (args.sizes or args.fit_deltas):
        parser.error(
            "--sizes and --fit_deltas go with --autoencoder; with --start the folder has its own"
        )
    args.weight = dict(args.weight)
    return args


def _weight(text: str) -> tuple[str, float]:
    source, _, factor = text.rpartition("=")
    try:
        return source, not_negative(factor)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error} in {text!r}; give source=factor") from error


def make_model(args: argparse.Namespace, data: Episodes) -> EvacModel:
    """Return the model to train, with random or earlier weights and its other parts frozen.

    Args:
        args: result of `parse`.
        data: the episodes; a new model is made for their cameras.

    Raises:
        CheckpointError: a folder does not contain the expected model.
        ConfigError: unknown parts in --train, or the configuration is not valid.
        DataError: --fit_deltas without training or without held-out episodes.
    """
    if args.start:
        model = model_folders.load_model(args.start, kind="EvacModel").float()
    else:
        torch.manual_seed(args.seed)
        autoencoder = _load_autoencoder(args.autoencoder)
        config = sizes.world_model(args.sizes)
        config = config.replace(autoencoder=autoencoder.config, n_view=data.frames.shape[1])
        if args.fit_deltas:
            config = fitted_deltas(config, data.both_parts()[0])
        model = EvacModel(config)
        model.first_stage_model.load_state_dict(autoencoder.state_dict())
    freeze(model, args.train)
    return model


def freeze(model: EvacModel, train: str) -> None:
    """Let only the named parts get gradients; see --train."""
    names = list(PARTS) if train == "all" else train.split("+")
    if unknown := sorted(set(names) - set(PARTS)):
        raise ConfigError(f"--train: no such part {unknown}; there are {list(PARTS)}, or all")
    model.requires_grad_(False)
    for name in names:
        getattr(model, PARTS[name]).requires_grad_(True)


def _load_autoencoder(folder: str) -> Autoencoder:
    model = model_folders.load_model(folder)
    model = model.first_stage_model if isinstance(model, EvacModel) else model
    if not isinstance(model, Autoencoder):
        raise CheckpointError(
            f"--autoencoder={folder}: expected an Autoencoder or an EvacModel, got a "
            f"{type(model).__name__}"
        )
    return model.float()
