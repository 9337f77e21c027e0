"""The RL environment inside a world model: actions in, imagined frames and rewards out.

One chunk: gripper rule, poses, world model, success classifier, rewards. Everything stays on the
world model's device, batched over environments; only a few numbers per environment go to the host.
Corrected behaviour is the default; `reference_compat` reproduces the reference's numbers.

Source: behaviour of RLinf `EvacEnv` (revision c9f1d8471). Deliberate differences: 1. each
environment is conditioned on its own start image; 2. the pose window slides, and poses come from
the standardised action predictor; 3. starts are handed in, so that a group can share one;
4. success needs an explicit threshold and is latched; 5. episodes end, are truncated and restart
one by one, and the figures of a finished episode are reported; 6. out-of-range frames are clamped
before the classifier; 7. noise is seeded.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from evac_jax.bridge.environment import IDLE, EnvSpec, StepResult, whole_part
from evac_jax.errors import ConfigError, DataError, SimulatorError
from evac_jax.evac.cpu.packed import accelerate
from evac_jax.evac.model import Camera, EvacModel, EvacState
from evac_jax.evac.model_folders import load_model
from evac_jax.sim.actions import (
    POSE_DIM,
    PoseWindow,
    apply_gripper_rule,
    both_arms,
    integrate_poses,
)
from evac_jax.sim.camera import resolve_camera
from evac_jax.sim.env_config import WorldModelEnvConfig
from evac_jax.sim.episodes import ChunkOutcome, EpisodeStates
from evac_jax.sim.initial_states import InitialStates, StartCycle, make_initial_states
from evac_jax.sim.noise import ChunkNoise
from evac_jax.sim.pixels import to_model_range, to_uint8
from evac_jax.sim.pose_model import PoseModel
from evac_jax.sim.recorded_starts import WithKeyframes, open_keyframes
from evac_jax.sim.reward import Judge, make_judge, watch
from policies.spec import ActionSpec

ACTION_DIM = 7
CHECKED_STARTS = 16  # initial poses that are compared with what the pose model knows


class WorldModelEnv:
    """A batch of imagined environments; implements `evac_jax.bridge.environment.Environment`.

    Args:
        world_model: an `EvacModel` on its device, in eval mode.
        reward_model: judges what is imagined; task numbers are the source's.
        pose_model: the action predictor.
        source: initial states; their instructions are the environment's.
        config: settings; the weight folders in it are not read here.
        block: (first row, rows in all) where this is a part of a larger batch: noise is drawn for
            all of them; default: the whole.

    An episode that restarts by itself does so from the next start of a cycle over the ids handed
    to `reset`, shuffled (seeded) on every round. Frames, task and pose in the result are then the
    new episode's, while rewards, flags and figures are still the finished one's.
    """

    def __init__(
        self,
        world_model: EvacModel,
        reward_model: Judge,
        pose_model: PoseModel,
        source: InitialStates,
        config: WorldModelEnvConfig,
        block: tuple[int, int] | None = None,
    ):
        model = world_model.config
        if config.judged_frames > model.chunk:
            raise ConfigError(
                f"judged_frames: expected at most the chunk of {model.chunk} frames, got "
                f"{config.judged_frames}"
            )
        if config.vlm_chunk not in (0, model.chunk):
            raise ConfigError(
                f"reward.checkpoint: its threshold was found for chunks of {config.vlm_chunk} "
                f"frames, the world model imagines {model.chunk}; find one with "
                f"evac_jax.tools.reward.vlm_threshold --chunk={model.chunk}"
            )
        self._model, self._reward_model, self._source = world_model, reward_model, source
        self._config, self._device = config, torch.device(config.device)
        self._pose_model, self._parked = pose_model, False
        self._advance = pose_model if config.reference_compat else pose_model.get_ee_pose
        self._size, self._chunk, self._views = model.image_size, model.chunk, model.n_view
        channels = model.autoencoder.latent_channels
        self._first, total = block or (0, config.num_envs)
        self._noise_shape = (total, self._views, channels, self._chunk, *model.latent_size)
        self.spec = EnvSpec(
            num_envs=config.num_envs,
            image_shape=(self._views, *self._size, 3),
            proprio_dim=POSE_DIM,
            action=ActionSpec(dim=ACTION_DIM, chunk=self._chunk),
            instructions=tuple(source.instructions),
            num_starts=source.num_starts,
            max_episode_steps=config.max_episode_steps,
            clip_envs=config.clip_envs,
            num_keyframes=getattr(source, "num_keyframes", 0),
            notes=getattr(reward_model, "notes", ()),
        )
        known, size = source.camera, source.camera_size
        if config.camera is None and size is not None and tuple(size) != tuple(self._size):
            raise ConfigError(
                f"initial states: their camera is for {size} images, the world model has "
                f"{self._size}; use the same size"
            )
        intrinsic, c2w = resolve_camera(config.camera, known, self._views)
        self._camera = Camera(
            intrinsic=torch.from_numpy(intrinsic)[None].to(self._device),
            c2w=torch.from_numpy(c2w)[None].to(self._device),
        )
        self._capacity = -(-config.max_episode_steps // self._chunk)  # chunks of an episode
        self._watch = watch(reward_model, config.num_envs, self._capacity)
        self.episodes = EpisodeStates(config.num_envs, config.rules, self._device)
        self.window = PoseWindow(
            config.num_envs,
            model.n_previous,
            self._chunk,
            self._device,
            shifted=config.reference_compat,
        )
        self.state: EvacState | None = None  # the model's memory of all but the idle environments
        self._last = torch.zeros(
            config.num_envs, *self.spec.image_shape, dtype=torch.uint8, device=self._device
        )
        self._task = np.zeros(config.num_envs, np.int32)
        self.noise: ChunkNoise | None = None  # None before the first reset
        self._seconds: dict[str, float] = {}

    def parts(self, count: int) -> "list[WorldModelEnv]":
        """Cut into environments that share the networks; see `Environment.parts`."""
        total = self.spec.num_envs
        config = dataclasses.replace(self._config, num_envs=whole_part(total, count))
        return [
            WorldModelEnv(
                self._model,
                self._reward_model,
                self._pose_model,
                self._source,
                config,
                block=(first, total),
            )
            for first in range(0, total, config.num_envs)
        ]

    @torch.no_grad()
    def reset(self, starts: np.ndarray, seed: int, frames: Tensor, clip: Tensor) -> StepResult:
        """Start every environment; see `Environment.reset`.

        Raises:
            DataError: for the wrong number of starts or an unknown one.
        """
        starts = np.asarray(starts, np.int64)
        if starts.shape != (self.spec.num_envs,):
            raise DataError(f"expected {self.spec.num_envs} start ids, got shape {starts.shape}")
        self._seconds = {}
        if self._parked:
            self._move(self._device)
        seeds = (self._config.seed, seed)
        self.noise, self._cycle = ChunkNoise(seeds, self._device), None
        idle, rows = starts == IDLE, np.flatnonzero(starts != IDLE)
        everyone = self._mask(np.arange(len(starts)))
        self.episodes.restart(everyone, torch.from_numpy(idle).to(self._device))
        self.state = None
        self._place = np.cumsum(~idle) - 1  # row of an environment in the state
        if len(rows):
            self._cycle = StartCycle(starts[rows], seeds)
            self._begin(rows, starts[rows])
        frames.copy_(self._last)
        clip[:, -1].copy_(self._last[: len(clip)])
        nothing = torch.zeros(len(starts), dtype=torch.bool)
        rewards = torch.zeros(len(starts), self._chunk)
        outcome = ChunkOutcome(rewards, nothing, nothing, nothing)
        return self._result(outcome, self.episodes.figures())

    @torch.no_grad()
    def step(self, actions: np.ndarray, frames: Tensor, clip: Tensor) -> StepResult:
        """Play one chunk of actions [B K 7]; see `Environment.step`.

        Raises:
            DataError: for actions of another shape, or before the first reset.
            SimulatorError: if imagined frames are not finite.
        """
        expected = (self.spec.num_envs, self._chunk, ACTION_DIM)
        if self.noise is None or np.shape(actions) != expected:
            raise DataError(
                f"expected a reset and then actions of shape {expected}, got "
                f"{'no reset' if self.noise is None else np.shape(actions)}"
            )
        self._seconds = {}
        rows = self._rows_to_imagine()
        with self._timed("poses"):
            moves = torch.as_tensor(actions, dtype=torch.float32).to(self._device)
            moves = apply_gripper_rule(moves, self._config.gripper)
            poses = integrate_poses(self._advance, moves, self.window.before_next)
            self.window.push(poses, self._mask(rows))
        probabilities = torch.zeros(len(moves), self._chunk, device=self._device)
        clip.copy_(self._last[: len(clip), None].expand_as(clip))
        batch = self._config.max_batch or max(len(rows), 1)
        for first in range(0, len(rows), batch):
            self._imagine(rows[first : first + batch], probabilities, clip)
        self.noise.next_chunk()
        if not bool(torch.isfinite(probabilities).all()):
            raise SimulatorError(
                f"{self._config.judge!r} gave probabilities of success that are not finite, so the "
                "world model's frames probably are not either; if dtype is not float32, try that "
                f"(it is {self._config.dtype}), else look at the actions and the weights"
            )
        outcome, figures = self.episodes.advance(probabilities), self.episodes.figures()
        if self._config.auto_reset:
            self._restart_finished(outcome)
        frames.copy_(self._last)
        return self._result(outcome, figures)

    def park(self) -> None:
        """Drop the episodes' state and move the networks to the host; see `Environment.park`."""
        self.state = self.noise = None
        self._move("cpu")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _move(self, device: torch.device | str) -> None:
        self._parked = device == "cpu"
        for network in (self._model, self._reward_model, self._pose_model):
            network.to(device)

    def close(self) -> None:
        """Drop the networks and the state."""
        self.state = self._model = self._reward_model = self._watch = None
        self._pose_model = self._advance = None

    def _rows_to_imagine(self) -> np.ndarray:
        """Environments that the world model must imagine in this chunk."""
        if self.state is None:
            return np.zeros(0, np.int64)
        wanted = self.episodes.running if self._config.skip_finished else ~self.episodes.idle
        rows = np.flatnonzero(wanted.cpu().numpy())
        # Only episodes that went on beyond their limit can have filled their history.
        places = self.state.latents.shape[1]
        stored = self.state.length[self._place[rows]].clamp(min=self._model.config.n_previous)
        return rows[(stored + self._chunk <= places).numpy()]

    def _begin(self, rows: np.ndarray, starts: np.ndarray) -> None:
        """Put environments `rows` at the starts of the given ids."""
        with self._timed("starts"):
            loaded = self._source.load(starts)
            self._pose_model.check_poses(loaded.poses)
            views = loaded.images.shape[1]
            if views != self._views:
                raise DataError(f"world model has {self._views} views, start frames have {views}")
            images = torch.from_numpy(loaded.images).to(self._device)
            begin = to_model_range(images, self._size)
            if self.state is None:
                # The state takes the type of its first frames, which must be the networks'.
                first = begin.to(getattr(torch, self._config.dtype))
                self.state = self._model.start(first, self._capacity)
            else:
                count = len(self.state.length)
                place = torch.from_numpy(self._place[rows])
                every = begin.new_zeros(count, *begin.shape[1:])
                every[place.to(self._device)] = begin
                mask = torch.zeros(count, dtype=torch.bool).index_fill(0, place, True)
                self.state = self._model.restart(self.state, every, mask)
            if self._config.shared_conditioning_image:
                self.state.tokens.copy_(self.state.tokens[:1].expand_as(self.state.tokens))
            index = torch.from_numpy(rows).to(self._device)
            self._last[index] = to_uint8(begin)
            self._watch.begin(rows, begin[:, 0])
            poses = torch.zeros(self.spec.num_envs, POSE_DIM, device=self._device)
            poses[index] = torch.from_numpy(loaded.poses).to(self._device)
            self.window.reset(poses, self._mask(rows))
            self._task = self._task.copy()
            self._task[rows] = loaded.task

    def _imagine(self, rows: np.ndarray, probabilities: Tensor, clip: Tensor) -> None:
        """One chunk of environments `rows`; fills their entries of the other arguments."""
        index = torch.from_numpy(rows).to(self._device)
        config, shape, named = self._config, self._noise_shape, index + self._first
        places = torch.from_numpy(self._place[rows])
        judged = config.judged_frames or self._chunk
        with self._timed("imagine"):
            self.state, frames = self._model.imagine(
                self.state,
                both_arms(self.window.poses[index]),
                self._camera,
                steps=config.steps,
                eta=config.eta,
                solver=config.solver,
                noise=self.noise(0, shape)[named],
                generator=lambda step: self.noise(1 + step, shape)[named],
                rows=places,
                decoded=judged,
            )  # [b V judged 3 H W]
        with self._timed("classify"):
            chances = torch.zeros_like(probabilities[index])
            chances[:, -judged:] = self._watch.judge(rows, frames[:, 0].float(), self._task[rows])
            probabilities[index] = chances
        with self._timed("frames"):
            self._last[index] = to_uint8(frames[:, :, -1])
            shown = int((rows < len(clip)).sum())  # rows are sorted
            if shown:
                whole = frames[:shown]
                if judged < self._chunk:
                    unseen = self._model.decode_history(
                        self.state, places[:shown], self._chunk, judged
                    )
                    whole = torch.cat((unseen, whole), 2)
                clip[rows[:shown]] = to_uint8(whole.transpose(1, 2)).to(clip.device)

    def _restart_finished(self, outcome: ChunkOutcome) -> None:
        done = (outcome.terminated | outcome.truncated) & ~self.episodes.idle
        if self._config.reference_compat and bool(done.any()):
            done = ~self.episodes.idle
        rows = np.flatnonzero(done.cpu().numpy())
        if len(rows):
            self.episodes.restart(done)
            self._begin(rows, self._cycle.next(len(rows)))

    def _mask(self, rows: np.ndarray) -> Tensor:
        mask = np.zeros(self.spec.num_envs, bool)
        mask[rows] = True
        return torch.from_numpy(mask).to(self._device)

    def _result(self, outcome: ChunkOutcome, figures: dict[str, Tensor]) -> StepResult:
        def host(tensor: Tensor) -> np.ndarray:
            return tensor.detach().cpu().numpy()

        with self._timed("to_host"):
            return StepResult(
                task=self._task,
                proprio=host(self.window.current.clone()),
                rewards=host(outcome.rewards.float()),
                terminated=host(outcome.terminated),
                truncated=host(outcome.truncated),
                success=host(outcome.success),
                episode={name: host(value) for name, value in figures.items()},
                seconds=self._seconds,
            )

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if self._device.type == "cuda":  # otherwise this time would count for the next phase
            torch.cuda.synchronize(self._device)
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - begin


def make(config: dict, source: InitialStates | None = None) -> WorldModelEnv:
    """Build the environment from plain values, the fields of `WorldModelEnvConfig`.

    `source` replaces the initial states that the values name.

    Raises:
        ConfigError: for settings that cannot work, missing files among them.
        CheckpointError: if weights do not fit.
        DataError: if the initial states cannot be read, or the pose model knows no such poses.
    """
    settings = WorldModelEnvConfig.from_dict(config)
    source = source or make_initial_states(settings.initial_states, settings.initial_states_path)
    if settings.keyframe_data:
        source = WithKeyframes(source, open_keyframes(settings.keyframe_data))
    device = settings.device
    dtype = getattr(torch, settings.dtype)
    pose_model = load_model(settings.pose_model, kind="PoseModel", device=device)
    some = np.arange(min(source.num_starts, CHECKED_STARTS))
    pose_model.check_poses(source.load(some).poses)
    world_model = load_model(settings.world_model, kind="EvacModel", device=device, dtype=dtype)
    return WorldModelEnv(
        accelerate(world_model, settings.compile),
        make_judge(settings, source.instructions),
        pose_model,
        source,
        settings,
    )
