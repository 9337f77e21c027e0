"""The whole configuration of a run: frozen dataclasses, checked before anything slow starts.

Defaults, choices and bounds are defined only here; checks, messages, flags and docs/config.md are
made from these types (`fields`). Presets convert the defaults to a ConfigDict and override some of
them. Only launch.py and presets use ConfigDicts; all other code uses these dataclasses.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from algos.optim import OptimizerConfig
from evac_jax.config.cluster import ClusterConfig, MeshConfig
from evac_jax.config.import_string import ImportString
from evac_jax.config.libero import LiberoConfig
from evac_jax.config.vlm import VlmConfig
from policies.ranges import Count, CountOrZero, NotNegative, Positive, Range, Share

Dtype = Literal["float32", "bfloat16"]
FromMinusOne = Annotated[int, Range(-1)]

MINIATURE_WEIGHTS = str(Path(__file__).parents[1] / "miniature" / "weights")
LIBERO_SMALL_WEIGHTS = str(Path(__file__).parents[1] / "libero_small" / "weights")


@dataclass(frozen=True)
class PolicyConfig:
    """The policy: its weights and how actions are sampled.

    Attributes:
        checkpoint: Hugging Face folder of the start policy; a restored run overrides it.
        lora_rank: rank of the LoRA adapters. Only adapters and value head train; 0 = no adapters:
            all weights train.
        lora_alpha: adapters are scaled by lora_alpha / lora_rank; 0 = a scale of 1.
        lora_adapter: PEFT folder; "" = none. It is merged on import, or trained further if
            lora_rank > 0.
        unnorm_key: key of the action statistics; "<key>_no_noops" is tried too. Only for a policy
            folder without statistics it may be ""; actions then stay in -1..1.
        value_head: "none", "chunk_level" (one value per chunk) or "action_level" (one per action).
        max_prompt_length: every prompt is padded to this number of tokens; a longer prompt is an
            error.
        keep_stop_token: attend to a stop token after the action slots, as OFT's own code does;
            False follows RLinf. Use the value with which the checkpoint was fine-tuned.
        temperature: softmax temperature in sampling and in training.
        eval_temperature: the same in evaluation; 0 = greedy.
        top_k: sample only from the k most likely bins; -1 = all 256.
        param_dtype: type in which weights are stored.
        compute_dtype: type in which layers compute; logits are float32.
        remat: what the backward pass recomputes of a layer: "none", "dots" (all except the results
            of matrix products) or "full". It saves memory and costs time (docs/policy_speed.md).
        scan_layers: compile one layer and loop over it, so that compile time does not grow with
            depth.
        attention: "cudnn" (one fused kernel, which holds no scores in memory; NVIDIA GPUs and
            bfloat16 only), "xla", or "auto": cudnn where it can be, else what suits the platform.
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
    attention: Literal["auto", "xla", "cudnn"] = "auto"


@dataclass(frozen=True)
class WorldModelConfig:
    """The world model EVAC: its weights and how it is sampled.

    Attributes:
        checkpoint: folder with config.json and model.safetensors.
        steps: denoising steps per chunk.
        eta: stochasticity; 0 = deterministic.
        solver: "ddim"; for fewer steps "dpm++" (eta 0 or 1) or "unipc" (eta 0).
        compile: compile the denoiser with torch.compile, which takes minutes. Finished episodes are
            then still imagined, because each batch size needs its own compilation.
        reference_compat: reproduce the defects of the reference environment (poses one place too
            early, raw pose model, rounding at 0.5, all environments reset together); only for
            comparison.
    """

    checkpoint: str = ""
    steps: Count = 50
    eta: Share = 1.0
    solver: Literal["ddim", "dpm++", "unipc"] = "ddim"
    compile: bool = False
    reference_compat: bool = False


@dataclass(frozen=True)
class RewardConfig:
    """What judges success, and the reward for it.

    Attributes:
        judge: what judges imagined frames: "classifier"; "vlm", a frozen vision-language model
            (docs/reward_hacking.md); or code of your own (docs/plug_in.md).
        checkpoint: folder of the classifier; or several folders, separated by commas, whose mean
            probability is used. With "vlm" a model's folder, or one that
            tools.reward.vlm_threshold wrote. A judge of your own gets this text.
        veto: with several classifiers, a frame is not a success if their probabilities differ by
            more than this; 0 = no veto.
        threshold: a frame counts as success if its probability is at least this. With "vlm" it is
            a mean log-probability, at most 0 (tools.reward.vlm_threshold finds one).
        success_frames: number of consecutive successful frames that make the episode a success.
        judged_frames: how many frames at the end of every chunk are decoded and judged; 0 = all.
            A lasting success is visible in the last frames too, and the others then cost nothing.
        coefficient: reward for success.
        relative: reward the change of the score, so that the rewards of an episode sum to its last
            score.
    """

    judge: Literal["classifier", "vlm"] | ImportString = "classifier"
    checkpoint: str = ""
    veto: Share = 0.0
    threshold: Annotated[float, Range(-80, 1)] = 0.5
    success_frames: Count = 1
    judged_frames: CountOrZero = 0
    coefficient: float = 1.0
    relative: bool = True
    vlm: VlmConfig = field(default_factory=VlmConfig)


