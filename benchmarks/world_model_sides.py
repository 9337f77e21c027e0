"""The two paths that `benchmarks.world_model` times: their sizes, episodes and processes."""

import abc
import contextlib
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines.evac_model import NaiveEvac
from evac_jax.devices.malloc import KEEP_FREED_MEMORY
from evac_jax.evac.config import (
    AutoencoderConfig,
    EvacConfig,
    ImageTowerConfig,
    MapConfig,
    ResamplerConfig,
    UNetConfig,
)
from evac_jax.evac.cpu.packed import accelerate
from evac_jax.evac.model import Camera, EvacModel
from evac_jax.sim.reward import RewardConfig, RewardNet

ETA = 1.0
STAGES = ("tower", "encode", "unet", "decode", "classifier")


def make_config(px: int) -> EvacConfig:
    """Return the sizes for which figures are comparable with the public references."""
    resampler = ResamplerConfig(dim=256, depth=4, heads=4, dim_head=64, output_dim=256)
    return EvacConfig(
        image_size=(px, px),
        unet=UNetConfig(model_channels=64, num_head_channels=32, context_dim=256),
        autoencoder=AutoencoderConfig(channels=64),
        action_resampler=resampler.replace(embedding_dim=14),
        image_resampler=resampler.replace(embedding_dim=384),
        image_tower=ImageTowerConfig(width=384, layers=8, head_width=64),
        maps=MapConfig(renderer="upstream", radius=px // 8, thickness=max(px // 32, 1)),
    )


def make_model(config: EvacConfig) -> EvacModel:
    """Return a model with random weights; none is zero, so that every input has an effect."""
    torch.manual_seed(0)
    model = EvacModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


class EpisodeInputs:
    """Start frames, poses, camera and noise of the environments, the same for both paths."""

    def __init__(self, config: EvacConfig, envs: int, seed: int):
        self.config, self._generator = config, torch.Generator().manual_seed(seed)
        height, width = config.image_size
        self.start = self._draw(envs, 3, height, width).clamp(-1, 1)
        intrinsic = torch.tensor([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1.0]])
        c2w = torch.eye(4)
        c2w[2, 3] = -1.0  # one metre in front of the workspace
        self.camera = Camera(intrinsic.expand(1, 1, 3, 3), c2w.expand(1, 1, 4, 4))
        self._window = torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 0.5]).repeat(envs, config.frames, 1)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def chunk(self, steps: int) -> tuple[Tensor, list[Tensor]]:
        """Return the pose window [B, T, 16] of the next chunk and its noise."""
        chunk, past = self.config.chunk, self.config.n_previous
        moves = 0.01 * self._draw(len(self._window), chunk, 8)
        ahead = self._window[:, -1:] + moves.cumsum(1)
        self._window = torch.cat((self._window[:, -past:], ahead), 1)
        shape = (len(self.start), 4, chunk, *self.config.latent_size)
        return self._window.repeat(1, 1, 2), [self._draw(*shape) for _ in range(steps + 1)]


class Stopwatch:
    """Sums the wall seconds of named functions."""

    def __init__(self):
        self.seconds = dict.fromkeys(STAGES, 0.0)

    def watch(self, owner: object, method: str, stage: str) -> None:
        """Time a method of an object from now on."""
        function = getattr(owner, method)

        def timed(*args, **kwargs):
            began = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[stage] += time.perf_counter() - began
            return result

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        """Return the sums and reset them."""
        sums, self.seconds = self.seconds, dict.fromkeys(STAGES, 0.0)
        return sums


class Side(abc.ABC):
    """One of the two paths; each has its own classifier for its frames."""

    def __init__(self, watch: Stopwatch):
        self.watch = watch
        self.classifier = RewardNet(RewardConfig()).eval()

    @abc.abstractmethod
    def begin(self, start: Tensor, capacity: int) -> None:
        """Begin an episode of at most `capacity` chunks."""

    @abc.abstractmethod
    def imagine(self, poses: Tensor, camera: Camera, noise: list[Tensor]) -> Tensor:
        """Return the frames [B, chunk, 3, H, W] of the next chunk."""

    def play(self, start: Tensor | None, capacity: int, *chunk: Any) -> tuple[Tensor, float]:
        """Return the frames of a chunk and the CPU seconds that it took.

        Args:
            start: start frames if a new episode begins, or None.
            capacity: see `begin`.
            chunk: see `imagine`.
        """
        began = time.process_time()
        if start is not None:
            self.begin(start, capacity)
        frames = self.imagine(*chunk)
        judging = time.perf_counter()
        self.classifier.probability(frames.flatten(0, 1).clamp(-1, 1))
        self.watch.seconds["classifier"] += time.perf_counter() - judging
        return frames, time.process_time() - began


