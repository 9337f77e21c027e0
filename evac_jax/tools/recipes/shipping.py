"""Builds weights by a recipe, and ships them with a card of how they were made.

A recipe is a table of stages (see `stages`) and a `Recipe`, which says which folders are shipped.
The card of a build has the command and the time of each stage, the scores of each part, and the
hash of every file.
"""

import argparse
import os
import platform
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import logging

from evac_jax.config.world import CARD_FILE
from evac_jax.errors import CheckpointError, ConfigError
from evac_jax.files import cards
from evac_jax.files.atomic import whole_folder
from evac_jax.telemetry import report
from evac_jax.tools.command_line import Parser, refuse_existing
from evac_jax.tools.recipes import commands
from evac_jax.tools.recipes.stages import Stage, Workshop, needed_for

KEPT = (".json", ".safetensors", ".npy")  # files of a shipped folder; the rest is progress
CARD = "card.json"


@dataclass(frozen=True)
class Recipe:
    """How weights are made, and which of them are shipped.

    Attributes:
        name: of the command, "recipes.miniature".
        doc: its docstring, for --help.
        make_stages: scale of all counts, in (0, 1], and, if there is a choice, pixels -> stages;
            the last one makes `{work}/world`.
        work: default folder of the stages.
        weights: folder of the shipped weights.
        shipped: folder of the shipped weights -> folder under `{work}` that it is a copy of.
        max_bytes: of all shipped files.
        scored: more folders under `{work}` whose scores the card tells.
        pixels: sides of the pictures that it can be built for, the shipped ones first; () = one.
    """

    name: str
    doc: str | None
    make_stages: Callable[..., list[Stage]]
    work: Path
    weights: Path
    shipped: Mapping[str, str]
    max_bytes: int
    scored: Sequence[str] = ()
    pixels: Sequence[int] = ()


def scaled(
    counts: Mapping[str, int], scale: float, floors: Mapping[str, int], least: int = 4
) -> dict[str, int]:
    """Return `counts` times `scale`, each at least its floor, or `least`.

    Raises:
        ConfigError: the scale is not in (0, 1].
    """
    if not 0 < scale <= 1:
        raise ConfigError(f"--scale: expected above 0 and at most 1, got {scale}")
    return {name: max(round(n * scale), floors.get(name, least)) for name, n in counts.items()}


def machine() -> dict[str, object]:
    """Return a description of the machine of the build."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
    }


def digests(weights: Path) -> dict[str, str]:
    """Return {path: sha256} of every file of a weight folder, except for its card."""
    files = sorted(path for path in weights.rglob("*") if path.is_file())
    names = {str(path.relative_to(weights)): path for path in files}
    return {name: cards.sha256(path) for name, path in names.items() if name != CARD}


def verify(weights: Path, recipe: Recipe) -> list[str]:
    """Return the differences between the files and their card, [] if there are none.

    Raises:
        CheckpointError: there is no card.
    """
    card = cards.read(weights)
    if "files" not in card:
        raise CheckpointError(f"{weights / CARD}: missing, or not a card of {recipe.name}")
    stated, found = card["files"], digests(weights)
    problems = [f"{name}: missing" for name in stated if name not in found]
    problems += [f"{name}: not in the card" for name in found if name not in stated]
    return problems + [
        f"{name}: changed" for name in stated if name in found and stated[name] != found[name]
    ]


def assemble(recipe: Recipe, workshop: Workshop, stages: Sequence[Stage], out: Path) -> dict:
    """Copy the shipped folders into the new folder `out` with their card; return the card.

    Raises:
        ConfigError: the folders together are too large to be shipped.
    """
    with whole_folder(out, replace=True) as partial:
        sizes = _copy_shipped(recipe, workshop.work, partial)
        shutil.copy2(workshop.work / "world" / CARD_FILE, partial)  # parts lie beside it alike
        of_parts = {name: scores(cards.read(partial / name)) for name in recipe.shipped}
        others = {name: scores(cards.read(workshop.work / name)) for name in recipe.scored}
        facts = cards.card(
            machine=machine(),
            hours=round(workshop.clock() / 3600, 3),
            stages=[stage_facts(workshop, stage) for stage in stages],
            bytes=sizes,
            scores=of_parts | others,
            trust=commands.trust_figures(workshop.work / "trust"),
            files=digests(partial),
        )
        cards.write_json(partial / CARD, facts)
    return facts


def _copy_shipped(recipe: Recipe, work: Path, out: Path) -> dict[str, int]:
    """Copy the shipped files into the new folder `out`; return the bytes of each part."""
    names = recipe.shipped
    for name, source in names.items():
        (out / name).mkdir(parents=True)
        for file in sorted((work / source).iterdir()):
            if file.is_file() and file.suffix in KEPT:
                shutil.copy2(file, out / name)
    sizes = {name: sum(file.stat().st_size for file in (out / name).iterdir()) for name in names}
    if sum(sizes.values()) > recipe.max_bytes:
        raise ConfigError(
            f"the weights take {sum(sizes.values())} bytes, at most {recipe.max_bytes} may be "
            f"shipped: {sizes}; {recipe.name} says which folders are, and which sizes they have"
        )
    return sizes


def stage_facts(workshop: Workshop, stage: Stage) -> dict:
    """Return a stage's line of the card."""
    return {
        "name": stage.name,
        "seconds": round(workshop.record(stage.name)["seconds"], 1),
        "command": stage.shown,
    }


