"""Settings of the world-model environment, checked before anything is loaded."""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from pathlib import Path

from evac_jax.config import import_string
from evac_jax.config.vlm import VlmConfig
from evac_jax.errors import ConfigError
from evac_jax.evac.sampler import check_solver
from evac_jax.sim.actions import GRIPPER_RULES
from evac_jax.sim.episodes import EpisodeRules

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class WorldModelEnvConfig:
    """All settings of `WorldModelEnv`.

    They have the names of the configuration's fields; only what is called `checkpoint` there is
    called after its section here.

    Attributes:
        world_model: folder of an EVAC world model (weights and config.json).
        judge: "classifier", "vlm" or an import string, see `RewardConfig` in
            evac_jax/config/schema.py.
        reward: folder of a success classifier, or of several, joined by commas; or of the
            vision-language model.
        vlm: how that model is asked.
        vlm_chunk: frames of a chunk for which its threshold was found; 0 = not known.
        veto: see `RewardEnsemble`; 0 = none.
        pose_model: folder of an action predictor.
        initial_states: source of start frames, a key of `INITIAL_STATES`.
        initial_states_path: folder that it reads; "" = it reads none.
        keyframe_data: folder of a recording whose episodes may be begun in their middle; "" = none.
        num_envs: environments imagined as one batch, B.
        steps: denoising steps of one chunk.
        eta: noise of the steps, 0 (deterministic given the start noise) to 1.
        solver: solver of the denoising steps, see `evac.sampler.solve`.
        compile: see `evac.cpu.packed.accelerate`.
        max_episode_steps: actions of an episode; a multiple of the chunk makes the limit exact.
        coefficient, relative, threshold, success_frames, ignore_terminations:
            see `EpisodeRules`; with "vlm" the threshold is a log-probability, at most 0.
        judged_frames: last frames of every chunk that are decoded and judged, 0 = all. Success that
            persists is visible in the last ones too. The others then cost nothing and count as
            failures. Filmed environments are decoded whole.
        auto_reset: restart an environment as soon as its episode is over, from the next start of
            a seeded cycle over the starts handed to `reset`; groups are not kept together then.
        skip_finished: do not imagine environments whose episode is over. Saves time only: the
            noise of every environment is drawn first, so the others see the same numbers.
        max_batch: environments imagined in one call of the world model, 0 = all; bounds memory
            and changes no result.
        gripper: what to do with the policy's gripper entry, a key of `GRIPPER_RULES`.
        camera: None for the one that the initial states know; "libero" for the reference's;
            or {"intrinsic": [V 3 3], "c2w": [V 4 4]}, V may be left out for one view.
        clip_envs: environments (the first ones) that send whole chunks of frames, for videos.
        device: torch device.
        dtype: precision of the world model's networks.
        seed: added to the seed of every reset, so that simulators of one run differ.
        reference_compat: numbers of the reference environment instead of the corrected ones:
            raw action predictor, pose buffer one row early, `EpisodeRules.reference_compat`, and
            with auto_reset one finished episode restarts all.
        shared_conditioning_image: condition every environment on the start image of
            environment 0, as the unrepaired reference does.
    """

    world_model: str = ""
    judge: str = "classifier"
    reward: str = ""
    vlm: VlmConfig = dataclasses.field(default_factory=VlmConfig)
    vlm_chunk: int = 0
    veto: float = 0.0
    pose_model: str = ""
    initial_states: str = ""
    initial_states_path: str = ""
    keyframe_data: str = ""
    num_envs: int = 1
    steps: int = 50
    eta: float = 1.0
    solver: str = "ddim"
    compile: bool = False
    max_episode_steps: int = 256
    coefficient: float = 5.0
    relative: bool = True
    threshold: float = 0.5
    success_frames: int = 1
    judged_frames: int = 0
    auto_reset: bool = False
    ignore_terminations: bool = False
    skip_finished: bool = True
    max_batch: int = 0
    gripper: str = "libero"
    camera: str | dict | None = None
    clip_envs: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    reference_compat: bool = False
    shared_conditioning_image: bool = False

    def __post_init__(self):
        problems = []
        if self.num_envs < 1:
            problems.append(f"num_envs: expected at least 1, got {self.num_envs}")
        if not 0 <= self.clip_envs <= self.num_envs:
            problems.append(f"clip_envs: expected 0..num_envs, got {self.clip_envs}")
        if self.steps < 1:
            problems.append(f"steps: expected at least 1, got {self.steps}")
        if not 0 <= self.eta <= 1:
            problems.append(f"eta: expected 0..1, got {self.eta}")
        try:
            check_solver(self.solver, self.eta)
        except ConfigError as error:
            problems.append(str(error))
        if self.judged_frames < 0:
            problems.append(f"judged_frames: expected 0 (all) or more, got {self.judged_frames}")
        if 0 < self.judged_frames < self.success_frames:
            problems.append(
                f"judged_frames: {self.judged_frames} frames can never show success_frames = "
                f"{self.success_frames} in a row"
            )
        if not 0 <= self.veto <= 1:
            problems.append(f"veto: expected 0..1, got {self.veto}")
        if self.judge == "vlm":
            problems += self._vlm_problems()
        if self.max_batch < 0:
            problems.append(f"max_batch: expected 0 (all) or more, got {self.max_batch}")
        if self.gripper not in GRIPPER_RULES:
            problems.append(
                f"gripper: expected one of {sorted(GRIPPER_RULES)}, got {self.gripper!r}"
            )
        if self.dtype not in DTYPES:
            problems.append(f"dtype: expected one of {DTYPES}, got {self.dtype!r}")
        try:
            self.rules  # noqa: B018 - its own checks
        except ConfigError as error:
            problems.append(str(error))
        if problems:
            raise ConfigError("world-model environment:\n" + "\n".join(problems))

    @property
    def rules(self) -> EpisodeRules:
        """The part that turns scores into rewards and ends."""
        names = [f.name for f in dataclasses.fields(EpisodeRules)]
        values = {name: getattr(self, name) for name in names}
        if self.judge == "vlm":
            values["threshold"] = math.exp(min(self.threshold, 0.0))
        return EpisodeRules(**values)

    def _vlm_problems(self) -> list[str]:
        """Settings that a vision-language model cannot judge with."""
        found = [f"vlm.{problem}" for problem in self.vlm.problems()]
        if not self.threshold <= 0:
            found.append(
                f"threshold: expected a log-probability, at most 0, got {self.threshold}; "
                "evac_jax.tools.reward.vlm_threshold finds one"
            )
        for name, expected in (("success_frames", 1), ("veto", 0), ("reference_compat", False)):
            if (value := getattr(self, name)) != expected:
                found.append(f"{name}: expected {expected} with judge='vlm', got {value}")
        return found

    @classmethod
    def from_dict(cls, values: dict) -> "WorldModelEnvConfig":
        """Build from plain values.

        Raises:
            ConfigError: for unknown keys (with the nearest valid ones), impossible values, or
                weight folders that do not exist, all of them in one message.
        """
        valid = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(values.keys() - set(valid)):
            hints = []
            for key in unknown:
                near = difflib.get_close_matches(key, valid, 1)
                hints.append(f"{key}" + (f" (did you mean {near[0]}?)" if near else ""))
            raise ConfigError(
                f"world-model environment: unknown keys {', '.join(hints)}; "
                f"valid keys are {', '.join(valid)}"
            )
        if isinstance(vlm := values.get("vlm"), dict):
            values = values | {"vlm": VlmConfig(**vlm)}
        config = cls(**values)
        needed = {name: getattr(config, name) for name in ("world_model", "pose_model")}
        if config.reward or not import_string.is_one(config.judge):
            folders = enumerate(config.reward.split(","))
            needed |= {"reward" + f"[{i}]" * (i > 0): folder for i, folder in folders}
        for name in ("initial_states_path", "keyframe_data"):
            needed |= {name: path} if (path := getattr(config, name)) else {}
        missing = [
            f"{name}: {value!r} does not exist" if value else f"{name}: not set"
            for name, value in needed.items()
            if not value or not Path(value).exists()
        ]
        if missing:
            raise ConfigError("world-model environment: files are missing:\n" + "\n".join(missing))
        return config
