"""Gets the published files of a run in EVAC, imports them, and prints the command that trains.

    python -m evac_jax.tools.hub.fetch libero_spatial --out weights
    ... --policy libero_90                     # the other start policy that RLinf's guide names
    ... --data hf://datasets/ME/MIRROR --policy hf://ME/POLICY@v2

Files are downloaded into the cache of huggingface_hub (HF_HOME) and recognised by their keys, not
by their names. World model, success classifier and action predictor become folders below --out;
policy and start frames stay in the cache. What is imported already is not imported again, so after
an interruption the same command goes on. See docs/from_rlinf.md.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import logging

from evac_jax.config import hub
from evac_jax.errors import CheckpointError, ConfigError, DataError
from evac_jax.evac.weight_files import find_file, read_weights
from evac_jax.files import cards
from evac_jax.files.start_frames import episode_files
from evac_jax.sim.initial_states import NpyStarts
from evac_jax.telemetry.reading import ReadProgress
from evac_jax.tools.command_line import Parser, run_tool
from evac_jax.tools.hub.launch_command import launch_command
from evac_jax.tools.world_model import import_evac
from policies.openvla_oft.import_hf import read_norm_stats


@dataclass(frozen=True)
class Recipe:
    """Where the files of a published run are.

    Attributes:
        preset: of launch.py.
        data: repository with the weights of the world model, the classifier and the action
            predictor, and with start frames.
        open_clip: file of the image tower, for a world model without its own.
        policies: name -> repository of a start policy; the first one is the default.
        suites: datasets whose action statistics fit, best first.
        named: kind -> name that the run's own configuration gives, where several files are of a
            kind.
    """

    preset: str
    data: str
    open_clip: str
    policies: Mapping[str, str]
    suites: tuple[str, ...]
    named: Mapping[str, str]


STARTS = "starts"
# Source: RLinf's guide to EVAC (docs/source-zh/rst_source/examples/world_model_simulator.rst), and
# for the names env/train/libero_spatial_evac.yaml (c9f1d8471). LIBERO-130 has the tasks of
# libero_spatial, LIBERO-90 has not.
RECIPES = {
    "libero_spatial": Recipe(
        preset="configs/grpo.py:libero_spatial",
        data="hf://datasets/jzndd/evac_for_rlinf",
        open_clip="hf://laion/CLIP-ViT-H-14-laion2B-s32B-b79K/open_clip_pytorch_model.bin",
        policies={
            "libero_130": "hf://RLinf/RLinf-OpenVLAOFT-LIBERO-130-Base-Lora",
            "libero_90": "hf://RLinf/RLinf-OpenVLAOFT-LIBERO-90-Base-Lora",
        },
        suites=("libero_spatial", "libero_130", "libero_90"),
        named={
            "evac": "epoch=281-step=34800.ckpt",
            "reward": "750.pth",
            "pose_model": "best_model.pth",
            STARTS: "world_model_buffer",
        },
    )
}
SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
# Kind of `import_evac` -> folder below --out, and field of the configuration.
IMPORTED = {
    "evac": ("world_model", "world_model.checkpoint"),
    "reward": ("reward", "reward.checkpoint"),
    "pose_model": ("pose_model", "env.pose_model"),
}


def recognised(folder: Path) -> tuple[dict[str, list[Path]], dict[Path, str]]:
    """Return {kind: its files or folders} of what is in a folder, and {file: why it is of no use}.

    Kinds are those of `import_evac` and "starts".
    """
    found: dict[str, list[Path]] = {kind: [] for kind in (*IMPORTED, STARTS)}
    others: dict[Path, str] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix in SUFFIXES and file.is_file():
            try:
                found[import_evac.kind_of(read_weights(file), file.name)].append(file)
            except CheckpointError as error:
                others[file] = str(error).splitlines()[0]
    for place in sorted({file.parent for file in folder.rglob("*.npy")}):
        try:
            if episode_files(place):
                starts = NpyStarts(str(place))
                logging.info("%d start frames in %s", starts.num_starts, place)
                found[STARTS].append(place)
        except DataError as error:
            others[place] = " ".join(str(error).splitlines()[:2])
    return found, others


def chosen(
    found: Mapping[str, list[Path]],
    folder: Path,
    named: Mapping[str, str],
    given: Mapping[str, str],
) -> tuple[dict[str, Path], list[str]]:
    """Return {kind: file or folder}, and one line for each kind that is missing or not clear.

    Args:
        found: see `recognised`.
        folder: that was looked through.
        named: kind -> usual name, which decides between several.
        given: kind -> path below `folder` that the user names.
    """
    result, problems = {}, []
    for kind, paths in found.items():
        usual = [path for path in paths if path.name == named.get(kind)]
        wanted = [path for path in paths if path == folder / given.get(kind, "")]
        several = wanted if given.get(kind) else paths if len(paths) == 1 else usual
        if len(several) == 1:
            result[kind] = several[0]
            if len(paths) > 1:
                logging.info("%s: %s, of %d that would do", kind, several[0], len(paths))
            continue
        names = [str(path.relative_to(folder)) for path in paths]
        if given.get(kind):
            what = f"expected one of {names}, got {given[kind]!r}"
        else:
            what = f"{len(names)} would do, {names}; choose one" if names else "none found"
        problems.append(f"--{kind}: {what}")
    return result, problems


def import_weights(
    source: Path, out: Path, *, open_clip: str = "", config_file: str | None = None
) -> None:
    """Import a weight file into the folder `out`, unless it is there already.

    Args:
        open_clip: address or file of the image tower, used if a world model has none.
        config_file: sizes of a world model that is not a published one.

    Raises:
        CheckpointError: it cannot be imported, or `out` was made from another file.
        DataError: the image tower cannot be had.
    """
    if out.exists():
        made_from = [entry["sha256"] for entry in cards.read(out).get("sources", ())]
        if made_from[:1] != [cards.sha256(find_file(source))]:
            raise CheckpointError(
                f"{out} exists and was not made from {source}; remove it or choose another --out"
            )
        logging.info("%s is there already", out)
        return
    state = read_weights(source)
    is_evac = import_evac.kind_of(state, str(source)) == "evac"
    has_tower = any(key.startswith(f"{import_evac.TOWER}visual.") for key in state)
    del state
    tower = hub.local(open_clip) if is_evac and not has_tower and open_clip else None
    with ReadProgress(source.name) as progress:
        import_evac.convert(
            source,
            out,
            open_clip=tower,
            config_file=config_file if is_evac else None,
            progress=progress,
        )
    logging.info("%s -> %s", source.name, out)


def statistics_key(folder: Path, suites: Sequence[str]) -> str:
    """Return the key of the action statistics that fit best in a policy folder.

    Raises:
        DataError: the folder is no whole policy, or its statistics fit none of `suites`.
    """
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise DataError(
            f"--policy: {hub.address_of(str(folder))} is a PEFT adapter without its base; give the "
            "base to --policy, and add --config.policy.lora_adapter=ADAPTER to the command"
        )
    try:
        keys = sorted(read_norm_stats(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"--policy: {error}") from error
    for suite in suites:
        fitting = [key for key in keys if key == suite or key.startswith(f"{suite}_")]
        if len(fitting) == 1 or suite in fitting:
            return suite if suite in fitting else fitting[0]
    if len(keys) == 1:
        return keys[0]
    raise DataError(
        f"--policy: {folder} has action statistics of {keys}, and it is not clear which are meant; "
        "set --config.policy.unnorm_key in the command of launch.py yourself"
    )


def fetch(
    recipe: Recipe,
    out: Path,
    *,
    policy: str,
    data: str,
    given: Mapping[str, str],
    config_file: str | None = None,
) -> str:
    """Download and import what a recipe names; return the command that trains with it.

    Args:
        out: folder for what is imported.
        policy, data: addresses or folders, in the place of the recipe's.
        given: kind -> path in `data`, where several files are of that kind.
        config_file: sizes of a world model that is not a published one.

    Raises:
        DataError: something cannot be had, or is not what is needed.
        CheckpointError: a weight file cannot be imported.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"--out: expected a folder, got the file {out}; name another")
    folder = Path(hub.local(data)).absolute()
    found, others = recognised(folder)
    files, problems = chosen(found, folder, recipe.named, given)
    if problems:
        seen = [f"  {path.relative_to(folder)}: {why}" for path, why in others.items()]
        raise DataError("\n".join([f"{data} has not all that is needed:", *problems, *seen]))
    values = {}
    for kind, (name, field) in IMPORTED.items():
        sizes = {"open_clip": recipe.open_clip, "config_file": config_file}
        import_weights(files[kind], out / name, **sizes)
        values[field] = str(out / name)
    weights = Path(hub.local(policy)).absolute()
    values["policy.checkpoint"] = hub.address_of(str(weights))
    values["policy.unnorm_key"] = statistics_key(weights, recipe.suites)
    values["env.initial_states_path"] = hub.address_of(str(files[STARTS]))
    return launch_command(recipe.preset, values)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser("hub.fetch", __doc__)
    add = parser.add_argument
    add("recipe", choices=RECIPES, help="which published run")
    add("--out", required=True, type=Path, help="folder for what is imported")
    names = "; ".join(f"{name}: {' '.join(r.policies)}" for name, r in RECIPES.items())
    add("--policy", help=f"name ({names}), address or folder; left out, the first one")
    add("--data", help="address or folder of weights and start frames, instead of the published")
    add("--config", help="JSON file of the world model's sizes, if it is not the published one")
    for kind in (*IMPORTED, STARTS):
        add(f"--{kind}", default="", help=f"path in the data, if several are {kind}")
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.INFO)
    recipe = RECIPES[args.recipe]
    policy = args.policy or next(iter(recipe.policies))
    if not hub.is_address(policy) and not Path(policy).exists():
        if policy not in recipe.policies:
            raise ConfigError(f"--policy: expected {', '.join(recipe.policies)}, or an address")
        policy = recipe.policies[policy]
    command = fetch(
        recipe,
        args.out,
        policy=policy,
        data=args.data or recipe.data,
        given={kind: getattr(args, kind) for kind in (*IMPORTED, STARTS)},
        config_file=args.config,
    )
    sys.stdout.write(f"Train with\n\n{command}\n")


if __name__ == "__main__":
    run_tool(main)
