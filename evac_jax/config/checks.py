"""Checks of a configuration that the types of single fields cannot express: combinations and paths.

Nothing is loaded. Choices and bounds of single fields are in their types (`schema`).
"""

import json
from pathlib import Path

from algos import optim
from evac_jax.config import addresses, hub, import_string, libero, vlm_card, world
from evac_jax.config.algorithms import load_algorithm
from evac_jax.config.cluster import device_problems, parse_devices
from evac_jax.config.fields import value_problems
from evac_jax.config.schema import ServeConfig, TrainConfig
from evac_jax.errors import ConfigError, DataError

# Field of a folder -> the model that its config.json names, as `evac.model_folders` writes it.
KINDS = {"world_model.checkpoint": "EvacModel", "env.pose_model": "PoseModel"}
REWARD = "reward.checkpoint"
# Solver of the world model -> its values of eta; () = all. `evac.sampler.check_solver` has the same
# rules for the simulator processes.
SOLVER_ETAS = {"ddim": (), "dpm++": (0.0, 1.0), "unipc": (0.0,)}
MAX_FRAME = 8192  # pixels of a served frame's edge; more is a slip


def validate(config: TrainConfig) -> list[str]:
    """Return every problem that can be found without loading anything, [] if there is none.

    What an address on the Hugging Face Hub names is not looked at: it may not be here yet.
    """
    c = config
    # Of its paths nothing is known then; a message for each would only hide this one.
    if c.world and (gone := world.absent(c.world)):
        return [gone]
    problems = value_problems(c) + addresses.problems(c)
    if c.checkpoint.restore == "auto" and not c.log.run:
        problems.append(
            "config.log.run: checkpoint.restore=auto goes on with the run of this name; needed"
        )
    sound = not problems
    problems += _missing_paths(c) + _own_code_problems(c)
    waiting = {"libero.root", "libero.states"} & set(addresses.fields(c))
    if c.eval.ground_truth == "libero" and not waiting:
        problems += libero.problems(c.libero)
    if sound:
        problems += load_algorithm(c.algorithm).problems(c.algo) + optim.problems(c.optim)
        problems += _reward_problems(c) + _cluster_problems(c)
    if not problems:
        problems += _combinations(c)
    return problems + world.problems(c)


def validate_serving(config: TrainConfig) -> list[str]:
    """Return what `validate` would say of `--mode=serve`, which needs a policy and no simulator."""
    problems = value_problems(config) + _missing(_policy_paths(config))
    if config.cluster.num_nodes > 1:
        problems.append(
            "config.cluster.num_nodes: a policy is served by one host; expected 1, got "
            f"{config.cluster.num_nodes}"
        )
    return problems + _serve_problems(config.serve)


def _serve_problems(serve: ServeConfig) -> list[str]:
    """Keys that are missing or mean two things, and sizes that are none."""
    problems = []
    if not serve.image_keys:
        problems.append("config.serve.image_keys: expected one key per camera, got none")
    keys = (*serve.image_keys, serve.prompt_key, *serve.unread_keys)
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        problems.append(f"config.serve: every key has one meaning; given twice: {twice}")
    try:
        sizes = [length for shape in serve.frame_shapes for length in shape]
        sound = bool(sizes) and min(sizes) >= 1 and max(sizes) <= MAX_FRAME
    except ValueError:
        sound = False
    if not sound:
        problems.append(
            f'config.serve.image_sizes: expected "HEIGHTxWIDTH", each 1 to {MAX_FRAME} pixels, got '
            f"{serve.image_sizes}"
        )
    return problems


def _reward_problems(c: TrainConfig) -> list[str]:
    """Combinations of sampler and classifier settings that do not work."""
    problems, etas = [], SOLVER_ETAS[c.world_model.solver]
    if etas and c.world_model.eta not in etas:
        problems.append(
            f"config.world_model.eta: solver {c.world_model.solver!r} has {etas}, got "
            f"{c.world_model.eta}"
        )
    if c.reward.veto and c.reward.judge != "classifier":
        problems.append(
            "config.reward.veto: compares classifiers, and config.reward.judge is "
            f"{c.reward.judge!r}; set it to 0"
        )
    elif c.reward.veto and "," not in c.reward.checkpoint:
        problems.append(
            "config.reward.veto: needs two classifiers at least; join their folders by commas in "
            "config.reward.checkpoint, or set it to 0"
        )
    if c.reward.judge == "vlm":
        problems += _vlm_problems(c)
    elif c.reward.threshold <= 0:
        problems.append(
            f"config.reward.threshold: expected a probability in (0, 1], got {c.reward.threshold}; "
            'only reward.judge = "vlm" has log-probabilities'
        )
    return problems


