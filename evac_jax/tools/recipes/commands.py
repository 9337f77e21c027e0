"""Command lines that several recipes need; `{work}` has the meaning as in `stages.Stage`."""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path

from evac_jax.config.flags import read_preset
from evac_jax.files import cards
from evac_jax.tools.recipes.stages import ROOT

SELECTION = (1_000_000, 2_000_000)  # scenes of the miniature on which choices are made
REPORT = (2_000_000, 3_000_000)  # scenes of the reported figures
TRUST_FILE = "report.json"
# Option of the tools that imagine -> field of the configuration.
IMAGINATION = {
    "world_model": "world_model.checkpoint",
    "reward": "reward.checkpoint",
    "pose_model": "env.pose_model",
    "threshold": "reward.threshold",
    "success_frames": "reward.success_frames",
    "judged_frames": "reward.judged_frames",
    "steps": "world_model.steps",
    "eta": "world_model.eta",
}
# Option of world.pack -> field of the configuration.
PACKED = IMAGINATION | {
    "policy": "policy.checkpoint",
    "solver": "world_model.solver",
    "unnorm_key": "policy.unnorm_key",
    "prompt_length": "policy.max_prompt_length",
    "temperature": "policy.temperature",
    "keep_stop_token": "policy.keep_stop_token",
    "gripper": "env.gripper",
    "horizon": "env.max_episode_steps",
    "train_starts": "env.train_starts",
    "eval_starts": "eval.starts",
    "ground_truth": "eval.ground_truth",
}
PACKED_OF_LIBERO = {
    option: f"libero.{option}"
    for option in (
        *("suite", "tasks", "extra_states"),
        *("crop", "oversample", "reflections", "action_repeat"),
    )
}


def launch(
    config: str, folder: str, run: str, settings: Mapping[str, object], mode: str = "train"
) -> tuple[str, ...]:
    """launch.py with `settings` as flags; it writes to `folder`/`run`."""
    settings = {"log.dir": folder, "log.run": run, "video.save": False} | dict(settings)
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    return "launch.py", f"--config={config}", f"--mode={mode}", *flags


def train(
    config: str, folder: str, run: str, settings: Mapping[str, object], interval: int
) -> tuple[str, ...]:
    """A run that keeps a checkpoint of every evaluation, so that the best one can be used.

    Begun before and interrupted, it goes on; its stage should say so (`Stage.resumes`).
    """
    kept = {
        "eval.interval": interval,
        "checkpoint.interval": interval,
        "checkpoint.keep": 1_000_000,
        "checkpoint.restore": "auto",
    }
    return launch(config, folder, run, kept | dict(settings))


def evaluate(
    config: str, folder: str, run: str, settings: Mapping[str, object], scenes: int
) -> tuple[str, ...]:
    """Greedy success in the ground truth; nothing is imagined and no world model is started."""
    alone = {
        "env.simulator": "ground_truth",
        "eval.episodes": 0,
        "eval.twin_fraction": 0.0,
        "eval.ground_truth_episodes": scenes,
        "policy.eval_temperature": 0.0,
    }
    return launch(config, folder, run, alone | dict(settings), mode="eval")


def export(run: str, out: str, *, best: bool = True, dtype: str = "") -> tuple[str, ...]:
    """The policy of a run's best or last evaluation, as a folder."""
    command = ["-m", "evac_jax.tools.policy.export", f"--run={run}", f"--out={out}"]
    return (*command, *["--best"] * best, *[f"--dtype={dtype}"] * bool(dtype))


def store(source: str, out: str, dtype: str) -> tuple[str, ...]:
    """A folder of weights in half precision."""
    return tool("store_as", source=source, out=out, dtype=dtype)


def tool(name: str, *, data: Sequence[str] = (), **settings: object) -> tuple[str, ...]:
    """`python -m evac_jax.tools.NAME --data A B --option value ...`."""
    recordings = ("--data", *data) if data else ()
    return ("-m", f"evac_jax.tools.{name}", *recordings, *options(**settings))


def on_both_cores(command: Sequence[str]) -> tuple[str, ...]:
    """The same tool in two processes that train one model.

    Behind `--`, because torchrun takes the tool's `--start` for an abbreviation of its own option.
    """
    module, *rest = command[1:]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    return (*torchrun, "-m", "--", module, *rest)


