r"""Writes a policy as a Hugging Face folder that any run, and the public tools, can start from.

    python launch.py --mode=export --config=configs/grpo.py \
        --config.policy.checkpoint=SOURCE --export_dir=OUT
    python -m evac_jax.tools.policy.export --run SOURCE --out OUT [--adapter] [--dtype float32]

SOURCE is a run, one of its checkpoints (RUN/checkpoints/40) or a Hugging Face folder. No simulator
is started, and only the parameters of a checkpoint are read. Keys, files and dtypes are those of
the folder from which the policy started. LoRA adapters are merged; --adapter writes only the
adapters, in PEFT's layout. README.md is the model card, so the folder can be shared as it is:

    hf upload OWNER/NAME OUT
"""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
from absl import logging
from flax import nnx

from evac_jax import checkpoint
from evac_jax.config import hub
from evac_jax.config.schema import PolicyConfig, TrainConfig
from evac_jax.errors import CheckpointError
from evac_jax.files import cards, claim
from evac_jax.policy_import import import_policy, told_as_checkpoint_error
from evac_jax.telemetry import report
from evac_jax.tools.command_line import Parser, number, run_tool
from evac_jax.tools.policy import model_card
from policies.base import Tokenizer
from policies.openvla_oft.checkpoint_files import CheckpointFiles, read_json
from policies.openvla_oft.export_hf import export_policy
from policies.openvla_oft.import_hf import load_config
from policies.openvla_oft.model import OpenVLAOFT
from policies.openvla_oft.peft import find_adapter, save_adapter
from policies.ranges import Range

