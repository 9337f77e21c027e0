"""Trains the pose model, which predicts the gripper's next pose from an action.

It is trained on several consecutive steps of recordings, because in a rollout its input is its own
output. Its metric is the drift at the end of whole episodes, in mm.

    python -m evac_jax.tools.world_model.train_pose_model --data DIR --out DIR --steps 6000
"""

import time
from pathlib import Path

import numpy as np
import torch
from absl import logging

from evac_jax.evac import model_folders
from evac_jax.files import cards, recordings
from evac_jax.files.atomic import whole_folder
from evac_jax.files.recordings import Episodes
from evac_jax.sim.actions import integrate_poses
from evac_jax.sim.pose_model import PoseModel, PoseModelConfig
from evac_jax.tools import torch_training
from evac_jax.tools.command_line import Parser, refuse_existing, run_tool
from evac_jax.tools.finite import check_finite

UNROLL = 6  # steps predicted in a row while training
# Lower bound of the standard deviation. Without it, entries that hardly vary (the quaternion of an
# upright gripper) would be scaled up so much that their rare large values dominate the loss.
MIN_STD = 0.05


def fit_statistics(model: PoseModel, poses: np.ndarray) -> None:
    """Store mean and standard deviation of the poses [F 8] in the model."""
    flat = torch.from_numpy(np.array(poses))
    model.abs_action_mean.copy_(flat.mean(0, keepdim=True))
    model.abs_action_std.copy_(flat.std(0, keepdim=True).clamp_min(MIN_STD))


def train(
    data: Episodes,
    config: PoseModelConfig,
    *,
    steps: int,
    batch: int = 256,
    lr: float = 3e-3,
    seed: int = 0,
    device: str = "cpu",
) -> PoseModel:
    """Return a model fitted to the transitions of `data`, on `device`.

    Raises:
        TrainingError: loss or gradient is not finite.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = PoseModel(config).to(device)
    every = np.concatenate([data.rows(n, np.arange(t + 1)) for n, t in enumerate(data.length)])
    fit_statistics(model, data.poses[every])
    actions = torch.from_numpy(np.array(data.actions)).to(device)
    poses = torch.from_numpy(np.array(data.poses)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    ema = torch_training.Ema(model, 0.998)
    unroll = min(UNROLL, int(data.length.min()))
    ahead = torch.arange(unroll)
    for step in range(steps):
        torch_training.set_lr(
            optimizer, torch_training.cosine_lr(step, steps, lr, warmup=100, floor=0.002)
        )
        episodes = rng.integers(data.num_episodes, size=batch)
        moments = rng.integers(data.length[episodes] - unroll + 1)
        first = torch.from_numpy(data.rows(episodes, moments))
        earlier = first - torch.from_numpy(moments > 0).long()  # an episode begins at rest
        rows = first[:, None] + ahead
        last = poses[torch.stack((earlier, first), 1)]
        predicted = integrate_poses(model.get_ee_pose, actions[rows], last)
        error = (predicted - poses[rows + 1]) / model.abs_action_std
        # Absolute error, because most transitions are exact and only those at the limits of the
        # workspace are not.
        loss = error.abs().mean() + error.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        advice = "Nothing was written; give another --seed, or look at the recordings"
        check_finite(step + 1, advice, loss=loss.item(), norm_of_the_gradient=float(norm))
        optimizer.step()
        ema.update(model)
        if (step + 1) % 1000 == 0:
            logging.info("step %d/%d  loss %.5f", step + 1, steps, loss.item())
    ema.swap(model)
    return model.eval()


@torch.inference_mode()
def score(model: PoseModel, data: Episodes) -> dict:
    """Drift: errors at the end of episodes that are predicted from their first pose and actions.

    Longer episodes are shortened to the length of the shortest.
    """
    steps = int(data.length.min())
    device = model.abs_action_mean.device
    actions, poses = (
        torch.from_numpy(data.stacked(name, steps)).to(device) for name in ("actions", "poses")
    )
    predicted = integrate_poses(model.get_ee_pose, actions[:, :-1], poses[:, [0, 0]])
    error = (predicted - poses[:, 1:]).abs()
    distance = error[:, -1, :3].norm(dim=1) * 1000
    return {
        "steps": error.shape[1],
        "position_mm_mean": distance.mean().item(),
        "position_mm_p95": distance.quantile(0.95).item(),
        # Random players reach the limits of the workspace; a policy hardly ever does.
        "position_mm_by_source": {
            name: distance[torch.from_numpy(data.source == number)].mean().item()
            for number, name in enumerate(data.sources)
            if (data.source == number).any()
        },
        "quaternion_mean": error[:, -1, 3:7].mean().item(),
        "opening_max": error[..., 7].max().item(),
        "opening_p99": error[..., 7].flatten().quantile(0.99).item(),
    }


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = Parser("world_model.train_pose_model", __doc__)
    parser.add_argument("--data", required=True, nargs="+", help="folders of recorded episodes")
    parser.add_argument("--out", required=True, help="new folder for weights, config and card")
    parser.add_argument("--steps", type="count", default=6000, help="of the optimizer")
    parser.add_argument("--hidden", type="count", default=128, help="width of its layers")
    parser.add_argument(
        "--plain",
        action="store_true",
        help="the published network, without velocity and linear skip",
    )
    parser.add_device()
    parser.add_threads()
    parser.add_seed("weights and batches")
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.INFO)
    torch.set_num_threads(args.threads)
    refuse_existing(args.out)
    train_part, held_out = recordings.load(*args.data).both_parts()
    began, out = time.process_time(), Path(args.out)
    config = PoseModelConfig(args.hidden, linear_skip=not args.plain, velocity=not args.plain)
    with whole_folder(out) as folder:
        model = train(train_part, config, steps=args.steps, seed=args.seed, device=args.device)
        model_folders.save_model(folder, model)
        facts = cards.card(
            cpu_seconds=round(time.process_time() - began),
            data=train_part.card,
            sha256=cards.sha256(folder / model_folders.WEIGHTS_FILE),
        )
        cards.write_json(folder / "card.json", facts)
    scores = score(model, held_out)  # of what is saved
    cards.write_json(out / "card.json", facts | {"scores": scores})
    logging.info("held-out: %s", scores)


if __name__ == "__main__":
    run_tool(main)