def _vlm_problems(c: TrainConfig) -> list[str]:
    """Why a vision-language model cannot judge with these settings."""
    reward = c.reward
    problems = [f"config.reward.vlm.{problem}" for problem in reward.vlm.problems()]
    if "," in reward.checkpoint:
        problems.append(
            "config.reward.checkpoint: one vision-language model judges, only classifiers judge "
            f"together; got {reward.checkpoint!r}"
        )
    if c.world_model.reference_compat:
        problems.append(
            "config.world_model.reference_compat: rounds a classifier's probability at 0.5; "
            'expected False with reward.judge = "vlm"'
        )
    try:
        card = vlm_card.read(reward.checkpoint) if reward.checkpoint else None
        if card is None and reward.checkpoint:
            vlm_card.check_is_model(reward.checkpoint)
    except DataError as error:
        return [*problems, f"config.reward.checkpoint: {error}"]
    if card is not None:
        if flags := card.flags(reward):
            problems.append(
                f"config.reward: the threshold in {reward.checkpoint} was found with other values; "
                f"add {' '.join(flags)}, or name the model itself and a threshold of your own"
            )
        return problems
    if reward.threshold > 0:
        problems.append(
            'config.reward.threshold: needed with reward.judge = "vlm", a log-probability, at most '
            f"0; got {reward.threshold}. evac_jax.tools.reward.vlm_threshold finds one"
        )
    for name, why in (
        ("success_frames", "success that holds is reward.vlm.average"),
        ("judged_frames", "a vision-language model judges after a chunk's last frame"),
    ):
        if (value := getattr(reward, name)) != 1:
            problems.append(f"config.reward.{name}: {why}; expected 1, got {value}")
    return problems


def _own_code_problems(c: TrainConfig) -> list[str]:
    """Import the user's own ground truth and judge, if they are named; return what is wrong."""
    problems = []
    for name, text, makes in (
        ("eval.ground_truth", c.eval.ground_truth, import_string.ENVIRONMENT),
        ("reward.judge", c.reward.judge, import_string.JUDGE),
    ):
        if import_string.is_one(text):
            try:
                import_string.load(text, makes=makes)
            except ConfigError as error:
                problems.append(f"config.{name}: {error}")
    return problems


def _cluster_problems(c: TrainConfig) -> list[str]:
    """Placements and overlaps that work on no machine."""
    problems, cluster = [], c.cluster
    if not 0 <= cluster.node < cluster.num_nodes:
        problems.append(
            f"config.cluster.node: expected 0 to {cluster.num_nodes - 1} (cluster.num_nodes), got "
            f"{cluster.node}"
        )
    if cluster.num_nodes > 1 and cluster.engine == "local" and not cluster.coordinator:
        problems.append(
            "config.cluster.coordinator: where the trainers of several hosts meet; set it to "
            '"ADDRESS:PORT" of host 0 on all of them, or cluster.engine to "ray"'
        )
    if cluster.num_nodes > 1 and not (c.log.run or c.checkpoint.restore):
        problems.append("config.log.run: runs on several hosts need a name that all of them know")
    if cluster.num_nodes > 1 and c.rollout.refill:
        problems.append(
            "config.rollout.refill: works on one host only, where all groups are seen; set it to 0"
        )
    if c.mesh.data == 0 and c.mesh.fsdp != -1:
        problems.append(
            f"config.mesh.fsdp: with mesh.data=0 the run chooses both; expected -1, got "
            f"{c.mesh.fsdp}"
        )
    for name in ("env", "rollout", "actor"):
        try:
            parse_devices(getattr(cluster.placement, name))
        except ValueError as error:
            problems.append(f"config.cluster.placement.{name}: {error}")
    if c.train.max_staleness and not c.algo.decoupled:
        problems.append(
            "config.algo.decoupled: episodes of an older policy (train.max_staleness = 1) need its "
            "correction; expected True, got False"
        )
    if c.train.max_staleness and (busy := {"simulator", "sampler"} & set(cluster.offload)):
        problems.append(
            f"config.cluster.offload: {' and '.join(sorted(busy))} work during updates with "
            "train.max_staleness = 1; expected at most ('optimizer',)"
        )
    problems += device_problems(c.simulator.devices)
    if cluster.placement.env and not any(d.startswith("cuda") for d in c.simulator.devices):
        problems.append(
            f"config.cluster.placement.env: names CUDA devices, but simulator.devices is "
            f"{c.simulator.devices}; set it to ('cuda',), or leave placement.env empty"
        )
    return problems