class Ours(Side):
    """Our path: `EvacModel` as the simulator process uses it."""

    def __init__(self, model: EvacModel, watch: Stopwatch, compiled: bool = False):
        super().__init__(watch)
        self.model = accelerate(model, compiled)
        watch.watch(model.first_stage_model, "encode", "encode")
        watch.watch(model.first_stage_model, "decode", "decode")
        watch.watch(model, "velocity", "unet")
        watch.watch(model, "image_tokens", "tower")

    def begin(self, start: Tensor, capacity: int) -> None:
        """Encode the start frames."""
        self.state = self.model.start(start[:, None], capacity)

    def imagine(self, poses: Tensor, camera: Camera, noise: list[Tensor]) -> Tensor:
        """Return the frames [B, chunk, 3, H, W] of the next chunk."""
        steps = len(noise) - 1
        self.state, frames = self.model.imagine(
            self.state,
            poses,
            camera,
            steps=steps,
            eta=ETA,
            noise=noise[0][:, None],
            generator=lambda index: noise[steps - index],
        )
        return frames[:, 0]


@torch.no_grad()
def serve(connection: Connection, px: int, compiled: bool) -> None:
    """Run a process that imagines; it ends when the other side closes the pipe."""
    torch.set_num_threads(1)
    watch = Stopwatch()
    side = Ours(make_model(make_config(px)), watch, compiled)
    with contextlib.suppress(EOFError):
        while True:
            frames, cpu = side.play(*connection.recv())
            connection.send((frames.numpy(), cpu, watch.take()))


class OursInProcesses:
    """Our path, with its environments divided among processes of one thread each."""

    def __init__(self, px: int, watch: Stopwatch, compiled: bool, processes: int):
        self.watch, context = watch, multiprocessing.get_context("spawn")
        before = os.environ.copy()
        # As in `WorkerProcess`; a process reads these variables before its first import.
        os.environ.update(KEEP_FREED_MEMORY, OMP_NUM_THREADS="1")
        self._connections = []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            context.Process(target=serve, args=(theirs, px, compiled), daemon=True).start()
            theirs.close()  # so that the pipe ends when the process ends
            self._connections.append(ours)
        os.environ.clear()
        os.environ.update(before)

    def play(self, start: Tensor | None, capacity: int, *chunk: Any) -> tuple[Tensor, float]:
        """See `Side`; the time of a stage is that of the slowest process."""
        poses, camera, noise = chunk
        size = len(poses) // len(self._connections)
        for index, connection in enumerate(self._connections):
            own = slice(index * size, (index + 1) * size)
            begin = None if start is None else start[own]
            connection.send((begin, capacity, poses[own], camera, [draw[own] for draw in noise]))
        parts, cpu, stages = zip(*(c.recv() for c in self._connections), strict=True)
        for stage in STAGES:
            self.watch.seconds[stage] += max(seconds[stage] for seconds in stages)
        return torch.cat([torch.from_numpy(part) for part in parts]), sum(cpu)

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()


class Theirs(Side):
    """The naive path."""

    def __init__(self, model: EvacModel, watch: Stopwatch):
        super().__init__(watch)
        self.model = NaiveEvac(model, torch.zeros(0))
        watch.watch(self.model, "encode", "encode")
        watch.watch(self.model, "decode", "decode")
        watch.watch(self.model, "denoiser", "unet")
        watch.watch(self.model, "tower", "tower")

    def begin(self, start: Tensor, capacity: int) -> None:
        """Begin an episode; nothing is computed yet, and the history may grow without limit."""
        del capacity
        self.model.restart(start)

    def imagine(self, poses: Tensor, camera: Camera, noise: list[Tensor]) -> Tensor:
        """Return the frames [B, chunk, 3, H, W] of the next chunk."""
        return self.model.imagine(poses, camera, noise, ETA)