@dataclass(frozen=True)
class EnvConfig:
    """The episodes that the policy learns from.

    Attributes:
        simulator: where the policy learns: "world_model", or "ground_truth", the environment that
            eval.ground_truth names; the latter shows what learning gains without a world model.
        initial_states: "miniature" (built-in scenes), "npy" (a folder of start frames) or
            "recording" (first frames of the training part of a recording, docs/episodes.md).
        initial_states_path: that folder; not used with "miniature".
        train_starts: [low, high) range of start ids for training; high = -1: up to the last one.
        start_order: "random", "ordered" (one after another) or "fixed" (always the same ones).
        num_envs: episodes that are imagined at the same time, over all simulator processes.
        max_episode_steps: actions after which an episode is truncated; a multiple of the chunk.
        keyframes: share of the groups that begin in the middle of a recorded episode. It helps if
            a task is so long that its end, and so a reward, is never reached.
        keyframe_data: that recording (docs/episodes.md), of which the training part is used, or a
            folder of RLinf's keyframe files (docs/bring_your_world_model.md).
        gripper: how the policy's gripper entry g is converted for the simulator: "libero"
            (-sign(2g-1)), "binary" or "none".
        pose_model: folder of the network that predicts the next pose from (action, pose).
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
        processes: simulator processes; env.num_envs is divided among them, and groups stay
            together.
        devices: torch device of each process; a single entry is used for all.
        threads: CPU threads of each process.
        dtype: type in which the world model computes.
        slots: frame buffers per process.
        timeout_s: longest time of one chunk, seconds; after it the process counts as stuck.
        start_timeout_s: longest time for loading, seconds.
        restarts: how often each simulator process that failed, or is stuck, is started again while
            one trainer process lives; a resumed run counts anew. It then plays the episodes under
            way again, so the run goes on with the same numbers; the log tells. Loading that fails
            ends the run, also after a restart: it would fail again.
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
    """The episodes of one iteration.

    Attributes:
        epochs: number of episodes that every environment plays per iteration, one after another;
            episodes per iteration = env.num_envs x epochs.
        refill: how often an iteration may collect the same number of episodes again, to replace
            groups whose members all succeed or all fail, or that algo.filter_rewards drops (dynamic
            sampling); 0 = never. Only with groups.
        pipeline_stages: number of parts into which the environments are divided. One part imagines
            while the policy decides for another. Use 2 if both take about the same time; results do
            not change.
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
        starts: [low, high) range of start ids for evaluation, apart from the training ones; high
            -1 = all there are. An id that does not exist is refused.
        ground_truth: environment to evaluate in for real: "miniature", "libero" (set up in the
            section of this name), code of your own (docs/plug_in.md) or "none".
        ground_truth_starts: range of its own start ids; () = eval.starts where env.initial_states
            is the ground truth as well, so that the ids mean the same, else all there are.
        ground_truth_episodes: episodes per evaluation in the ground truth.
        ground_truth_envs: ground-truth environments that run at the same time.
        twin_fraction: share of every iteration's imagined episodes whose actions are replayed in
            the ground truth; 0 = none, else at least one episode.
        twin_window: number of latest replays that the alarm uses.
        twin_alarm: how much the imagined success rate may exceed the real one; the alarm is raised
            if the excess is larger by a one-sided test at 95 %.
        twin_action: what the alarm does: "warn", or "stop" after a checkpoint.
    """

    interval: CountOrZero = 4
    episodes: CountOrZero = 64
    starts: tuple[int, int] = (0, -1)
    ground_truth: Literal["miniature", "libero", "none"] | ImportString = "none"
    ground_truth_starts: tuple[int, ...] = ()
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
        out: new folder for the episodes (docs/episodes.md describes the format).
        episodes: number of episodes of all players together.
        mix: "player=share,..."; a player is a script of the ground truth, "policy" (the configured
            policy at its training temperature) or "policy:FOLDER@TEMPERATURE".
    """

    out: str = ""
    episodes: Count = 256
    mix: str = "policy=1"