def _missing_paths(c: TrainConfig) -> list[str]:
    """Every path that the run needs and that is missing, in one list."""
    needed = _policy_paths(c)
    imagined = c.env.simulator == "world_model"
    if imagined:
        needed |= {
            "world_model.checkpoint": (c.world_model.checkpoint, "folder of the EVAC weights"),
            "env.pose_model": (c.env.pose_model, "folder of the action-to-pose network"),
        }
        # A judge of the user's own may need no files.
        if c.reward.checkpoint or not import_string.is_one(c.reward.judge):
            what = "vision-language model" if c.reward.judge == "vlm" else "success classifier"
            for number, folder in enumerate(c.reward.checkpoint.split(",")):
                name = REWARD + f"[{number}]" * (number > 0)
                needed[name] = (folder, f"folder of the {what}")
    if imagined and c.env.initial_states in ("npy", "recording"):
        needed["env.initial_states_path"] = (c.env.initial_states_path, "folder of start frames")
    if c.env.keyframes:
        needed["env.keyframe_data"] = (c.env.keyframe_data, "recording to begin episodes in")
    return _missing(needed) + _other_kinds(needed, c.reward.judge)


def _policy_paths(c: TrainConfig) -> dict[str, tuple[str, str]]:
    """Return {field: (path, meaning)} of the policy's folders."""
    paths = {"policy.checkpoint": (c.policy.checkpoint, "Hugging Face folder of the start policy")}
    if c.policy.lora_adapter:
        paths["policy.lora_adapter"] = (c.policy.lora_adapter, "PEFT adapter folder")
    return paths


def _missing(needed: dict[str, tuple[str, str]]) -> list[str]:
    problems = []
    for name, (path, meaning) in needed.items():
        if not path:
            problems.append(
                f"config.{name}: needed, the {meaning}; set --config.{name}=PATH"
                + ", or --config.world=DIR for all parts" * (name in world.PATHS)
            )
        elif not (hub.is_address(path) or Path(path).exists()):
            hint = ". A folder on the Hugging Face Hub is hf://OWNER/NAME" * _meant_for_hub(path)
            problems.append(f"config.{name}: {path!r} does not exist (the {meaning}){hint}")
    return problems


def _meant_for_hub(path: str) -> bool:
    return path.startswith("hf:") or "/huggingface.co/" in path


def _other_kinds(needed: dict[str, tuple[str, str]], judge: str) -> list[str]:
    """Say which folders hold another model, before simulators start and read them."""
    problems, kinds = [], KINDS | ({REWARD: "RewardNet"} if judge == "classifier" else {})
    for name, (path, _) in needed.items():
        try:
            found = json.loads((Path(path) / "config.json").read_text())
        except (OSError, ValueError):
            continue  # the loader has better words
        kind = kinds.get(name.partition("[")[0])
        if kind is None or not isinstance(found, dict) or found.get("model") == kind:
            continue
        got = found.get("model") or found.get("model_type")
        hint = "; a vision-language model judges with --config.reward.judge=vlm"
        foreign = kind == "RewardNet" and found.get("model_type") not in (None, "openvla")
        problems.append(
            f"config.{name}: expected a folder of kind {kind}, got {path!r} of kind {got}"
            + hint * foreign
        )
    return problems


