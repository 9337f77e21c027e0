"""Supervised fine-tuning of OpenVLA-OFT's token head, on the tabletop or on recordings, in JAX.

On the tabletop every sample is from a new scene, so nothing can be memorised. A sample is the
picture at a step where the policy would decide, and the demonstrator's next actions. The targets of
the tokens are Gaussians over neighbouring bins; their width becomes the exploration noise at the
start of reinforcement learning.

    python -m evac_jax.tools.policy.train --out DIR --labels expert --steps 6000
    python -m evac_jax.tools.policy.train --start DIR --out DIR2 --labels sloppy --steps 800
    python -m evac_jax.tools.policy.train --start DIR --out DIR2 --lora_rank 8 --lr 3e-3
    python -m evac_jax.tools.policy.train --start DIR --out DIR2 --data RECORDING --unnorm_key robot
    python -m evac_jax.tools.policy.train --sizes NAME --out DIR --data RECORDING --unnorm_key robot

--data uses recorded episodes of any robot instead (docs/episodes.md, docs/lora.md), with --sizes
from random weights; --lora_rank trains only adapters.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx

from evac_jax.devices.malloc import keep_freed_memory
from evac_jax.files import cards
from evac_jax.files.atomic import whole_folder
from evac_jax.miniature import scene as world
from evac_jax.miniature.env import to_policy_actions
from evac_jax.miniature.expert import KINDS, Expert, demonstrate
from evac_jax.miniature.render import project, render
from evac_jax.miniature.sizes import POLICY
from evac_jax.miniature.tasks import COLORS, INSTRUCTIONS
from evac_jax.policy_import import told_as_checkpoint_error
from evac_jax.tools import sizes
from evac_jax.tools.command_line import Parser, refuse_existing, run_tool
from evac_jax.tools.policy.data import GRIPPER_RULES
from evac_jax.tools.policy.finetune import (
    CHECK_EVERY,
    check_start,
    check_trained,
    finetune,
    load_progress,
    make_optimizer,
    save_progress,
    soft_targets,
)
from policies.openvla_oft.action_tokens import ActionStatistics
from policies.openvla_oft.export_hf import create_policy_folder
from policies.openvla_oft.import_hf import load_policy
from policies.openvla_oft.model import OpenVLAOFT
from policies.openvla_oft.peft import save_adapter
from policies.openvla_oft.prompt import PromptTokenizer
from policies.types import ObsBatch

UNNORM_KEY = "miniature"
# Deltas use the whole range -1..1; the gripper, 0 (close) .. 1 (open), is not changed.
NORM_STATS = {
    UNNORM_KEY: {
        "action": {"q01": [-1.0] * 6 + [0.0], "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
    }
}
STATISTICS = ActionStatistics.from_norm_stats(NORM_STATS, UNNORM_KEY)
FIRST_SCENE = 100_000_000  # seeds of supervised scenes, above those of RL and of recordings
FRESH_SCENES = 2_000_000  # seeds of the scores below, used nowhere else
ASKED_AT = (0, 8, 16, 24)  # steps of an episode at which the policy decides
# Which player acts until then: mostly the demonstrator, sometimes one that leaves its path.
PLAYERS = ((0.5, None), (0.3, "noisy"), (0.2, "near_miss"))
OBJECTS = len(COLORS) + 2
BATCHES = 16  # of a draw of scenes
# Arguments that must be the same when a run on the tabletop is resumed.
SETUP = (
    *("steps", "batch", "lr", "sd_bins", "seed", "labels", "pretrain_steps"),
    *("goal_weight", "start", "lora_rank", "lora_alpha"),
)


def samples(labels: str, num_scenes: int, seed: int, chunk: int):
    """Return frames [n H W 3], tasks [n], policy actions [n K A] and goals [n 8], n = 4 num_scenes.

    Args:
        labels: kind of demonstrator (see `miniature.expert.KINDS`) whose actions are the targets.
        seed: batches with different seeds have no scene in common.
    """
    rng = np.random.default_rng(seed)
    scenes = world.sample_scenes(FIRST_SCENE + seed * num_scenes + np.arange(num_scenes))
    kind = PLAYERS[rng.choice(len(PLAYERS), p=[share for share, _ in PLAYERS])][1] or labels
    _, states = demonstrate(scenes, Expert(kind, rng), max(ASKED_AT))
    moments = world.concatenate([states[t] for t in ASKED_AT])
    actions, _ = demonstrate(moments, Expert(labels, rng), chunk)
    frames = render(moments, POLICY.image_size)
    return frames, moments.task, to_policy_actions(actions), goals_of(moments)


def object_targets(scenes: world.Scenes) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of objects: index of their patch [n O], and xyz [n O 3] in units of 10 cm.

    The objects are the blocks by colour (index -1 if one is not visible), the plate and the tip.
    """
    count = len(scenes)
    points = np.full((count, OBJECTS, 3), np.nan)
    for block in (0, 1):
        points[np.arange(count), scenes.colors[:, block]] = scenes.blocks[:, block]
    points[:, -2, :2], points[:, -2, 2] = scenes.plate, 0.0
    points[:, -1] = scenes.position
    cells = project(points, POLICY.image_size) / POLICY.patch_size
    grid = POLICY.image_size // POLICY.patch_size
    inside = np.all((cells >= 0) & (cells < grid), axis=-1)
    column, row = np.moveaxis(np.where(inside[..., None], cells, 0).astype(int), -1, 0)
    return np.where(inside, row * grid + column, -1), np.where(inside[..., None], 10 * points, 0.0)


