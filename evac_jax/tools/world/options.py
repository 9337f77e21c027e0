"""The command line of `world.pack`."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from evac_jax.config.libero import MAX_STEPS
from evac_jax.config.world import PARTS, STARTS
from evac_jax.tools.command_line import Parser

# Option -> what it says; also shown where it is missing.
HELP = {
    "horizon": "actions of an episode, a multiple of the chunk",
    "ground_truth": "miniature, libero or none: where policies are evaluated for real",
    "gripper": "what the policy's gripper entry means, as env.gripper",
    "unnorm_key": "name of the policy's action statistics",
    "keep_stop_token": "yes or no, as policy.keep_stop_token",
    "success_frames": "frames in a row that make a success, as the classifier was calibrated",
    "judged_frames": "last frames of a chunk that it judges, 0 = all",
    "threshold": "probability from which on a frame is a success",
    "steps": "denoising steps, as the classifier's imagined episodes had",
    "eta": "noise of the steps, 0 to 1",
    "solver": "of the steps; default: ddim",
    "prompt_length": "tokens that prompts are padded to; default: those of the longest",
    "temperature": "at which the policy is sampled; default: 1",
    "suite": "of LIBERO",
    "tasks": "LIBERO's that can be played, as libero.tasks, with commas; default: all",
    "extra_states": "yes or no, as libero.extra_states; default: no",
    "crop": "left, right, top and bottom end of what frames show, with commas",
    "oversample": "as libero.oversample",
    "reflections": "yes or no, as libero.reflections",
    "action_repeat": "how often each action is played",
    "train_starts": "LOW,HIGH: start ids for training",
    "eval_starts": "LOW,HIGH: start ids for evaluation, apart from those",
}


def _numbers(kind: type, count: int | None = None) -> Callable[[str], tuple]:
    def numbers(text: str) -> tuple:
        values = tuple(map(kind, text.split(",")))
        if count is not None and len(values) != count:
            raise argparse.ArgumentTypeError(f"expected {count} numbers with commas, got {text!r}")
        return values

    return numbers


def add_options(made: Parser) -> None:
    """Add all options."""
    add = made.add_argument
    for part in ("--world_model", "--reward", "--pose_model", "--policy"):
        add(part, metavar="DIR", help="folder of this part")
    add("--starts", nargs="+", metavar="DIR", help="recordings, or a folder of start frames")
    add("--base", metavar="WORLD", help="world that has what is not given")
    add("--out", required=True, metavar="WORLD", help="new folder")
    add("--link", action="store_true", help="hard-link files instead of copying them")

    def told(option: str, **how: Any) -> None:
        add(option, help=HELP[option.removeprefix("--")], **how)

    told("--horizon", type=int)
    told("--ground_truth", choices=("miniature", "libero", "none"))
    told("--train_starts", type=_numbers(int, 2))
    told("--eval_starts", type=_numbers(int, 2))
    told("--temperature", type=float)
    told("--prompt_length", type=int)
    group = made.add_argument_group("only where the parts' own files do not tell")
    add = group.add_argument
    told("--gripper", choices=("libero", "binary", "none"))
    told("--unnorm_key")
    told("--keep_stop_token", choices=("yes", "no"))
    told("--success_frames", type=int)
    told("--judged_frames", type=int)
    told("--threshold", type=float)
    told("--steps", type=int)
    told("--eta", type=float)
    told("--solver", choices=("ddim", "dpm++", "unipc"))
    told("--suite", choices=MAX_STEPS)
    told("--tasks", type=_numbers(int))
    told("--extra_states", choices=("yes", "no"))
    told("--crop", type=_numbers(float, 4))
    told("--oversample", type=int)
    told("--reflections", choices=("yes", "no"))
    told("--action_repeat", type=int)


def parse(command_line: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the checked arguments; exits with a message if parts are missing.

    Args:
        command_line: gets the options.
        argv: the command line; None = this process's.
    """
    add_options(command_line)
    args = command_line.parse_args(argv)
    missing = [f"--{part}" for part in (*PARTS, STARTS) if not getattr(args, part)]
    if missing and not args.base:
        command_line.error(f"{', '.join(missing)}: needed, or --base, a world that has them")
    for switch in ("keep_stop_token", "extra_states", "reflections"):
        if text := getattr(args, switch):
            setattr(args, switch, text == "yes")
    return args
