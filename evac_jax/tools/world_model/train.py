r"""Trains an EVAC world model on episodes, from scratch or from earlier weights.

    python -m evac_jax.tools.world_model.train --data DIR --autoencoder DIR --out DIR --steps 8000
    torchrun --nproc_per_node 8 -m -- evac_jax.tools.world_model.train --data DIR --start DIR \
        --out DIR --train unet+image_resampler --lr 5e-5 --clip 0.5 --dropout 0.1 --dtype bfloat16

The second command is the released recipe and starts from an EVAC folder. <out> gets the best
weights so far (a moving average, judged by the loss on held-out episodes), `card.json`, TensorBoard
events, `rollouts.png` (imagined above, real below) and `progress.pt`. The same command continues a
run that was stopped, with the same numbers as without the interruption.
"""

import argparse
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from absl import logging

from evac_jax.evac import model_folders
from evac_jax.evac.config import EvacConfig
from evac_jax.evac.diffusion_loss import LossOptions, training_loss
from evac_jax.evac.model import EvacModel
from evac_jax.evac.schedule import Schedule, ddim_table
from evac_jax.files import cards, claim, libero_facts, recordings
from evac_jax.telemetry.tensorboard import TensorBoardWriter
from evac_jax.tools import torch_training
from evac_jax.tools.command_line import run_tool
from evac_jax.tools.distributed import Ranks
from evac_jax.tools.finite import check_finite
from evac_jax.tools.resume import check_folder
from evac_jax.tools.world_model.data import (
    Corpus,
    Windows,
    WindowSampler,
    mean_moving_weight,
    moving_weight,
)
from evac_jax.tools.world_model.imagine import camera_of, check_fits, check_steps
from evac_jax.tools.world_model.latent_cache import autoencoder_digest, cached_latents
from evac_jax.tools.world_model.options import make_model, parse
from evac_jax.tools.world_model.validation import BestSoFar, Validation, check_lengths

MEAN_WEIGHT_WINDOWS = 256
PROGRESS = "progress.pt"
# Arguments that must be the same when a run is resumed.
SETUP = (
    *("steps", "seed", "lr", "warmup", "optimizer", "weight_decay", "clip", "ema", "dtype"),
    *("train", "dropout", "moving_weight", "weight", "few_steps"),
)