def goals_of(scenes: world.Scenes) -> np.ndarray:
    """Return the inputs of a decision, float32 [n 8]: target, plate (x, y), tip; unit 10 cm."""
    parts = (scenes.blocks[:, world.TARGET], scenes.plate, scenes.position)
    return 10 * np.concatenate(parts, axis=1, dtype=np.float32)


def pretrain(model: OpenVLAOFT, prompts, *, steps: int, batch: int, lr: float, seed: int):
    """Teach a new model vision and language, in place of a pretrained vision-language model.

    Linear read-outs, which are discarded afterwards, predict from every patch which objects are in
    it and where, and from every word of the instruction where its target, the plate and the tip
    are. There are no action slots yet, so steps are cheap. Words also learn to find the object that
    they name many times sooner than 56 slots that must learn actions at the same time.

    Args:
        prompts: (tokens [M L], mask [M L]) of the instructions.
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    rng = np.random.default_rng(seed)

    def readout(outputs: int) -> jax.Array:
        return jnp.asarray(0.05 * rng.normal(size=(POLICY.hidden_size, outputs)), jnp.float32)

    warmup = min(100, steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, warmup, steps, 0.02 * lr)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.01)
    )
    trained = params, readout(4 * OBJECTS), readout(8)
    opt_state = optimizer.init(trained)
    slots, words = POLICY.num_action_tokens, POLICY.max_prompt_length

    def loss_fn(trained, images, tokens, mask, patch, points, goals):
        params, see, read = trained
        model = nnx.merge(graphdef, params, rest)
        patches = model.projector(model.vision(model.pixel_values(images), collect=False)[0])
        seen = (patches @ see).reshape(*patches.shape[:2], OBJECTS, 4)  # [B P O 4]
        present = jax.nn.one_hot(patch, patches.shape[1], axis=1)  # [B P O]; none for -1
        found = optax.sigmoid_binary_cross_entropy(seen[..., 0], present).mean()
        away = jnp.abs(seen[..., 1:] - points[:, None]).mean(-1)
        seen_error = (away * present).sum() / present.sum()

        embedded = [x[:, :-slots] for x in model.sequence(patches, tokens, mask)]
        hidden, _ = model.llama(*embedded, collect=False)
        valid = embedded[1][:, -words:, None].astype(hidden.dtype)
        error = jnp.abs(hidden[:, -words:] @ read - goals[:, None])
        read_error = (error * valid).sum() / (valid.sum() * goals.shape[1])
        return 10 * found + 3 * seen_error + 3 * read_error, jnp.stack((seen_error, read_error))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(trained, opt_state, *batch):
        (_, errors), gradient = jax.value_and_grad(loss_fn, has_aux=True)(trained, *batch)
        updates, opt_state = optimizer.update(gradient, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, errors

    def batches():
        for i in itertools.count(0, 16):  # 16 batches a draw
            seeds = FIRST_SCENE // 2 + seed * 10_000_000 + i * 4 * batch + np.arange(4 * batch)
            _, states = demonstrate(world.sample_scenes(seeds), Expert("near_miss", rng), 24)
            scenes = world.concatenate([states[t] for t in ASKED_AT])
            order = rng.permutation(len(scenes)).reshape(16, batch)
            frames, goals = render(scenes, POLICY.image_size), goals_of(scenes)
            patch, points = object_targets(scenes)
            for rows in order:
                yield (
                    jnp.asarray(frames[rows])[:, None],
                    *(part[scenes.task[rows]] for part in prompts),
                    jnp.asarray(patch[rows]),
                    jnp.asarray(points[rows], jnp.float32),
                    jnp.asarray(goals[rows]),
                )

    errors = []
    for i, drawn in enumerate(itertools.islice(batches(), steps)):
        trained, opt_state, error = step(trained, opt_state, *drawn)
        errors.append(error)
        if (i + 1) % CHECK_EVERY == 0 or i + 1 == steps:
            advice = f"Nothing was written; try a lower --lr ({lr:g})"
            check_trained(i + 1, errors, trained, advice)
        if (i + 1) % 100 == 0:
            seen, read = 10 * np.mean(errors[-100:], axis=0)
            logging.info(
                "pretraining step %d/%d  seen to %.1f cm, read to %.1f cm", i + 1, steps, seen, read
            )
    return nnx.merge(graphdef, trained[0], rest)


def make_step(graphdef, optimizer, statistics, sd_bins, goal_weight):
    """Return the jitted step: (trained, opt_state, rest, batch..) -> trained, opt_state, losses.

    A batch is obs, actions, goals. `rest` holds the parameters that do not train; with LoRA these
    are nearly all. Besides its token, every action slot must predict the goals through a linear
    read-out that is discarded afterwards. With it, a small network that is not a pretrained
    language model learns several times sooner which block the instruction's colour means.
    """

    def loss_fn(trained, rest, obs, actions, goals):
        params, readout = trained
        model = nnx.merge(graphdef, params, rest)
        pixels = model.pixel_values(obs.images)
        forward = model.forward(pixels, obs.prompt_tokens, obs.prompt_mask)
        logits = model.action_logits(forward.slots)
        logits = logits.reshape(*actions.shape, logits.shape[-1])
        targets = soft_targets(actions, statistics, sd_bins)
        token_loss = optax.softmax_cross_entropy(logits, targets).mean()
        goal_error = jnp.abs(forward.slots @ readout - goals[:, None]).mean()
        return token_loss + goal_weight * goal_error, jnp.stack((token_loss, goal_error))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(trained, opt_state, *batch):
        (_, losses), gradient = jax.value_and_grad(loss_fn, has_aux=True)(trained, *batch)
        updates, opt_state = optimizer.update(gradient, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, losses

    return step


def play(model: OpenVLAOFT, prompts, starts: np.ndarray, *, greedy: bool, seed: int = 0) -> float:
    """Return the ground-truth success rate of whole episodes from scenes `starts` (seeds)."""
    scenes = world.sample_scenes(starts)
    tokens, mask = prompts[0][scenes.task], prompts[1][scenes.task]
    graphdef, state = nnx.split(model)
    act = jax.jit(lambda state, *a: nnx.merge(graphdef, state).sample(*a, greedy=greedy).actions)
    done = np.zeros(len(scenes), bool)
    for t in range(len(ASKED_AT)):
        images = jnp.asarray(render(scenes, POLICY.image_size))[:, None]
        obs = ObsBatch(images=images, prompt_tokens=tokens, prompt_mask=mask)
        actions = np.array(act(state, obs, jax.random.key(seed * len(ASKED_AT) + t)))
        actions[..., 6] = -np.sign(2 * actions[..., 6] - 1)  # the environment's gripper rule
        for k in range(actions.shape[1]):
            scenes = world.step(scenes, actions[:, k])
            done |= world.is_success(scenes)
    return float(done.mean())


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("policy.train", __doc__)
    parser.add_argument("--out", required=True, help="policy folder to write; must not exist")
    parser.add_argument("--start", help="policy folder to go on from; default: fresh weights")
    parser.add_argument(
        "--lora_rank",
        type="natural",
        default=0,
        help="train adapters of this rank alone; 0 = all weights",
    )
    parser.add_argument(
        "--lora_alpha",
        type="not_negative",
        default=0.0,
        help="adapters' scale x rank; 0 = a scale of 1",
    )
    parser.add_argument("--labels", choices=KINDS, default="expert", help="demonstrator")
    parser.add_argument(
        "--pretrain_steps", type="natural", default=0, help="of seeing and reading, first"
    )
    parser.add_argument("--steps", type="count", default=6000, help="of the optimizer")
    parser.add_argument("--batch", type="count", default=64, help="decisions per step")
    parser.add_argument("--lr", type="positive", default=1e-3, help="highest learning rate")
    parser.add_argument("--sd_bins", type="positive", default=8.0, help="width of the soft targets")
    text = "of the goal read-out; default: 1, with --data 0"
    parser.add_argument("--goal_weight", type="not_negative", help=text)
    parser.add_argument("--score_scenes", type="count", default=512, help="played for a score")
    parser.add_argument("--score_every", type="count", default=1000, help="steps between scores")
    parser.add_seed("weights, scenes and batches")
    text = "let a policy of more than 1e9 parameters be computed on the CPU although there is a GPU"
    parser.add_argument("--cpu_beside_gpu", action="store_true", help=text)
    data = parser.add_argument_group("recorded episodes instead of the tabletop")
    data.add_argument("--data", nargs="+", metavar="RECORDING", help="folders of episodes")
    text = f"{sizes.HELP} a policy"
    data.add_argument("--sizes", metavar="NAME|FILE", help=text)
    data.add_argument("--unnorm_key", help="name of the recording's action statistics")
    data.add_argument("--chunk", type="count", default=8, help="actions per decision")
    text = "learn at every step, not only where a policy would decide"
    data.add_argument("--every_step", action="store_true", help=text)
    text = "leave out the episodes of others: a player's noise is no lesson"
    data.add_argument("--sources", nargs="+", default=[], metavar="NAME", help=text)
    data.add_argument("--successful", action="store_true", help="leave failed episodes out")
    data.add_argument("--gripper", choices=GRIPPER_RULES, default="libero", help="as env.gripper")
    data.add_argument("--keep_stop_token", action="store_true", help="as the policy's own field")
    data.add_argument("--compute_dtype", choices=("float32", "bfloat16"), default="float32")
    data.add_argument("--remat", action="store_true", help="recompute activations: less memory")
    data.add_argument("--save_every", type="count", default=500, help="steps between saves")
    args = parser.parse_args(argv)
    if args.lora_rank and not args.start:
        parser.error("--lora_rank needs --start, the policy folder that adapters are for")
    if args.data and bool(args.start) == bool(args.sizes):
        parser.error("--data needs either --start, a policy folder, or --sizes for random weights")
    if args.lora_alpha > 0 == args.lora_rank:
        parser.error("--lora_rank must be above 0 for --lora_alpha")
    if args.data and not args.unnorm_key:
        parser.error("--data needs --unnorm_key, a name for the action statistics")
    own = ("labels", "pretrain_steps", "score_scenes")
    foreign = own if args.data else [a.dest for a in data._group_actions]
    if changed := [n for n in foreign if getattr(args, n) != parser.get_default(n)]:
        parser.error(f"{', '.join(changed)}: not {'for' if args.data else 'without'} --data")
    if args.goal_weight is None:
        args.goal_weight = 0.0 if args.data else 1.0
    return args


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = _arguments(argv)
    logging.set_verbosity(logging.INFO)
    refuse_existing(args.out)
    check_start(args)
    if args.data:
        finetune(args)
    else:
        _train_on_tabletop(args)


def _train_on_tabletop(args: argparse.Namespace) -> None:
    """Train on fresh scenes, write the policy folder."""
    out, began = Path(args.out), time.perf_counter()
    progress = out.with_name(out.name + ".progress.safetensors")
    # The folder is held from here on: two processes would write one progress.
    with whole_folder(out) as folder:
        model, tokenizer, prompts = _first_policy(args)
        policy, history = _fitted(args, model, prompts, progress)
        create_policy_folder(
            policy, folder, tasks=INSTRUCTIONS, tokenizer=tokenizer, norm_stats=NORM_STATS
        )
        if args.lora_rank:
            save_adapter(policy, folder / "adapter", base=args.start)
        told = {"gripper": "libero", "unnorm_key": UNNORM_KEY, "chunk": POLICY.chunk}
        told["keep_stop_token"] = POLICY.keep_stop_token
        facts = cards.card(history=history, seconds=time.perf_counter() - began, **told)
        cards.write_json(folder / "card.json", facts)
        if args.lora_rank:
            cards.write_json(folder / "adapter" / "card.json", facts)
    progress.unlink()


def _first_policy(args: argparse.Namespace):
    """Return the policy to begin with, its file of the tokenizer, None = new, and its prompts."""
    if args.start:
        with told_as_checkpoint_error(f"--start: cannot import {args.start!r}"):
            loaded = load_policy(
                args.start,
                unnorm_key=UNNORM_KEY,
                max_prompt_length=POLICY.max_prompt_length,
                lora_rank=args.lora_rank,
                lora_alpha=args.lora_alpha,
                seed=args.seed,
            )
        model, tokenizer_file = loaded.model, Path(args.start) / "tokenizer.json"
        prompts = loaded.tokenizer.encode(list(INSTRUCTIONS))
    else:
        model, tokenizer_file = OpenVLAOFT(POLICY, STATISTICS, rngs=nnx.Rngs(args.seed)), None
        with tempfile.TemporaryDirectory() as scratch:
            folder = create_policy_folder(
                model, Path(scratch, "policy"), tasks=INSTRUCTIONS, norm_stats=NORM_STATS
            )
            prompts = PromptTokenizer(folder, POLICY.max_prompt_length).encode(list(INSTRUCTIONS))
    return model, tokenizer_file, tuple(jnp.asarray(x) for x in prompts)


def _batches(args: argparse.Namespace, first: int) -> Iterator[tuple]:
    """Yield the batches of the steps from `first` on, parts as of `samples`."""
    for begin in itertools.count(first - first % BATCHES, BATCHES):
        seed, scenes = args.seed * 100_000 + begin, BATCHES * args.batch // len(ASKED_AT)
        drawn = samples(args.labels, scenes, seed, POLICY.chunk)
        order = np.random.default_rng(seed).permutation(len(drawn[0])).reshape(-1, args.batch)
        for rows in order[::-1][max(first - begin, 0) :]:
            yield tuple(part[rows] for part in drawn)


def _fitted(args: argparse.Namespace, model: OpenVLAOFT, prompts, progress: Path):
    """Return the trained policy and its scores during training."""
    optimizer, rng = make_optimizer(args.lr, args.steps), np.random.default_rng(args.seed)
    readout = jnp.asarray(0.05 * rng.normal(size=(POLICY.hidden_size, 8)), jnp.float32)
    setup = {name: getattr(args, name) for name in SETUP}
    if args.pretrain_steps and not progress.exists():
        options = {"steps": args.pretrain_steps, "batch": args.batch, "lr": args.lr}
        model = pretrain(model, prompts, **options, seed=args.seed)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    trained = params, readout
    state, done, history = (trained, optimizer.init(trained)), 0, []
    if progress.exists():
        state, facts = load_progress(progress, setup, state)
        done, history = facts["step"], facts["history"]
        logging.info("resumed at step %d", done)
    step = make_step(graphdef, optimizer, STATISTICS, args.sd_bins, args.goal_weight)

    def save_and_score(number: int) -> None:
        save_progress(progress, setup, state, {"step": number, "history": history})
        if number and number not in [entry["step"] for entry in history]:
            policy = nnx.merge(graphdef, jax.tree.map(jnp.copy, state[0][0]), rest)
            starts = FRESH_SCENES + np.arange(args.score_scenes)
            greedy, sampled = (play(policy, prompts, starts, greedy=g) for g in (True, False))
            history.append({"step": number, "greedy": greedy, "sampled": sampled})
            logging.info("ground-truth success on fresh scenes: %s", history[-1])

    if done or args.pretrain_steps:  # it was saved, but not scored; or it was pretrained
        save_and_score(done)
    began, losses = time.perf_counter(), []
    batches = zip(range(done, args.steps), _batches(args, done), strict=False)
    for i, (frames, tasks, actions, goals) in batches:
        obs = ObsBatch(
            images=jnp.asarray(frames)[:, None],
            prompt_tokens=prompts[0][tasks],
            prompt_mask=prompts[1][tasks],
        )
        actions, goals = jnp.asarray(actions, jnp.float32), jnp.asarray(goals)
        *state, loss = step(*state, rest, obs, actions, goals)
        losses.append(loss)
        due = (i + 1) % args.score_every == 0 or i + 1 == args.steps
        if (i + 1) % CHECK_EVERY == 0 or due:
            advice = f"Nothing of it was saved; try a lower --lr ({args.lr:g})"
            if progress.exists():
                advice += f" and remove {progress}"
            check_trained(i + 1, losses, state[0], advice)
        if (i + 1) % 100 == 0:
            rate = (i + 1 - done) / (time.perf_counter() - began)
            token, goal = np.mean(losses[-100:], axis=0)
            logging.info(
                "step %d/%d  loss %.4f  goals off by %.1f cm  %.2f steps/s",
                *(i + 1, args.steps, token, 10 * goal, rate),
            )
        if due:
            save_and_score(i + 1)
    return nnx.merge(graphdef, state[0][0], rest), history


if __name__ == "__main__":
    keep_freed_memory()
    run_tool(main)