@dataclass(frozen=True)
class RunConfig:
    """Length of the run, staleness of the acting policy, and when the run gives up.

    Attributes:
        iterations: total number of iterations (rollout and update) since the first start of the
            run.
        max_staleness: how many updates the acting policy may be behind. With 1 the episodes of the
            next iteration are collected while an update is computed; this needs algo.decoupled. A
            resumed run collects the unfinished episodes again.
        max_skipped_updates: the run stops after this many consecutive non-finite optimiser steps.
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
        restore: "" = a new run; "latest" = the newest run of this algorithm under log.dir (or the
            run log.run) that has a checkpoint; "auto" = continue log.run if it has a checkpoint,
            else start it, for jobs that are queued again; or the path of a run or of its
            checkpoint folder.
        step: iteration to restore; -1 = the newest. A run that continues from an older one keeps
            the later checkpoints as <iteration>.later.
        interval: iterations between checkpoints; the last iteration is always saved.
        keep: how many of the newest checkpoints are kept.
        dir: folder of the checkpoints; "" = <run folder>/checkpoints.
    """

    restore: str = ""
    step: FromMinusOne = -1
    interval: Count = 10
    keep: Count = 3
    dir: str = ""


@dataclass(frozen=True)
class LogConfig:
    """Where a run writes its logs and metrics.

    Attributes:
        dir: folder of all runs.
        run: name of this run's folder; "" = <algorithm>-<date>-<time>.
        tensorboard: write TensorBoard event files.
        wandb: whether metrics are also sent to Weights & Biases.
        wandb_project: project name for Weights & Biases.
        wandb_more: what Weights & Biases gets beside metrics and films: "report" (report.html),
            "videos" (the films as a table, to be filtered by place, task and success, in the place
            of single ones), "checkpoint" (the last one as an artifact; of a 7B policy that is tens
            of GB).
    """

    dir: str = "runs"
    run: str = ""
    tensorboard: bool = True
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "evac_jax"
    wandb_more: tuple[Literal["report", "videos", "checkpoint"], ...] = ()


@dataclass(frozen=True)
class VideoConfig:
    """Videos of imagined episodes.

    Attributes:
        save: write mp4 files at every evaluation.
        overlay: draw instruction, reward and success into them.
        dir: folder of the videos, below which each run or evaluation has one of its own name; "" =
            <run folder>/videos.
        episodes: episodes filmed per evaluation; at most the number of environments of one process.
        fps: frames per second.
    """

    save: bool = True
    overlay: bool = True
    dir: str = ""
    episodes: CountOrZero = 4
    fps: Count = 8


@dataclass(frozen=True)
class ServeConfig:
    """A policy that `--mode=serve` offers to robots (docs/serve.md).

    Attributes:
        host: address to listen on. The default is reached from this machine only. There is no
            password: whoever reaches the address can use the policy.
        port: TCP port; 0 = a free one, which the log names.
        image_keys: keys of an observation that hold camera frames, one per camera, in the order in
            which the policy was trained. A key within a nested object is written "outer/inner".
        prompt_key: key of the instruction.
        unread_keys: keys that an observation may also have and that are not read. Any other key is
            an error.
        image_sizes: sizes of frames, "HEIGHTxWIDTH" in pixels. Each is compiled before the first
            request, which takes time; a frame of another size is an error.
        chunk: actions per decision, K: as many as in training, which a policy's files do not tell.
        max_message_mb: largest message of a client, MiB; a larger one ends its connection.
        max_clients: clients that may be connected at the same time.
        client_timeout_s: seconds without a sign of life after which a client's connection ends.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Range(0, 65535)] = 8000
    image_keys: tuple[str, ...] = ("observation/image",)
    prompt_key: str = "prompt"
    unread_keys: tuple[str, ...] = ("observation/wrist_image", "observation/state")
    image_sizes: tuple[str, ...] = ("224x224", "256x256")
    chunk: Count = 8
    max_message_mb: Positive = 50.0
    max_clients: Count = 16
    client_timeout_s: Positive = 60.0

    @property
    def frame_shapes(self) -> tuple[tuple[int, int], ...]:
        """`image_sizes` as (height, width).

        Raises:
            ValueError: one is not "HEIGHTxWIDTH".
        """
        pairs = (size.split("x") for size in self.image_sizes)
        return tuple((int(height), int(width)) for height, width in pairs)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a run.

    Attributes:
        algorithm: "grpo" or "ppo", set by the preset file; or code of your own, as
            "module:attribute" (docs/plug_in.md).
        algo: the configuration of that algorithm.
        seed: seed of all random numbers: starts, actions, noise, order of samples.
        world: folder of a world, or its address on the Hugging Face Hub; "" = none. It fills the
            fields that it knows: paths, cameras, horizon and the like (docs/own_simulator.md). A
            preset's values give way to it; flags override both. A flag that contradicts what the
            world's parts were trained for is refused.
    """

    algorithm: str
    algo: Any
    seed: CountOrZero = 0
    world: str = ""
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
    serve: ServeConfig = field(default_factory=ServeConfig)

    @property
    def envs_per_process(self) -> int:
        """Environments of one simulator process."""
        return self.env.num_envs // (self.cluster.num_nodes * self.simulator.processes)

    @property
    def episodes_per_iteration(self) -> int:
        """Episodes that one update learns from."""
        return self.env.num_envs * self.rollout.epochs
