"""The training loop, top to bottom: rollout in imagination, advantages, update, save, evaluate."""

import contextlib
import time
from collections.abc import Iterator

import jax
from absl import logging

from evac_jax import checkpoint
from evac_jax.checkpoint import Checkpoints
from evac_jax.config import hub
from evac_jax.config.schema import TrainConfig
from evac_jax.devices import hosts, together
from evac_jax.errors import BridgeTimeoutError, SimulatorError, TrainingError
from evac_jax.evaluate import Evaluators
from evac_jax.learner import Learner
from evac_jax.memory import mesh
from evac_jax.policy_import import check_card, check_libero, check_policy, known_tasks
from evac_jax.rollout import Collector, iteration_key
from evac_jax.run import Run, is_due
from evac_jax.run_folder import RunFolder
from evac_jax.shapes import EpisodeShapes, check_sizes, expected_episode
from evac_jax.simulators import Simulators, started
from evac_jax.starts import check_ranges, ids_in_ground_truth
from evac_jax.stopping import Stopping, begin_again
from evac_jax.telemetry.progress import told, told_if_long
from evac_jax.telemetry.stopwatch import Stopwatch
from evac_jax.twin import Twin

COMPILATIONS = "log/compilations"


def run(config: TrainConfig) -> None:
    """Train from the start, or from a checkpoint, to `train.iterations`; print the summary.

    Raises:
        StoppedError: a signal ended the run; what is complete is saved.
        StorageError: the run's folder cannot be written to.
    """
    began = time.perf_counter()
    hosts.start(config)
    chosen = together.all_or_none("choosing the run's folder", lambda: RunFolder.choose(config))
    if chosen.is_finished:
        logging.info(
            "%s is done: it has its %d iterations and its summary. To train on, raise "
            "--config.train.iterations",
            chosen.path,
            config.train.iterations,
        )
        return
    with contextlib.ExitStack() as stack:
        folder = _claimed(stack, chosen)
        folder.announce()
        stopping = Stopping(config.train.stop_grace_s, folder.how_to_go_on)
        stack.enter_context(stopping)
        learner, imagined, real = stack.enter_context(_ready(config, folder))
        watch = Stopwatch()
        collector = Collector(config, learner, imagined, watch)
        twin = Twin(config, real)
        evaluators = Evaluators(config, learner, imagined, real)
        record = Run(folder, learner, collector, twin, stopping)
        if record.owes_evaluation:
            logging.info("first the evaluation of iteration %d", record.finished)
            record.log_evaluation(record.finished, evaluators.run())
        if "optimizer" in config.cluster.offload:
            learner.park_optimizer()
        with stopping.held():
            iterate(config, record, learner, collector, twin, evaluators, watch)
            record.close()
        record.summarise(time.perf_counter() - began)


def iterate(
    config: TrainConfig,
    run: Run,
    learner: Learner,
    collector: Collector,
    twin: Twin,
    evaluators: Evaluators,
    watch: Stopwatch,
) -> None:
    """Go through the iterations that are left; each one is logged, some are saved and evaluated."""
    compiled = hosts.Compilations()
    logging.info(
        "training: %d episodes an iteration; the first iteration also compiles",
        config.episodes_per_iteration,
    )
    with run.progress() as bar:
        for iteration in range(run.finished, config.train.iterations):
            done = iteration + 1
            with watch.timed("step"):
                programs = compiled.count
                collecting = told_if_long(f"iteration {done}: collecting episodes")
                with run.saved_if_it_ends(iteration), collecting:
                    batch, figures, played = collector.take(iteration)
                    with watch.timed("twin"):
                        figures |= twin.check(iteration, played)
                with watch.timed("actor"):
                    update = learner.start_update(batch, iteration_key(config.seed, iteration))
                collector.begin(done)
                failed = None
                try:
                    run.cut_short(collector.collect_ahead)
                except (TrainingError, SimulatorError, BridgeTimeoutError) as error:
                    if jax.process_count() > 1:  # the other hosts wait for this one
                        raise
                    failed = error
                updating = told_if_long(f"iteration {done}: updating the policy")
                with watch.timed("actor"), updating:
                    figures |= learner.finish_update(update)
                figures[COMPILATIONS] = float(compiled.count - programs)
            run.log(done, figures, watch.take())
            if failed:  # only now is this iteration finished, and can be saved
                with run.saved_if_it_ends(done):
                    raise failed
            last = done == config.train.iterations or run.stuck or twin.must_stop
            if last or is_due(done, config.checkpoint.interval):
                run.save(done)
            if last or is_due(done, config.eval.interval):
                with run.saved_if_it_ends(done):
                    outcome = evaluators.run()
                run.log_evaluation(done, outcome)
            run.show(bar)
            if last:
                run.stop()
                break