class Trainer:
    """One training run: a model, its data, and everything that a resumed run needs.

    Args:
        model: on the device of `ranks`; parameters that do not train are frozen.
        corpus: training episodes.
        validation: of the held-out ones.
        args: see `options.parse`.
        ranks: processes that share the run.
        setup: values that must be equal in a saved progress.
    """

    def __init__(
        self,
        model: EvacModel,
        corpus: Corpus,
        validation: Validation,
        mean_weight: float,
        args: argparse.Namespace,
        ranks: Ranks,
        setup: dict[str, Any],
    ):
        self.model, self._corpus, self._validation = model, corpus, validation
        self._args, self._ranks, self._setup = args, ranks, setup
        self._mean_weight = mean_weight
        self._out = Path(args.out)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizers = torch_training.make_optimizers(
            model, args.optimizer, weight_decay=args.weight_decay
        )
        self._ema = torch_training.Ema(model, args.ema)
        self._sampler = WindowSampler(corpus.data, model.config, args.weight)
        self._schedule = Schedule.create(model.config, ranks.device)
        self._timesteps = few_timesteps(model.config, args)
        self.best = BestSoFar(args.patience)
        self.step, self.seconds, self.history = 0, 0.0, []
        self._saved = 0  # step of the saved progress

    def run(self) -> None:
        """Train to the end, starting from the progress in <out> if there is one.

        Raises:
            TrainingError: loss or gradient is not finite; <out> keeps its last good state.
        """
        args = self._args
        self._resume()
        writer = (
            TensorBoardWriter(self._out / "tensorboard", self.step) if self._ranks.first else None
        )
        if writer and self.history and "psnr" not in self.history[-1]:
            self._imagine(writer)  # it was saved before
        began, before, since = time.perf_counter(), self.seconds, self.step
        losses: list[float] = []
        stop = self.best.exhausted
        self.model.train()
        while self.step < args.steps and not stop:
            lr = torch_training.cosine_lr(self.step, args.steps, args.lr, args.warmup)
            loss, norm = self._update(lr)
            losses.append(loss)
            self.step += 1
            self.seconds = before + time.perf_counter() - began
            last = self.step == args.steps
            save = self.step % args.save_every == 0 or last
            # What was trained is saved before anything is drawn or told.
            if writer and save:
                self._validate(float(np.mean(losses)))
            if writer and (self.step % args.log_every == 0 or last):
                rate = (self.step - since) / (self.seconds - before)
                mean = float(np.mean(losses[-args.log_every :]))
                logging.info("step %d/%d  loss %.4f  %.2f/s", self.step, args.steps, mean, rate)
                figures = {"loss": mean, "gradient_norm": norm, "lr": lr, "steps_per_s": rate}
                writer.write(self.step, {f"train/{k}": v for k, v in figures.items()})
            if save:
                if writer:
                    self._imagine(writer)
                self._saved = self.step
                stop, losses = self._ranks.agree(self.best.exhausted), []
        if writer:
            writer.close()

    def _update(self, lr: float) -> tuple[float, float]:
        """Make one step; return its loss and the norm of its gradient before clipping."""
        args, ranks = self._args, self._ranks
        # One generator per step, so a resumed run has the batches of an uninterrupted one.
        total = ranks.world * args.accumulate * args.batch
        windows = self._sampler.draw(total, np.random.default_rng((args.seed, self.step)))
        loss = torch.zeros((), device=ranks.device)
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        for k in range(args.accumulate):
            first = (ranks.rank * args.accumulate + k) * args.batch
            part = self._loss(windows, first) / args.accumulate
            part.backward()
            loss += part.detach()
        ranks.average_gradients(self._parameters)
        mean = self._check(float(ranks.mean(loss)), "loss")
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, args.clip)
        norm = self._check(float(norm), "norm of the gradient")
        for optimizer in self._optimizers:
            torch_training.set_lr(optimizer, lr)
            optimizer.step()
        self._ema.update(self.model)
        return mean, norm

    def _loss(self, windows: Windows, first: int) -> torch.Tensor:
        """Loss of this process's part of a step's windows, starting at number `first`."""
        args, config = self._args, self.model.config
        batch = self._corpus.batch(windows[first : first + args.batch], config)
        seed = args.seed * 1_000_003 + self.step
        timesteps = None
        if self._timesteps is not None:
            rng = np.random.default_rng((args.seed, self.step, 1))
            drawn = rng.choice(self._timesteps, len(windows))[first : first + args.batch]
            timesteps = torch.from_numpy(drawn).to(self._ranks.device)
        torch.manual_seed(seed * len(windows) + first)  # dropout inside the networks
        with torch_training.autocast(self._ranks.device, args.dtype):
            return training_loss(
                self.model,
                batch,
                options=LossOptions(dropout=args.dropout),
                generator=torch.Generator().manual_seed(seed),
                weight=moving_weight(batch, config, args.moving_weight) / self._mean_weight,
                timesteps=timesteps,
                schedule=self._schedule,
                share=(first, len(windows)),
            )

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Give the model its moving average, in eval mode."""
        self._ema.swap(self.model.eval())
        yield
        self._ema.swap(self.model.train())

    def _validate(self, loss: float) -> None:
        """Store the moving average if its held-out loss is the best, and save the progress.

        The weights come first: a run that is killed in between goes on before this step, and
        stores them again.
        """
        context = torch_training.autocast(self._ranks.device, self._args.dtype)
        with self._averaged():
            held_out = self._check(self._validation.loss(self.model, context), "held-out loss")
            if self.best.update(held_out, self.step):
                model_folders.save_model(self._out, self.model)
        self.history.append({"step": self.step, "loss": loss, "held_out_loss": held_out})
        self._save()

    def _imagine(self, writer: TensorBoardWriter) -> None:
        """Imagine held-out episodes with the moving average, and show the last validation."""
        with self._averaged():
            psnr, picture = self._validation.rollouts(self.model)
        figures = self.history[-1]
        figures["psnr"] = psnr
        held_out, shown = figures["held_out_loss"], " ".join(f"{x:.1f}" for x in psnr)
        logging.info("held-out loss %.4f, PSNR per chunk: %s", held_out, shown)
        by_chunk = {f"eval/psnr_{k + 1}": value for k, value in enumerate(psnr)}
        writer.write(self.step, {"eval/held_out_loss": held_out, **by_chunk})
        writer.image("rollouts", picture, self.step)
        picture.save(self._out / "rollouts.png")

    def _check(self, value: float, name: str) -> float:
        advice = (
            f"Nothing of it was saved: {self._out} holds the state of step {self._saved}. Remove "
            f"{PROGRESS} there and try a lower --lr, a longer --warmup or --dtype float32"
        )
        check_finite(self.step + 1, advice, **{name: value})
        return value

    def _save(self) -> None:
        state = {
            "setup": self._setup,
            "parameters": torch_training.trainable_state(self.model),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "ema": self._ema.state_dict(),
            "best": self.best.state_dict(),
            "step": self.step,
            "history": self.history,
            "seconds": self.seconds,
        }
        torch_training.save_progress(self._out / PROGRESS, state)

    def _resume(self) -> None:
        path = self._out / PROGRESS
        if not path.exists():
            return
        state = torch_training.load_progress(path, self._setup, self._ranks.device)
        torch_training.load_trainable(self.model, state["parameters"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._ema.load_state_dict(state["ema"])
        self.best.load_state_dict(state["best"])
        self.step, self.history, self.seconds = (state[k] for k in ("step", "history", "seconds"))
        self._saved = self.step
        logging.info("resumed at step %d", self.step)


def run(args: argparse.Namespace, ranks: Ranks) -> None:
    """Train as the arguments say, and write the data card."""
    out = Path(args.out)
    # Those that a run makes before its first progress.
    check_folder(out, PROGRESS, "tensorboard", "cache")
    # Two runs would write one progress.
    with claim.written_alone(out) if ranks.first else contextlib.nullcontext():
        _run(out, args, ranks)


def _run(out: Path, args: argparse.Namespace, ranks: Ranks) -> None:
    folders = [Path(folder) for folder in args.data]
    data = recordings.load(*folders)
    training, held_out = data.both_parts()
    model = make_model(args, data).to(ranks.device)
    # What would be found out after the latents were encoded, which takes long.
    check_fits(model.config, data)
    check_steps(model.config, args.ddim_steps, "--ddim_steps")
    WindowSampler(training, model.config, args.weight)
    check_lengths(held_out, model.config)
    out.mkdir(parents=True, exist_ok=True)
    latents = cached_latents(
        Path(args.cache or out / "cache"),
        folders,
        model.first_stage_model,
        model.config,
        processes=args.encode_processes,
        ranks=ranks,
    )
    camera = camera_of(data, ranks.device)
    rays = model.rays(camera.intrinsic, camera.along(model.config.frames))
    train_part, validated = (Corpus(part, latents, rays) for part in (training, held_out))
    mean_weight = mean_moving_weight(
        train_part, model.config, args.moving_weight, MEAN_WEIGHT_WINDOWS
    )
    validation = Validation(
        validated,
        model,
        windows=args.validation_windows,
        episodes=args.rollouts,
        chunks=args.rollout_chunks,
        steps=args.ddim_steps,
        eta=args.eta,
        moving=args.moving_weight,
        mean_weight=mean_weight,
        timesteps=few_timesteps(model.config, args),
    )
    facts: dict[str, Any] = {
        "data": [cards.sha256(folder / "card.json") for folder in folders],
        "autoencoder": autoencoder_digest(model.first_stage_model),
        "batch": args.batch * args.accumulate * ranks.world,
        **_start_of(args),
    }
    setup = {name: getattr(args, name) for name in SETUP}
    setup |= facts | {"config": model.config.to_dict()}
    trainer = Trainer(model, train_part, validation, mean_weight, args, ranks, setup)
    trainer.run()
    if ranks.first:
        told = {"libero": libero_facts.told(data.card)}
        if args.few_steps:  # good for nothing else
            told["sampling"] = {"steps": args.ddim_steps, "eta": args.eta}
        _write_card(out, trainer, train_part, facts | told, ranks)


def few_timesteps(config: EvacConfig, args: argparse.Namespace) -> np.ndarray | None:
    """Timesteps to train on with --few_steps, int64; None = all."""
    return ddim_table(config, args.ddim_steps, args.eta).timesteps if args.few_steps else None


def _start_of(args: argparse.Namespace) -> dict[str, str]:
    """SHA-256 of the weights from which fine-tuning started."""
    if not args.start:
        return {}
    return {"start": cards.sha256(model_folders.weights_file(args.start))}


def _write_card(out: Path, trainer: Trainer, part: Corpus, facts: dict, ranks: Ranks) -> None:
    sources = np.bincount(part.data.source, minlength=len(part.data.sources)).tolist()
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    device = str(ranks.device.type)
    if device == "cuda":
        device = torch.cuda.get_device_name(ranks.device)
    values = cards.card(
        **facts,
        episodes=dict(zip(part.data.sources, sources, strict=True)),
        trained_parameters=parameters,
        best={"step": trainer.best.step, "held_out_loss": trainer.best.loss},
        history=trainer.history,
        seconds=round(trainer.seconds, 1),
        device=f"{ranks.world} x {device}",
        sha256={model_folders.WEIGHTS_FILE: cards.sha256(out / model_folders.WEIGHTS_FILE)},
    )
    cards.write_json(out / "card.json", values)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = parse(argv, __doc__)
    torch.set_num_threads(args.threads)
    ranks = Ranks.join(args.device)
    logging.set_verbosity(logging.INFO if ranks.first else logging.ERROR)
    try:
        run(args, ranks)
    finally:
        ranks.leave()


if __name__ == "__main__":
    run_tool(main)