def _combinations(c: TrainConfig) -> list[str]:
    """Problems between sections; checked only if each value is valid by itself."""
    problems = _twin_problems(c)
    group = getattr(c.algo, "group_size", 1)
    if c.rollout.refill and group == 1:
        problems.append(
            "config.rollout.refill: an algorithm without groups has none to replace; set it to 0"
        )
    hosts = c.cluster.num_nodes
    if c.env.num_envs % (group * c.simulator.processes * hosts):
        problems.append(
            f"config.env.num_envs: must be a multiple of algo.group_size x simulator.processes x "
            f"cluster.num_nodes = {group} x {c.simulator.processes} x {hosts}, so that groups stay "
            f"whole; got {c.env.num_envs}"
        )
    if c.eval.ground_truth != "none" and c.eval.ground_truth_envs % hosts:
        problems.append(
            f"config.eval.ground_truth_envs: must be a multiple of cluster.num_nodes = {hosts}, "
            f"got {c.eval.ground_truth_envs}"
        )
    share, stages = c.envs_per_process, c.rollout.pipeline_stages
    if share % stages or stages > c.simulator.slots:
        problems.append(
            f"config.rollout.pipeline_stages: must divide the {share} environments of a simulator "
            f"process and be at most simulator.slots = {c.simulator.slots}; got {stages}"
        )
    if stages > 1 and c.world_model.reference_compat:
        problems.append(
            "config.rollout.pipeline_stages: with world_model.reference_compat the environments "
            f"restart together and cannot be cut; expected 1, got {stages}"
        )
    if len(c.simulator.devices) not in (1, c.simulator.processes):
        problems.append(
            f"config.simulator.devices: expected 1 entry or {c.simulator.processes} "
            f"(simulator.processes), got {len(c.simulator.devices)}"
        )
    if c.env.simulator == "ground_truth" and c.eval.ground_truth == "none":
        problems.append(
            'config.eval.ground_truth: names the environment that env.simulator = "ground_truth" '
            'learns in; got "none"'
        )
    if c.env.simulator == "ground_truth" and c.eval.episodes:
        problems.append(
            'config.eval.episodes: nothing is imagined with env.simulator = "ground_truth"; '
            f"expected 0, got {c.eval.episodes}"
        )
    if c.algorithm == "ppo" and c.policy.value_head != c.algo.reward_type:
        problems.append(
            f"config.policy.value_head: PPO needs the level of algo.reward_type "
            f"({c.algo.reward_type!r}), got {c.policy.value_head!r}"
        )
    if len(c.eval.ground_truth_starts) not in (0, 2):
        problems.append(
            "config.eval.ground_truth_starts: expected (low, high) or (), got "
            f"{c.eval.ground_truth_starts}"
        )
        return problems
    for name in ("env.train_starts", "eval.starts", "eval.ground_truth_starts"):
        section, key = name.split(".")
        low, high = getattr(getattr(c, section), key) or (0, -1)
        if low < 0 or (high != -1 and high <= low):
            problems.append(f"config.{name}: expected 0 <= low < high (or -1), got ({low}, {high})")
    return problems


def _twin_problems(c: TrainConfig) -> list[str]:
    """Reasons why imagined episodes cannot be replayed in the ground truth."""
    if not c.eval.twin_fraction:
        return []
    twin = f"config.eval.twin_fraction = {c.eval.twin_fraction}"
    problems = []
    if c.eval.ground_truth == "none":
        problems.append(f"config.eval.ground_truth: {twin} needs one to replay in, got 'none'")
    elif c.env.initial_states not in (c.eval.ground_truth, "npy"):
        problems.append(
            f"config.env.initial_states: {twin} needs starts that the ground truth "
            f"({c.eval.ground_truth!r}) can be put into, got {c.env.initial_states!r}"
        )
    elif c.env.initial_states == "npy" and c.env.keyframes:
        problems.append(
            f"config.env.keyframes: {twin}, and {c.eval.ground_truth!r} cannot begin in the "
            f"middle of episodes; expected 0.0, got {c.env.keyframes}"
        )
    if c.env.simulator != "world_model":
        problems.append(f"config.env.simulator: {twin}, but nothing is imagined; set it to 0")
    if c.algo.auto_reset:
        problems.append(
            f"config.algo.auto_reset: {twin} replays whole episodes from their own starts; "
            "expected False"
        )
    return problems