def evaluate_only(config: TrainConfig) -> None:
    """Evaluate the imported policy, or a restored run's, and print the success rates.

    The result is written to a folder of its own, <log.dir>/<log.run or "eval-<date>-<time>">, as
    evaluation.json; a restored run is not changed.

    Raises:
        CheckpointError: there is no such run, it lacks the iteration `checkpoint.step`, or the
            result's folder holds one already.
        StoppedError: a signal ended the evaluation.
    """
    hosts.start(config)
    restored = None
    if config.checkpoint.restore:
        restored = RunFolder.at(config, checkpoint.named_run(config), resumed=True)
        # Asked again below: a run that goes on meanwhile may have a newer one then.
        checkpoint.existing(restored.checkpoints, config.checkpoint.step)
    with contextlib.ExitStack() as stack:
        chosen = together.all_or_none(
            "choosing the evaluation's folder", lambda: RunFolder.for_evaluation(config, restored)
        )
        folder = _claimed(stack, chosen, saves=False)
        stack.enter_context(Stopping(config.train.stop_grace_s, begin_again))
        learner, imagined, real = stack.enter_context(_ready(config, None))
        iteration = 0
        if restored:
            checkpoints = Checkpoints(restored.checkpoints, keep=None)
            iteration = checkpoints.existing(config.checkpoint.step)
            learner.state, _ = checkpoints.restore(iteration, learner.state, run_id=restored.run_id)
            learner.sync()
        outcome = Evaluators(config, learner, imagined, real).run()
        folder.finish_evaluation(iteration, outcome, restored)


def _claimed(stack: contextlib.ExitStack, folder: RunFolder, *, saves: bool = True) -> RunFolder:
    """Claim a folder until `stack` ends: host 0 does, and the others hear of it if it cannot."""
    return together.all_or_none(
        f"claiming {str(folder.path)!r}",
        lambda: stack.enter_context(folder.claimed(saves=saves)),
    )


@contextlib.contextmanager
def _ready(
    config: TrainConfig, folder: RunFolder | None
) -> Iterator[tuple[Learner, Simulators, Simulators | None]]:
    """Import the policy while the simulators start; yield both when all are ready.

    Args:
        folder: of the run that trains; None starts no more than an evaluation needs.
    """
    # Before simulators take minutes to start.
    check_ranges(config, learning=folder is not None)
    if folder and config.eval.twin_fraction:
        ids_in_ground_truth(config)
    check_policy(config.policy, known_tasks(config))
    check_libero(config)
    episode = expected_episode(config)
    asked = {"gripper": ("env.gripper", config.env.gripper)}
    if episode:
        asked |= {"chunk": ("world_model.checkpoint", episode.chunk)}
    check_card(config.policy, **asked)
    config = mesh.for_devices(config, episode, hosts.devices_for(config, "actor"))
    meshes = hosts.make_meshes(config)
    if episode and folder:
        check_sizes(config, *meshes, episode)
    with contextlib.ExitStack() as stack:
        logging.info("starting the simulators; each loads its weights")
        pools = started(config, meshes[1], learning=folder is not None)
        imagined, real = stack.enter_context(pools)
        if folder:
            stack.enter_context(hosts.one_for_all(config, folder.how_to_go_on))
        if not episode:
            episode = EpisodeShapes.of(imagined.wait_until_ready().spec)
            if folder:
                check_sizes(config, *meshes, episode)
        with told(f"loading the policy {hub.address_of(config.policy.checkpoint)}"):
            learner = Learner(config, meshes[0], episode, meshes[1])
        if folder:
            logging.info("compiling the update meanwhile")
            learner.begin_to_compile()  # the simulators read their weights meanwhile
        with told("waiting for the simulators to load"):
            for pool in filter(None, (real, imagined)):
                pool.wait_until_ready()
        specs = [pool.spec for pool in (imagined, real) if pool]
        offered = [(spec.instructions, spec.num_starts, spec.num_keyframes) for spec in specs]
        together.compare("the simulators' instructions, starts and keyframes", offered)
        learner.meet(*specs)
        yield learner, imagined, real
