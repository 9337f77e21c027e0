"""The model card of an exported policy: README.md as the Hugging Face Hub wants it.

Only what is known stands in it. A licence or a base that nobody told is called unknown, a policy
that was not evaluated is called so, and folders of this machine are named without their path.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub as hf
from absl import logging

from evac_jax.config import hub, import_string
from evac_jax.telemetry.report import Outcome, wilson_interval

UNKNOWN = "unknown"
# Of the start policy's own card; a licence that the Hub does not know has a name and a link.
LICENSE_FIELDS = ("license", "license_name", "license_link")


@dataclasses.dataclass(frozen=True)
class Told:
    """What the user says of a policy; "" and () = what the start policy's own card says.

    Attributes:
        license: as the Hub knows it, such as "apache-2.0".
        base: "OWNER/NAME" on the Hub of the policy from which it was trained.
        datasets: "OWNER/NAME" on the Hub of the data.
    """

    license: str = ""
    base: str = ""
    datasets: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Story:
    """How the policy came to be.

    Attributes:
        start: folder of the policy from which it was trained, or that is exported again.
        card: of the exported folder, see `cards.card`.
        adapter: only LoRA adapters are exported.
        saved: configuration of the run, {} if there is none.
        iteration: of the run.
        before, after: successes of the start policy and of this one, {} = not evaluated.
        chosen: this iteration was chosen by its success in the ground truth.
    """

    start: Path
    card: Mapping[str, Any]
    adapter: bool = False
    saved: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    iteration: int = 0
    before: Outcome = dataclasses.field(default_factory=dict)
    after: Outcome = dataclasses.field(default_factory=dict)
    chosen: bool = False


def text(name: str, story: Story, told: Told) -> str:
    """Return the README.md of a policy called `name`."""
    data = _metadata(story, told)
    body = [f"# {name}", *_origin(story), *_success(story), *_terms(data, told), *_command(story)]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"


def _metadata(story: Story, told: Told) -> hf.ModelCardData:
    own = _of_start(story.start)
    address = hub.address_of(str(story.start))
    at_hub = hub.parse(address).repo if hub.is_address(address) else ""
    base = told.base or at_hub or own.get("base_model") or None
    terms: dict[str, Any] = {"license": told.license} if told.license else {}
    terms = terms or {k: own[k] for k in LICENSE_FIELDS if own.get(k)} or {"license": UNKNOWN}
    if terms["license"] == UNKNOWN:
        logging.warning(
            "the model card says that the licence is unknown; "
            "`python -m evac_jax.tools.policy.export --license NAME` sets it"
        )
    algorithm = [str(story.saved["algorithm"]).rpartition(":")[2].lower()] if story.saved else []
    return hf.ModelCardData(
        **terms,
        base_model=base,
        base_model_relation=("adapter" if story.adapter else "finetune") if base else None,
        library_name="peft" if story.adapter else "transformers",
        pipeline_tag="robotics",
        datasets=list(told.datasets) or own.get("datasets"),
        tags=[
            *("robotics", "vision-language-action", "openvla-oft", "evac_jax"),
            *(["reinforcement-learning", *algorithm] if story.saved else []),
        ],
    )


def _of_start(folder: Path) -> dict[str, Any]:
    """Return what the model card of the start policy says, {} if it has none that can be read."""
    file = folder / "README.md"
    if not file.is_file():
        return {}
    try:
        return hf.ModelCard(file.read_text()).data.to_dict()
    except Exception as error:  # whatever YAML and the library raise
        logging.warning("%s: the model card cannot be read, so it tells nothing: %s", file, error)
        return {}


def _name(path: str) -> str:
    """Return a path's address on the Hub, or else the name of its last folder."""
    addresses = (hub.address_of(part) for part in path.split(","))
    return ", ".join(a if hub.is_address(a) else Path(a).name for a in addresses) or "none"


def _origin(story: Story) -> list[str]:
    start = f"`{_name(str(story.start))}`"
    if not story.saved:
        return [f"An OpenVLA-OFT policy, exported from {start} by evac_jax. It was not trained."]
    saved, what = story.saved, "LoRA adapters of an OpenVLA-OFT policy" if story.adapter else ""
    env, world, reward = (saved[key] for key in ("env", "world_model", "reward"))
    where = f"the ground truth `{saved['eval']['ground_truth']}`"
    if env["simulator"] == "world_model":
        judge = reward.get("judge", "classifier")
        judge = judge if import_string.is_one(judge) else _name(reward["checkpoint"])
        where = f"the world model `{_name(world['checkpoint'])}`, judged by `{judge}`"
    first = f"`{env['initial_states']}`"
    if env.get("initial_states_path"):
        first += f" (`{_name(env['initial_states_path'])}`)"
    return [
        f"{what or 'An OpenVLA-OFT policy'}, trained from {start} by reinforcement learning with "
        f"evac_jax: {story.iteration} iterations of `{saved['algorithm']}` in {where}, start "
        f"states {first}, seed {saved['seed']}."
    ]


def _success(story: Story) -> list[str]:
    lines = ["## Success"]
    if not story.after:
        return [*lines, "This policy was not evaluated."]
    places = list(dict.fromkeys((*story.before, *story.after)))
    rows = ["| | start policy | this policy |", "| --- | --- | --- |"]
    for place in places:
        cells = [_cell(outcome.get(place)) for outcome in (story.before, story.after)]
        rows.append(f"| {place.replace('_', ' ')} | {' | '.join(cells)} |")
    lines += ["\n".join(rows), "Episodes that succeed, with Wilson's 95 % interval."]
    if "imagined" in places:
        lines.append("*Imagined*: in the world model, which does not prove success in reality.")
    if "ground_truth" in story.after:
        truth = story.saved["eval"]["ground_truth"]
        temperature = story.saved["policy"]["eval_temperature"]
        lines.append(f"*Ground truth*: `{truth}`; actions at temperature {temperature}.")
    if story.chosen:
        lines.append(
            "This iteration was chosen because its success in the ground truth is the best of the "
            "run, so that figure is optimistic."
        )
    return lines


def _cell(outcome: Sequence[int] | None) -> str:
    if outcome is None or not outcome[1]:
        return "not evaluated"
    successes, n = outcome
    low, high = wilson_interval(successes, n)
    return f"{successes / n:.1%} [{low:.1%}, {high:.1%}], n = {n}"


def _terms(data: hf.ModelCardData, told: Told) -> list[str]:
    source = "as the exporter says" if told.license else "as the card of the start policy says"
    license_line = f"Licence: {data.license}, {source}."
    if data.license == UNKNOWN:
        license_line = (
            "Licence: unknown. Ask the owner of the start policy and of the world model before you "
            "use it."
        )
    base = f"Base: `{data.base_model}`." if data.base_model else "Base on the Hub: unknown."
    more = "The terms of the world model and of the data that it was trained on may apply as well."
    return ["## Licence and base", license_line, base, more]


def _command(story: Story) -> list[str]:
    versions = ", ".join(f"{k} {v}" for k, v in story.card["versions"].items())
    settings = {k: story.saved[k] for k in ("algo", "optim")} if story.saved else {}
    lines = ["## How it was made", f"Exported by\n\n```\n{story.card['command']}\n```", versions]
    if settings:
        lines.append(f"Settings of the training:\n\n```json\n{json.dumps(settings, indent=2)}\n```")
    return lines
