"""The whole configuration of a run: frozen dataclasses, checked before anything heavy starts.

Defaults, choices and bounds live here and nowhere else: checks, messages, flags and docs/config.md
are made from these types (`fields`). Presets render the defaults to a ConfigDict and override some;
below launch.py no code sees a ConfigDict.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from algos.optim import OptimizerConfig
from evac_jax.config.cluster import ClusterConfig, MeshConfig
from evac_jax.config.libero import LiberoConfig
from policies.ranges import Count, CountOrZero, NotNegative, Positive, Range, Share

Dtype = Literal["float32", "bfloat16"]
FromMinusOne = Annotated[int, Range(-1)]

MINIATURE_WEIGHTS = str(Path(__file__).parents[1] / "miniature" / "weights")


@dataclass(frozen=True)
class PolicyConfig:
    """Which policy, from which weights, sampled how.

    Attributes:
        checkpoint: Hugging Face folder of the start policy; a restored run overrides it.
        lora_rank: of the LoRA adapters, which with the value head train alone; 0 = all trains.
        lora_alpha: adapters are scaled by lora_alpha / lora_rank; 0 = a scale of 1.
        lora_adapter: PEFT folder, "" = none; merged on import, or trained on if lora_rank > 0.
        unnorm_key: key of the action statistics; "<key>_no_noops" is tried too.
        value_head: "none", "chunk_level" (one value a chunk) or "action_level" (one an action).
        max_prompt_length: tokens that every prompt is padded to; a longer prompt is an error.
        keep_stop_token: attend to a stop token after the action slots, as OFT's own code does;
            False follows RLinf. Use what the checkpoint was fine-tuned with.
        temperature: softmax temperature when sampling and when training.
        eval_temperature: the same in evaluation; 0 = greedy.
        top_k: keep the k likeliest bins; -1 = all 256.
        param_dtype: how weights are kept.
        compute_dtype: what the layers compute in; logits are float32.
        remat: what the backward pass recomputes of a layer: "none", "dots" (all but the results of
            matrix products) or "full". Less memory for more time, docs/policy_speed.md.
        scan_layers: compile one layer and loop over it; compile time no longer grows with depth.
        merge_projections: one product for queries, keys and values and one for gate and up: for
            CPUs, docs/policy_speed.md.
    """

    checkpoint: str = ""
    lora_rank: CountOrZero = 0
    lora_alpha: NotNegative = 0.0
    lora_adapter: str = ""
    unnorm_key: str = ""
    value_head: Literal["none", "chunk_level", "action_level"] = "none"
    max_prompt_length: Count = 128
    keep_stop_token: bool = False
    temperature: Positive = 1.0
    eval_temperature: NotNegative = 0.0
    top_k: FromMinusOne = -1
    param_dtype: Dtype = "float32"
    compute_dtype: Dtype = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    scan_layers: bool = True
    merge_projections: bool = False


@dataclass(frozen=True)
class WorldModelConfig:
    """EVAC: weights and how it is sampled.

    Attributes:
        checkpoint: folder with config.json and model.safetensors.
        steps: denoising steps per chunk.
        eta: stochasticity; 0 = deterministic.
        solver: "ddim"; for fewer steps "dpm++" (eta 0 or 1) or "unipc" (eta 0).
        compile: let torch.compile make the denoiser's kernels, which takes minutes; episodes that
            are over are then imagined on, as every other batch size would be compiled anew.
        reference_compat: reproduce the reference environment's defects (one-place-early poses,
            raw pose model, rounding at 0.5, all environments reset together); for comparison only.
    """

    checkpoint: str = ""
    steps: Count = 50
    eta: Share = 1.0
    solver: Literal["ddim", "dpm++", "unipc"] = "ddim"
    compile: bool = False
    reference_compat: bool = False


@dataclass(frozen=True)
class RewardConfig:
    """The success classifier and what its verdict is worth.

    Attributes:
        checkpoint: folder of the classifier, or of several, joined by commas: the mean of their
            probabilities counts.
        veto: with several, a frame on which they are further apart than this is no success;
            0 = no veto.
        threshold: probability from which a frame counts as success.
        success_frames: consecutive frames that must count before the episode does.
        judged_frames: last frames of every chunk that are decoded and judged; 0 = all. Success
            that persists is seen in the last ones too, and the others then cost nothing.
        coefficient: reward of success.
        relative: reward the change of the score, so that an episode's sum is its last score.
    """

    checkpoint: str = ""
    veto: Share = 0.0
    threshold: Annotated[float, Range(0, 1, open="low")] = 0.5
    success_frames: Count = 1
    judged_frames: CountOrZero = 0
    coefficient: float = 1.0
    relative: bool = True


@dataclass(frozen=True)
class EnvConfig:
    """The episodes that the policy learns from.

    Attributes:
        simulator: what the policy learns in: "world_model", or "ground_truth", the environment
            that eval.ground_truth names: what learning gains where nothing is imagined.
        initial_states: "miniature" (built-in scenes), "npy" (a folder of start frames) or
            "recording" (first frames of a recording's training part, docs/episodes.md).
        initial_states_path: that folder; unused by the miniature.
        train_starts: [low, high) range of start ids for training; high -1 = all there are.
        start_order: "random", "ordered" (one after another) or "fixed" (the same ones always).
        num_envs: episodes imagined side by side, over all simulator processes.
        max_episode_steps: actions after which an episode is truncated; a multiple of the chunk.
        keyframes: share of the groups that begin in the middle of a recorded episode: a
            long task whose end is never reached gives no reward.
        keyframe_data: that recording (docs/episodes.md), of which the training part is used, or a
            folder of RLinf's keyframe files (docs/bring_your_world_model.md).
        gripper: how the policy's gripper entry becomes the simulator's: "libero" (-sign(2g-1)),
            "binary" or "none".
        pose_model: folder of the network that turns (action, pose) into the next pose.
    """

    simulator: Literal["world_model", "ground_truth"] = "world_model"
    initial_states: Literal["miniature", "npy", "recording"] = "miniature"
    initial_states_path: str = ""
    train_starts: tuple[int, int] = (0, -1)
    start_order: Literal["random", "ordered", "fixed"] = "random"
    num_envs: Count = 16
    max_episode_steps: Count = 256
    keyframes: Share = 0.0
    keyframe_data: str = ""
    gripper: Literal["libero", "binary", "none"] = "libero"
    pose_model: str = ""


@dataclass(frozen=True)
class SimulatorConfig:
    """The processes that imagine.

    Attributes:
        processes: simulator processes; num_envs is divided among them, groups kept whole.
        devices: torch device of each process; one entry serves all.
        threads: CPU threads of each process.
        dtype: what the world model computes in.
        slots: frame buffers per process.
        timeout_s: seconds that one chunk may take before the process counts as stuck.
        start_timeout_s: seconds that loading may take.
        restarts: times that a dead simulator is started again before the run stops.
    """

    processes: Count = 1
    devices: tuple[str, ...] = ("cpu",)
    threads: Count = 1
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    slots: Annotated[int, Range(2)] = 2
    timeout_s: Positive = 600.0
    start_timeout_s: Positive = 600.0
    restarts: CountOrZero = 0


@dataclass(frozen=True)
class RolloutConfig:
    """How many episodes make one iteration.

    Attributes:
        epochs: times that all environments play an episode, one after another, per iteration;
            episodes per iteration = env.num_envs x epochs.
        refill: times that an iteration may collect as many episodes again, to replace groups whose
            members all succeed or all fail, or that algo.filter_rewards drops (dynamic sampling);
            0 = never. For groups only.
        pipeline_stages: parts that the environments are cut in: one imagines while the policy
            decides for another. 2 where both take about the same time; the numbers are the same.
    """

    epochs: Count = 1
    refill: CountOrZero = 0
    pipeline_stages: Count = 1


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation before, during and after training.

    Attributes:
        interval: iterations between evaluations; 0 = only before and after.
        episodes: episodes per evaluation in the world model; 0 = none.
        starts: [low, high) range of start ids for evaluation, apart from the training ones.
        ground_truth: environment to evaluate in for real: "miniature", "libero" (set up in the
            section of this name) or "none".
        ground_truth_episodes: episodes per evaluation in the ground truth.
        ground_truth_envs: ground-truth environments stepped side by side.
        twin_fraction: share of every iteration's imagined episodes whose actions are replayed in
            the ground truth; 0 = none, else at least one episode.
        twin_window: last replays that the alarm looks at.
        twin_alarm: success that imagination may show beyond the real one; the alarm is
            raised when the excess is larger by a one-sided test at 95 %.
        twin_action: what follows the alarm: "warn", or "stop" after a checkpoint.
    """

    interval: CountOrZero = 4
    episodes: CountOrZero = 64
    starts: tuple[int, int] = (0, -1)
    ground_truth: Literal["miniature", "libero", "none"] = "none"
    ground_truth_episodes: Count = 256
    ground_truth_envs: Count = 64
    twin_fraction: Share = 0.0
    twin_window: Count = 256
    twin_alarm: Share = 0.1
    twin_action: Literal["warn", "stop"] = "warn"


@dataclass(frozen=True)
class CollectConfig:
    """Episodes recorded in the ground truth by `--mode=collect`; seeded by `seed`.

    Attributes:
        out: new folder for them (docs/episodes.md is the format).
        episodes: of all players together.
        mix: "player=share,..."; a player is a script of the ground truth, "policy" (the configured
            policy at its training temperature) or "policy:FOLDER@TEMPERATURE".
    """

    out: str = ""
    episodes: Count = 256
    mix: str = "policy=1"


@dataclass(frozen=True)
class RunConfig:
    """Length of the run, how far acting may lag behind learning, and when to give up.

    Attributes:
        iterations: rollout-and-update rounds in all, counted from the first start of the run.
        max_staleness: updates that the policy which acts may be behind. With 1 the next
            iteration's episodes are collected while an update is computed; needs algo.decoupled.
            A run that is continued collects the episodes that were under way anew.
        max_skipped_updates: non-finite optimiser steps in a row after which the run stops.
        stop_grace_s: seconds from a SIGTERM, SIGHUP or Ctrl-C to the end of the process. The
            iteration under way is finished or dropped, and what is complete is saved.
    """

    iterations: Count = 100
    max_staleness: Literal[0, 1] = 0
    max_skipped_updates: Count = 10
    stop_grace_s: Positive = 25.0


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and restoring runs (not to be confused with policy.checkpoint, the import).

    Attributes:
        restore: "" = start anew; "latest" = newest run of this algorithm under log.dir (or the
            run log.run) that has a checkpoint; "auto" = go on with log.run if it has one, else
            start it, for jobs that are queued again; or the path of a run or of its checkpoint
            folder.
        step: iteration to restore; -1 = the newest. A run that goes on from an older one keeps
            the later checkpoints as <iteration>.later.
        interval: iterations between checkpoints; the last iteration is always saved.
        keep: newest checkpoints to keep.
        dir: where; "" = <run folder>/checkpoints.
    """

    restore: str = ""
    step: FromMinusOne = -1
    interval: Count = 10
    keep: Count = 3
    dir: str = ""


@dataclass(frozen=True)
class LogConfig:
    """Where a run leaves its traces.

    Attributes:
        dir: folder that holds all runs.
        run: name of the run's own folder; "" = <algorithm>-<date>-<time>.
        tensorboard: write event files.
        wandb: whether Weights & Biases gets the metrics too.
        wandb_project: project name for Weights & Biases.
    """

    dir: str = "runs"
    run: str = ""
    tensorboard: bool = True
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "evac_jax"


@dataclass(frozen=True)
class VideoConfig:
    """Videos of imagined episodes.

    Attributes:
        save: write mp4 files at every evaluation.
        overlay: draw instruction, reward and success into them.
        dir: where; "" = <run folder>/videos.
        episodes: episodes filmed per evaluation, at most the environments of one process.
        fps: frames per second.
    """

    save: bool = True
    overlay: bool = True
    dir: str = ""
    episodes: CountOrZero = 4
    fps: Count = 8


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a run.

    Attributes:
        algorithm: "grpo" or "ppo"; the preset file says which.
        algo: the configuration of that algorithm.
        seed: of all that is drawn: starts, actions, noise, order of samples.
    """

    algorithm: str
    algo: Any
    seed: CountOrZero = 0
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    optim: OptimizerConfig = field(default_factory=OptimizerConfig)
    world_model: WorldModelConfig = field(default_factory=WorldModelConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    simulator: SimulatorConfig = field(default_factory=SimulatorConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    libero: LiberoConfig = field(default_factory=LiberoConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    train: RunConfig = field(default_factory=RunConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    video: VideoConfig = field(default_factory=VideoConfig)

    @property
    def envs_per_process(self) -> int:
        """Environments of one simulator process."""
        return self.env.num_envs // (self.cluster.num_nodes * self.simulator.processes)

    @property
    def episodes_per_iteration(self) -> int:
        """Episodes that one update learns from."""
        return self.env.num_envs * self.rollout.epochs
