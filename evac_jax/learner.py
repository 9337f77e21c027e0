"""Owns the policy on the trainer's devices: imports it, samples with it, updates it.

    learner = Learner(config, mesh, episode)
    learner.begin_to_compile()                 # in a thread
    learner.meet(simulators.spec)              # once the simulators run

There are two jitted functions, of `programs.py`: `sample`, and the algorithm's update, whose state
is donated. If other devices decide than learn, or if sampling continues during an update, `sample`
uses its own copy of the parameters, made by `sync`. Inputs and outputs are this host's rows.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from algos.optim import global_norm, make_optimizer
from algos.types import RolloutBatch, TrainState, WeightedMetric
from evac_jax import programs
from evac_jax.bridge.types import EnvSpec
from evac_jax.config.schema import TrainConfig
from evac_jax.devices import sharding
from evac_jax.errors import ConfigError
from evac_jax.policy_import import import_policy
from evac_jax.shapes import EpisodeShapes, batch_shapes
from evac_jax.simulators import BatchStep
from evac_jax.telemetry.progress import told
from policies.types import ObsBatch, PolicyOutput


class Learner:
    """The policy, its optimiser and everything that runs on the trainer's mesh.

    Args:
        config: of the run.
        mesh: devices of parameters and batches.
        episode: what the policy sees and does.
        rollout_mesh: mesh of the devices that sample; None = `mesh`.

    Attributes:
        state: `algos.types.TrainState`, the only thing that training changes.
        batch_shapes: of one iteration, `RolloutBatch` of `jax.ShapeDtypeStruct`s.

    Raises:
        CheckpointError: the start policy cannot be imported.
    """

    def __init__(
        self,
        config: TrainConfig,
        mesh: jax.sharding.Mesh,
        episode: EpisodeShapes,
        rollout_mesh: jax.sharding.Mesh | None = None,
    ):
        self._config, self._mesh, self._rollout_mesh = config, mesh, rollout_mesh or mesh
        loaded = import_policy(
            config.policy,
            seed=config.seed,
            chunk=episode.chunk,
            num_images=episode.image_shape[0],
            shardings=partial(sharding.leaf_sharding, mesh),
        )
        self._action_spec, self._tokenizer = loaded.model.action_spec, loaded.tokenizer
        self.batch_shapes = batch_shapes(config, loaded.model.config, episode)
        self._episode, self._compiling = episode, None
        self._seen: tuple | None = None  # by the policy at its last training decision
        self.has_value_head = config.policy.value_head != "none"

        graphdef, params, self._rest = nnx.split(loaded.model, nnx.Param, ...)
        optimizer = make_optimizer(config.optim)
        self.state = self._initial_state(params, optimizer)
        self._optimizer_shardings = jax.tree.map(lambda x: x.sharding, self.state.opt_state)
        self._sample = programs.sample_program(config, self._rollout_mesh, graphdef)
        self._update = programs.update_program(config, mesh, graphdef, optimizer, self.state)
        self._is_finite = jax.jit(lambda tree: jnp.isfinite(global_norm(tree)))
        self._deciding_rest = self._rest
        if self._rollout_mesh != mesh:
            self._deciding_rest = sharding.move(self._rollout_mesh, self._rest)
        self.sync()

    def meet(self, env: EnvSpec, *others: EnvSpec) -> None:
        """Check the simulators' spec before the first decision, and tokenise the instructions once.

        Args:
            env: of the simulators that learning uses.
            others: of further ones that the policy plays in. Task numbers mean something within
                one simulator only, so each has prompts of its own instructions.

        Raises:
            ConfigError: policy and simulator do not fit together, or a prompt is too long.
        """
        for spec in (env, *others):
            if self._action_spec != spec.action:
                raise ConfigError(
                    f"policy and simulator disagree about actions: {self._action_spec} against "
                    f"{spec.action}; use a checkpoint and a world model of the same chunk and "
                    "dimensions"
                )
        if (came := EpisodeShapes.of(env)) != self._episode:
            raise ConfigError(
                f"simulator: expected {self._episode} from world_model.checkpoint, got {came}"
            )
        try:
            self._prompts = {
                texts: tuple(jnp.asarray(part) for part in self._tokenizer.encode(list(texts)))
                for texts in {spec.instructions for spec in (env, *others)}
            }
        except ValueError as error:  # `known_tasks` does not know all instructions beforehand
            raise ConfigError(f"config.policy: {error}") from error

    def begin_to_compile(self) -> None:
        """Compile the update in a thread, while simulators start and imagine the first episodes.

        If JAX finds the program in the cache on disk, it only traces and loads it. The first
        `start_update` waits for the thread and raises its errors.
        """

        def shape(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

        state, rest = jax.tree.map(shape, (self.state, self._rest))
        batch = self.rows_like(self.batch_shapes)
        key = jax.eval_shape(lambda: jax.random.key(0))
        # A later call of the jitted function finds the result in JAX's own tables.
        thread = ThreadPoolExecutor(1, "compile")
        self._compiling = thread.submit(
            lambda: self._update.lower(state, rest, batch, key).compile()
        )
        thread.shutdown(wait=False)

    def _initial_state(self, params, optimizer) -> TrainState:
        """Build the state directly on its shards; no array is ever whole on one device."""
        init = programs.initial_state(self._config, optimizer)
        shapes = jax.eval_shape(init, params)
        shardings = sharding.tree_shardings(self._mesh, shapes)
        logging.info("placement:\n%s", sharding.describe(shapes, shardings))
        # Donated: without it the imported parameters would stay on the devices a second time.
        return jax.jit(init, out_shardings=shardings, donate_argnums=0)(params)

    def observe(self, step: BatchStep) -> ObsBatch:
        """Return what the policy sees; the frames are copied, so the simulator's slot is free."""
        tokens, mask = self._prompts[step.instructions]
        rows = jnp.asarray(np.maximum(step.result.task, 0))
        return ObsBatch(
            images=jnp.array(step.frames, copy=True),
            # Prompts stay where JAX puts them: they are small, and `sample` shards them.
            prompt_tokens=tokens[rows],
            prompt_mask=mask[rows],
        )

    def sample(
        self, obs: ObsBatch, key: jax.Array, rows: np.ndarray, *, evaluation: bool = False
    ) -> PolicyOutput:
        """Decide on a chunk for the environments `rows`, with the temperature of the purpose.

        That is the temperature of training or of evaluation (0 = greedy).
        """
        policy, mesh = self._config.policy, self._rollout_mesh
        temperature = policy.eval_temperature if evaluation else policy.temperature
        names = jnp.asarray(rows, jnp.int32)
        obs, names = sharding.to_global(mesh, sharding.lay(mesh, (obs, names)))
        if not evaluation:
            self._seen = obs, key, names
        out = self._decide(obs, key, names, temperature or 1.0, greedy=temperature == 0)
        return sharding.to_local(mesh, out)

    def _decide(self, *arguments, greedy: bool) -> PolicyOutput:
        params = self.state.params if self._deciding is None else self._deciding
        return self._sample(params, self._deciding_rest, *arguments, greedy=greedy)

    def is_sound(self) -> bool:
        """Whether parameters, and what they decide on the last training observation, are finite.

        A parameter beyond 1e19, whose square is not finite in float32, counts as not finite.
        """
        checked = [bool(self._is_finite(self.state.params))]
        if self._seen is not None:
            out = self._decide(*self._seen, self._config.policy.temperature, greedy=False)
            checked.append(bool(self._is_finite((out.log_probs, out.values))))
        return all(checked)

    def values(self, obs: ObsBatch) -> jax.Array:
        """Return the value estimates [B v], for the bootstrap after the last chunk."""
        values = self.sample(obs, jax.random.key(0), np.arange(len(obs.images))).values
        assert values is not None, "the policy has no value head"
        return values

    def put(self, batch: Any) -> Any:
        """Shard this host's rows of a tree, such as a batch, over the mesh along the first axis."""
        return sharding.to_global(self._mesh, sharding.lay(self._mesh, batch))

    def own_rows(self, batch: Any) -> Any:
        """Undo `put`: return this host's rows."""
        return sharding.to_local(self._mesh, batch)

    def rows_like(self, shapes: Any) -> Any:
        """Return `shapes` (a tree of `jax.ShapeDtypeStruct`s) placed as `put` places arrays."""
        return programs.on_rows(self._mesh, shapes)

    def sync(self) -> None:
        """Decide with the newest parameters from now on.

        The sampler gets a copy if it has its own devices, or if it continues during updates:
        an update consumes the parameters.
        """
        self._deciding = None
        if self._rollout_mesh != self._mesh:
            self._deciding = sharding.move(self._rollout_mesh, self.state.params)
        elif self._config.train.max_staleness:
            self._deciding = jax.tree.map(jnp.copy, self.state.params)

    def park_optimizer(self) -> None:
        """Move the optimiser's state to the host until the next update."""
        self._move_optimizer(
            jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), self._optimizer_shardings)
        )

    def _move_optimizer(self, shardings) -> None:
        self.state = self.state.replace(opt_state=jax.device_put(self.state.opt_state, shardings))

    def start_update(self, batch: RolloutBatch, key: jax.Array) -> dict[str, WeightedMetric]:
        """Begin to learn from one iteration's batch; return the metrics as they will be.

        Until `sync` the sampler continues with its copy of the parameters, if it has one.
        """
        offload = self._config.cluster.offload
        if "optimizer" in offload:
            self._move_optimizer(self._optimizer_shardings)
        if "sampler" in offload:
            self._deciding = None
        if self._compiling:
            if not self._compiling.done():
                with told("waiting until the update is compiled"):
                    self._compiling.result()
            self._compiling.result()
            self._compiling = None
        self.state, metrics = self._update(self.state, self._rest, batch, key)
        return metrics

    def finish_update(self, metrics: dict[str, WeightedMetric]) -> dict[str, float]:
        """Wait for an update, `sync` the sampler, and return the metrics (one transfer)."""
        figures = {name: float(m.mean()) for name, m in jax.device_get(metrics).items()}
        if "optimizer" in self._config.cluster.offload:
            self.park_optimizer()
        self.sync()
        return figures

    def update(self, batch: RolloutBatch, key: jax.Array) -> dict[str, float]:
        """`start_update`, then `finish_update`."""
        return self.finish_update(self.start_update(batch, key))