def scores(card: Mapping) -> object:
    """Return the quality figures in a tool's own card: its scores, or the end of its history."""
    return card.get("scores") or (card.get("history") or [None])[-1]


def ship(built: Path, target: Path) -> None:
    """Replace `target` by `built`; if the copy is interrupted, the old weights remain complete."""
    with whole_folder(target, replace=True) as new:
        shutil.copytree(built, new)


def parse(recipe: Recipe, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's values."""
    parser = Parser(recipe.name, recipe.doc)
    add = parser.add_argument
    add("stages", nargs="*", metavar="STAGE", help="run these alone, whose inputs are done")
    add("--until", metavar="STAGE", help="run this stage and all that it needs")
    add("--work", type=Path, default=recipe.work, help="all stages")
    add(
        "--out",
        type=Path,
        help="new folder of the weights; default: weights in --work, written anew",
    )
    add("--ship", action="store_true", help="replace the shipped weights by them")
    add("--scale", type="share_above_0", default=1.0, help="0.01 for a smoke test")
    if recipe.pixels:
        text = "side of the pictures; what is larger than the default is for a GPU"
        add("--pixels", type="count", choices=recipe.pixels, default=recipe.pixels[0], help=text)
    add("--cores", type="count", help="default: up to 2")
    add("--list", action="store_true", help="show the stages and do nothing")
    add("--verify", action="store_true", help="compare the shipped files with their card instead")
    add("--weights", type=Path, default=recipe.weights, help="of --verify")
    args = parser.parse_args(argv)
    if args.ship and args.scale != 1:
        parser.error("--ship: weights of a scaled-down build are no good; leave --scale out")
    if args.ship and recipe.pixels and args.pixels != recipe.pixels[0]:
        parser.error(f"--ship: weights for {recipe.pixels[0]} pixels are shipped; use --out")
    if bool(args.stages) + bool(args.until) + args.ship > 1:
        parser.error("expected one of --ship, which needs all stages, --until, or names of stages")
    return args


def run(recipe: Recipe, argv: Sequence[str] | None = None) -> None:
    """Run the command line of a recipe.

    Raises:
        EvacJaxError: a stage failed, or the command line asks for what cannot be.
    """
    args = parse(recipe, argv)
    logging.set_verbosity(logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the running stages as well
    if args.verify:
        if problems := verify(args.weights, recipe):
            sys.exit("\n".join([f"{args.weights} differs from its card:", *problems]))
        report.show(f"{args.weights}: every file is the one in its card")
        return
    stages = recipe.make_stages(args.scale, *([args.pixels] if recipe.pixels else []))
    chosen = needed_for(stages, [args.until]) if args.until else set(args.stages)
    if args.list:
        shown = [stage for stage in stages if not chosen or stage.name in chosen]
        report.show("\n".join(f"{stage.name}: {stage.shown}" for stage in shown))
        return
    if args.out:
        refuse_existing(args.out)
    workshop = Workshop(args.work, args.cores)
    if chosen:
        workshop.run(stages, chosen)
        done = [stage_facts(workshop, stage) for stage in stages if stage.name in chosen]
        report.show("\n".join(f"{s['seconds'] / 60:8.1f} min  {s['name']}" for s in done))
        return
    workshop.run(stages)
    out = (args.out or workshop.work / "weights").absolute()
    facts = assemble(recipe, workshop, stages, out)
    if args.ship:
        ship(out, recipe.weights)
    slowest = sorted(facts["stages"], key=lambda stage: -stage["seconds"])
    report.show("\n".join(f"{s['seconds'] / 60:8.1f} min  {s['name']}" for s in slowest))
    report.show(f"hours={facts['hours']:.2f} bytes={sum(facts['bytes'].values())} weights={out}")
