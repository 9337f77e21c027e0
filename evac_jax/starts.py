"""Which initial states an iteration plays: groups of episodes that share their start.

NumPy only. The trainer draws ids here and hands them to a simulator, which alone knows what an
id means (a file, a scene seed). Training, evaluation and reporting use disjoint id ranges.
"""

import dataclasses
from pathlib import Path

import numpy as np

from evac_jax.bridge.types import KEYFRAMES
from evac_jax.config.schema import TrainConfig
from evac_jax.errors import ConfigError
from evac_jax.files import cards, libero_facts, start_frames
from evac_jax.files.libero_facts import NUMBERING

ORDERS = ("fixed", "ordered", "random")
Range = tuple[int, int]


def noise_seed(*numbers: int) -> int:
    """Return one seed in [0, 2**32) for (seed, iteration), (seed, epoch), (seed, rank) ..

    Sums would collide: epoch 1 of rank 0 would repeat the noise of epoch 0 of rank 1.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def range_of(name: str, ends: Range, available: int, source: str) -> Range:
    """Return a configured range of start ids with its end filled in.

    Args:
        name: of the field, for the message.
        ends: [low, high); high -1 = all there are.
        available: starts that there are.
        source: whose they are, for the message.

    Raises:
        ConfigError: a start of the range does not exist.
    """
    low, high = ends
    end = available if high == -1 else high
    if not 0 <= low < end <= available:
        raise ConfigError(
            f"config.{name}: expected a range within the {available} starts of {source}, got "
            f'({low}, {high}); set --config.{name}="(0, -1)" for all there are, or a part of them'
        )
    return low, end


def check_ranges(config: TrainConfig, *, learning: bool) -> None:
    """Refuse ranges of starts that do not exist, where a folder tells how many there are.

    Called before anything starts. Other sources tell when they run; `range_of` is then asked again.

    Args:
        config: of the run.
        learning: False if the run only evaluates, which draws no training starts.

    Raises:
        ConfigError: names every such range.
        DataError: the folder is no recording.
    """
    if config.env.simulator != "world_model":
        return
    available = start_frames.count(config.env.initial_states, config.env.initial_states_path)
    if available is None:
        return
    ranges = {"env.train_starts": config.env.train_starts} if learning else {}
    ranges |= {"eval.starts": config.eval.starts} if config.eval.episodes else {}
    problems = []
    for name, ends in ranges.items():
        try:
            range_of(name, ends, available, source_of(config))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


def source_of(config: TrainConfig) -> str:
    """Return where the starts of training come from, in words."""
    if config.env.simulator == "ground_truth":
        return f"eval.ground_truth={config.eval.ground_truth!r}"
    folder = config.env.initial_states_path
    return f"env.initial_states={config.env.initial_states!r}" + f" in {folder}" * bool(folder)


def ground_truth_range(config: TrainConfig) -> tuple[str, Range]:
    """Return the field that says where evaluations in the ground truth start, and its range.

    Start ids mean something within one source only, so `eval.starts` counts where imagination and
    ground truth share theirs.
    """
    own = config.eval.ground_truth_starts
    if own:
        low, high = own
        return "eval.ground_truth_starts", (low, high)
    if share_starts(config):
        return "eval.starts", config.eval.starts
    return "eval.ground_truth_starts", (0, -1)


def share_starts(config: TrainConfig) -> bool:
    """Whether a start id means the same in training as in evaluations in the ground truth."""
    same = config.env.initial_states == config.eval.ground_truth
    return config.env.simulator == "ground_truth" or same


def ids_in_ground_truth(config: TrainConfig) -> np.ndarray | None:
    """Return the ground truth's id of every start of training, int64; None where they are equal.

    Raises:
        ConfigError: nobody knows one of those that training draws, or they are of another
            simulator, or LIBERO's states are numbered otherwise.
    """
    if share_starts(config):
        return None
    kind, folder = config.env.initial_states, config.env.initial_states_path
    card = cards.read(Path(folder)) if kind == "npy" else {}
    ids = np.array(card.get(start_frames.STATES, ()), np.int64)
    low, high = config.env.train_starts
    drawn = ids[low : None if high == -1 else high]
    if len(ids) != start_frames.count(kind, folder) or (drawn < 0).any():
        raise ConfigError(
            f"config.eval.twin_fraction: {source_of(config)} does not tell of which of the ground "
            "truth's states its frames are, so nothing can be replayed there; pack recordings that "
            "--mode=collect made (tools.world.pack --starts), or set it to 0"
        )
    own = dataclasses.asdict(config.libero) if config.eval.ground_truth == "libero" else {}
    if unlike := libero_facts.differences(libero_facts.told(card), own, NUMBERING):
        raise ConfigError(
            f"config.libero, config.eval.ground_truth: {source_of(config)} numbers its states by "
            f"other settings, so a replay would begin in other states: {unlike} (None = not "
            "LIBERO's); set them as there"
        )
    return ids


class StartSampler:
    """Draws start ids from the half-open range [low, high), in groups.

    Members of a group get the same id, so they share first frame, pose and instruction; only
    the policy's sampling and the world model's noise differ between them. Otherwise a
    group-relative baseline would compare different tasks.

    Orders:
        "fixed": the same ids on every call, counted up from `low` and wrapping at `high`; for
            evaluations that must stay comparable.
        "ordered": counts on from where the last call stopped, wrapping; visits every start.
        "random": drawn without replacement within a call, with replacement when a call asks for
            more groups than there are starts. Call n depends on (seed, n) only, so a resumed run
            draws what an uninterrupted one would have drawn.

    Keyframes (frames in the middle of recorded episodes) take the place of a share of the groups,
    at random whatever the order.

    Args:
        keyframes: (share of the groups 0..1, how many there are).

    Raises:
        ConfigError: for an unknown order or an empty range.

    Source: replaces RLinf `EvacEnv.reset`, which draws a different episode for every member of a
    group and ignores seed, group size and order (rlinf/envs, revision c9f1d8471).
    """

    def __init__(
        self,
        low: int,
        high: int,
        *,
        order: str = "random",
        seed: int = 0,
        group_size: int = 1,
        keyframes: tuple[float, int] = (0.0, 0),
    ):
        if order not in ORDERS:
            raise ConfigError(f"start order: expected one of {ORDERS}, got {order!r}")
        if not 0 <= low < high:
            raise ConfigError(f"start range: expected 0 <= low < high, got [{low}, {high})")
        if seed < 0:
            raise ConfigError(f"start seed: expected a non-negative integer, got {seed}")
        if group_size < 1:
            raise ConfigError(f"group size: expected at least 1, got {group_size}")
        if keyframes[0] and not keyframes[1]:
            raise ConfigError("config.env.keyframes: the simulators offer no keyframes")
        self.group_size, self.keyframes = int(group_size), keyframes
        self.low, self.high, self.order, self._seed = int(low), int(high), order, int(seed)
        self._calls = 0
        self._cursor = 0

    @classmethod
    def from_config(
        cls, config: TrainConfig, num_starts: int, num_keyframes: int = 0
    ) -> "StartSampler":
        """Build the sampler of a run's training starts.

        Args:
            config: reads `env`, `seed` and `algo.group_size` (1 for algorithms without groups).
            num_starts: initial states that the simulators offer.
            num_keyframes: keyframes that they offer.

        Raises:
            ConfigError: if a start of the range does not exist.
        """
        ends = config.env.train_starts
        low, high = range_of("env.train_starts", ends, num_starts, source_of(config))
        group_size = getattr(config.algo, "group_size", 1)
        return cls(
            low,
            high,
            order=config.env.start_order,
            seed=config.seed,
            group_size=group_size,
            keyframes=(config.env.keyframes, num_keyframes),
        )

    def next(self, rows: int, num_envs: int) -> np.ndarray:
        """Return ids, int64 [rows, num_envs], members of a group side by side within a row.

        All rows belong to one call: with order "random" no start comes twice while there are
        enough of them.

        Raises:
            ConfigError: if a row cannot be filled with whole groups.
        """
        if rows < 1 or num_envs < 1 or num_envs % self.group_size:
            raise ConfigError(
                f"expected rows of whole groups of {self.group_size}, got {rows} of {num_envs}"
            )
        num_groups = rows * num_envs // self.group_size
        count = self.high - self.low
        if self.order == "random":
            rng = np.random.default_rng([self._seed, self._calls])
            groups = rng.choice(count, num_groups, replace=num_groups > count)
        else:
            first = self._cursor if self.order == "ordered" else 0
            groups = (first + np.arange(num_groups)) % count
            self._cursor = int(first + num_groups) % count
        groups = self.low + groups.astype(np.int64)
        share, available = self.keyframes
        if share:
            rng = np.random.default_rng([self._seed, self._calls, KEYFRAMES])
            late = rng.random(num_groups) < share
            groups = np.where(late, KEYFRAMES + rng.integers(available, size=num_groups), groups)
        self._calls += 1
        ids = np.repeat(groups, self.group_size)
        return ids.reshape(rows, num_envs)

    def seed(self, iteration: int, number: int = 0) -> int:
        """Return the seed of the simulators' noise in an iteration, 0 <= seed < 2**32.

        Args:
            number: of the collection within the iteration.
        """
        return noise_seed(self._seed, iteration, *[number] * (number > 0))

    def state_dict(self) -> dict:
        """Return everything a resumed run needs, as plain integers and strings."""
        return {
            "order": self.order,
            "seed": self._seed,
            "low": self.low,
            "high": self.high,
            "group_size": self.group_size,
            "keyframes": list(self.keyframes),
            "calls": self._calls,
            "cursor": self._cursor,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state` was taken.

        Raises:
            ConfigError: if the state belongs to other settings, so that the run would not continue
                the sequence.
        """
        own = self.state_dict()
        state = {"keyframes": [0.0, 0]} | state  # older checkpoints have none
        if missing := sorted(own.keys() - state.keys()):
            raise ConfigError(f"saved start sampler lacks {', '.join(missing)}")
        changed = [
            f"{name}: saved {state[name]!r}, configured {own[name]!r}"
            for name in ("order", "seed", "low", "high", "group_size", "keyframes")
            if state[name] != own[name]
        ]
        if changed:
            raise ConfigError(
                "cannot resume the start sampler with other settings; " + "; ".join(changed)
            )
        self._calls, self._cursor = int(state["calls"]), int(state["cursor"])