def options(**settings: object) -> tuple[str, ...]:
    """`--option value ...`."""
    return tuple(str(part) for name, value in settings.items() for part in (f"--{name}", value))


def record(out: str, mix: str, episodes: int, seed: int) -> tuple[str, ...]:
    """Episodes of scripted players of the miniature."""
    return tool("episodes.collect", out=out, episodes=episodes, mix=mix, seed=seed)


def record_policy(
    config: str, settings: Mapping[str, object], policy: str, out: str, episodes: int, seed: int
) -> tuple[str, ...]:
    """Episodes of a policy in the ground truth: half sampled as in training, half greedy."""
    temperature = value_of(config, settings, "policy.temperature")
    mix = f"policy:{policy}@{temperature}=0.5,policy:{policy}@0=0.5"
    return record(out, mix, episodes, seed)


def record_libero(
    config: str, settings: Mapping[str, object], out: str, mix: str, episodes: int, seed: int
) -> tuple[str, ...]:
    """Episodes of players of LIBERO; `settings` say which, how it is drawn, and the start ids."""
    alone = {"env.simulator": "ground_truth", "eval.episodes": 0, "eval.ground_truth": "libero"}
    wanted = {"collect.out": out, "collect.episodes": episodes, "collect.mix": mix, "seed": seed}
    values = alone | dict(settings) | wanted
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    return "launch.py", f"--config={config}", "--mode=collect", *flags


def fine_tune_world_model(
    start: str, out: str, data: Sequence[str], steps: int, **settings: object
) -> tuple[str, ...]:
    """The world model `start` after more steps on `data`."""
    return tool("world_model.train", data=data, start=start, out=out, steps=steps, **settings)


def imagine(
    config: str, settings: Mapping[str, object], data: Sequence[str], out: str, episodes: int = 0
) -> tuple[str, ...]:
    """Imagine recordings with a world model from first frames and poses; 0 = all episodes."""
    names = ("world_model", "steps", "eta")
    values = {name: value_of(config, settings, IMAGINATION[name]) for name in names}
    return tool("world_model.imagine_dataset", data=data, out=out, episodes=episodes, **values)


def train_reward(
    config: str,
    settings: Mapping[str, object],
    out: str,
    data: Sequence[str],
    imagined: Sequence[str],
    steps: int,
) -> tuple[str, ...]:
    """A classifier of real and imagined frames, calibrated on imagined ones that runs judge."""
    names = ("success_frames", "judged_frames")
    values = {name: value_of(config, settings, IMAGINATION[name]) for name in names}
    command = tool("reward.train", data=data, out=out, steps=steps, **values)
    return (*command, "--imagined", *imagined)


def validate(
    config: str, settings: Mapping[str, object], data: Sequence[str], out: str
) -> tuple[str, ...]:
    """The trust report on the held-out part of recordings, imagined in the same way as in runs."""
    values = {option: value_of(config, settings, name) for option, name in IMAGINATION.items()}
    return tool("trust", data=data, out=out, **values)


def pack(config: str, settings: Mapping[str, object], out: str) -> tuple[str, ...]:
    """The world of runs with `settings`: their parts, and the values that they were run with."""

    def text(field: str) -> str:
        value = value_of(config, settings, field)
        entries = value if isinstance(value, list | tuple) else [value]
        return ",".join(map(str, entries)).strip("()[]").replace(" ", "")

    fields = PACKED | (PACKED_OF_LIBERO if text("eval.ground_truth") == "libero" else {})
    told = {option: text(field) for option, field in fields.items()}
    switches = {"True": "yes", "False": "no"}
    told = {option: switches.get(value, value) for option, value in told.items() if value}
    starts = text("env.initial_states_path") or text("env.initial_states")
    return tool("world.pack", out=out, starts=starts, **told)


def value_of(config: str, settings: Mapping[str, object], name: str) -> object:
    """Return the value of "section.field" in `settings`, or else of a preset in their world."""
    if name in settings:
        return settings[name]
    world = [f"--config.world={settings['world']}"] if "world" in settings else []
    return attrgetter(name)(read_preset(str(ROOT / config), world))


def trust_figures(folder: Path) -> dict:
    """Return the figures of a trust report, {} if there is none."""
    path = folder / TRUST_FILE
    return cards.read_json(path)["figures"] if path.is_file() else {}