FOLDERS = ("checkpoint", "lora_adapter")  # of the policy; those may lie on the Hugging Face Hub
NOTHING_TOLD = model_card.Told()
VALUE_OUTPUTS = "params/value_head/fc3/kernel"


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a training run that an export needs; files of its simulators may be missing.

    Attributes:
        policy: the start policy and how it was imported.
        folder: of the run.
        checkpoints: folder of the run's checkpoints.
        step: iteration; -1 = the newest, 0 = the start policy.
        saved: its whole configuration, as its config.json says.
        facts: how it was trained and how it is read, for the data card.
    """

    policy: PolicyConfig
    folder: Path
    checkpoints: Path
    step: int
    seed: int
    saved: dict[str, Any]
    facts: dict[str, Any]


def find_run(source: Path, step: int = -1) -> Run | None:
    """Return the run at `source`, or the run of the checkpoint there; None for a policy folder.

    Args:
        source: RUN, RUN/checkpoints, RUN/checkpoints/<iteration> or a Hugging Face folder.
        step: iteration, unless `source` names it.

    Raises:
        CheckpointError: `source` is none of these.
    """
    folder = source
    if source.name.isdigit() and source.parent.name == "checkpoints":
        folder, step = source.parent, int(source.name)
    if folder.name == "checkpoints":
        folder = folder.parent
    with told_as_checkpoint_error(str(source)):
        values = read_json(folder / checkpoint.CONFIG_FILE)
        adapter = find_adapter(folder)
    if values is None and not adapter:
        raise CheckpointError(
            f"{source}: expected a run, a checkpoint of a run (RUN/checkpoints/N) or a Hugging "
            f"Face folder; {folder / checkpoint.CONFIG_FILE} is not there"
        )
    if values is None or not {"algorithm", "policy", "checkpoint"} <= set(values):
        return None  # the import refuses an adapter, with the base that it names
    known = {field.name for field in dataclasses.fields(PolicyConfig)}
    policy = {k: v for k, v in values["policy"].items() if k in known}
    policy |= {name: hub.local(policy[name]) for name in FOLDERS if policy.get(name)}
    return Run(
        policy=PolicyConfig(**policy),
        folder=folder,
        checkpoints=Path(values["checkpoint"].get("dir") or folder / "checkpoints"),
        step=step,
        seed=values["seed"],
        saved=values,
        facts={
            "algorithm": values["algorithm"],
            "seed": values["seed"],
            "simulator": values["env"]["simulator"],
            "gripper": values["env"].get("gripper"),
            "unnorm_key": policy.get("unnorm_key"),
            "keep_stop_token": policy.get("keep_stop_token"),
        },
    )


def trained_policy(run: Run, **options: Any) -> tuple[OpenVLAOFT, Tokenizer, int]:
    """Return the policy of a run at an iteration, its tokenizer, and that iteration.

    Args:
        options: further arguments of the loader.

    Raises:
        CheckpointError: no such checkpoint, or its parameters are not those of the start policy.
    """
    if run.step == 0:
        return *_imported(run.policy, seed=run.seed, **options), 0
    checkpoints = checkpoint.Checkpoints(run.checkpoints, keep=None)
    iteration = checkpoints.existing(run.step)
    if run.policy.value_head == "action_level":
        # One output per action of the simulator's chunk, whose length only the checkpoint shows.
        outputs = checkpoints.shapes(iteration).get(VALUE_OUTPUTS)
        options |= {"chunk": outputs.shape[-1]} if outputs else {}
    model, tokenizer = _imported(run.policy, seed=run.seed, **options)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    # The trained parameters are read next; without this they would be in memory twice.
    del model, params
    params = checkpoints.restore_part(iteration, "params", shapes)
    return nnx.merge(graphdef, params, rest), tokenizer, iteration


def stored_model(folder: Path, lora_adapter: str = "") -> OpenVLAOFT:
    """Return the policy of a Hugging Face folder, in a dtype that does not round its weights.

    Args:
        lora_adapter: PEFT folder to merge, "" = none.

    Raises:
        CheckpointError: it cannot be imported.
    """
    with told_as_checkpoint_error("policy to export"):
        published = load_config(folder)  # refuses another kind of folder
        dtypes = {entry.dtype for entry in CheckpointFiles(folder).entries.values()}
    dtype = "bfloat16" if dtypes == {"BF16"} else "float32"
    policy = PolicyConfig(
        checkpoint=str(folder),
        param_dtype=dtype,
        lora_adapter=lora_adapter,
        keep_stop_token=published.keep_stop_token,
    )
    return _imported(policy, seed=0, acts=False)[0]


def _imported(policy: PolicyConfig, *, seed: int, **more: Any) -> tuple[OpenVLAOFT, Tokenizer]:
    loaded = import_policy(policy, seed=seed, **more)
    assert isinstance(loaded.model, OpenVLAOFT), type(loaded.model)  # what can be exported
    return loaded.model, loaded.tokenizer


def export(
    source: Path,
    out: Path,
    *,
    step: int = -1,
    adapter: bool = False,
    dtype: str | None = None,
    lora_adapter: str = "",
    chosen: bool = False,
    told: model_card.Told = NOTHING_TOLD,
) -> None:
    """Write the policy of `source` to the new folder `out`, complete or not at all.

    Args:
        source, step: see `find_run`.
        adapter: write only the adapters of a LoRA run.
        dtype: "float32" or "bfloat16"; None = as the start policy's folder has each tensor.
        lora_adapter: adapter to merge into a Hugging Face folder.
        chosen: `step` was chosen by its success in the ground truth.
        told: what the model card says besides what is known here.

    Raises:
        CheckpointError: there is nothing to export, it is damaged, `out` exists, or it cannot be
            made.
        StorageError: the disk takes no more.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists already; remove it or name another export folder")
    with told_as_checkpoint_error(f"cannot write the new folder {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=out.parent, prefix=".").cleanup()  # before weights are read
    run = find_run(source, step)
    start = Path(run.policy.checkpoint) if run else source
    facts: dict[str, Any] = {"start": cards.read(start)}
    if hub.is_address(address := hub.address_of(str(start))):
        facts["start"]["address"] = address
    if run:
        model, _, iteration = trained_policy(run)
        facts |= run.facts | {"iteration": iteration}
    else:
        model = stored_model(source, lora_adapter)
    card = cards.card(**facts)
    story = model_card.Story(start, card, adapter)
    if run:
        story = dataclasses.replace(
            story,
            saved=run.saved,
            iteration=facts["iteration"],
            before=report.evaluated(run.folder, 0),
            after=report.evaluated(run.folder, facts["iteration"]),
            chosen=chosen,
        )
    readme = model_card.text(out.name, story, told)
    with told_as_checkpoint_error(f"cannot export {source}"), claim.told_as_storage_error(out):
        if adapter:
            save_adapter(model, out, base=start)
            cards.write_json(out / "card.json", card)
            (out / "README.md").write_text(readme)
        else:
            extra = {"card.json": (json.dumps(card, indent=2) + "\n").encode()}
            extra["README.md"] = readme.encode()
            export_policy(model, out, source=start, like_source=True, dtype=dtype, extra=extra)
    if run and not facts["iteration"]:
        logging.warning("%s: iteration 0 is the start policy, untrained", source)
    at = f" at iteration {facts['iteration']}" if run else ""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    logging.info("%s%s, %d parameters -> %s", source, at, parameters, out)


def run(config: TrainConfig, export_dir: str) -> None:
    """Export `config.policy.checkpoint`, of a run `checkpoint.step`, for launch.py."""
    policy = config.policy
    out = Path(export_dir).expanduser()
    step = config.checkpoint.step
    export(Path(policy.checkpoint), out, step=step, lora_adapter=policy.lora_adapter)


def main() -> None:
    """Command line."""
    parser = Parser("policy.export", __doc__)
    parser.add_argument("--run", required=True, type=Path, help="run, checkpoint or HF folder")
    parser.add_argument(
        "--step", type=number(int, Range(-1)), default=-1, help="iteration; -1 = the newest"
    )
    parser.add_argument(
        "--best", action="store_true", help="the iteration with the best ground-truth success"
    )
    parser.add_argument("--out", required=True, type=Path, help="new folder")
    parser.add_argument("--adapter", action="store_true", help="LoRA adapters alone, as PEFT does")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: as the start policy's folder"
    )
    parser.add_argument(
        "--license", default="", help='for the model card; "" = as the start policy\'s card says'
    )
    parser.add_argument(
        "--base", default="", help='OWNER/NAME on the Hub of the start policy; "" = as it is known'
    )
    parser.add_argument(
        "--datasets", nargs="*", default=(), help="OWNER/NAME on the Hub of the data"
    )
    args = parser.parse_args()
    logging.set_verbosity(logging.INFO)
    told = model_card.Told(args.license, args.base, tuple(args.datasets))
    step = report.best_iteration(args.run) if args.best else args.step
    export(
        args.run,
        args.out,
        step=step,
        adapter=args.adapter,
        dtype=args.dtype,
        chosen=args.best,
        told=told,
    )


if __name__ == "__main__":
    run_tool(main)
