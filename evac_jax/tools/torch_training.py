"""Common parts of the PyTorch training tools: schedule, optimizers, moving average, progress."""

import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from evac_jax.errors import CheckpointError, ConfigError
from evac_jax.tools import resume

MUON_SMALLEST = 16  # for a narrower matrix orthogonalisation has no use
OPTIMIZERS = ("adamw", "muon")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def cosine_lr(step: int, total: int, peak: float, warmup: int, floor: float = 0.02) -> float:
    """Linear warm-up over `warmup` steps, then a cosine from `peak` to `floor * peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def make_optimizers(
    module: nn.Module, kind: str, *, weight_decay: float = 0.01, beta2: float = 0.99
) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a module's trainable parameters; `set_lr` before every step.

    Args:
        module: what is trained, on its device already.
        kind: "adamw" for all, or "muon" for the weights of linear layers and AdamW for the rest.
            Muon's steps are scaled to the size of AdamW's, so both use the same learning rate.
        weight_decay: of both.
        beta2: of AdamW.

    Raises:
        ConfigError: nothing is trainable.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError("nothing to train: every parameter is frozen; see --train")
    matrices = set()
    if kind == "muon":
        weights = (m.weight for m in module.modules() if isinstance(m, nn.Linear))
        matrices = {w for w in weights if w.requires_grad and min(w.shape) >= MUON_SMALLEST}
    rest = [p for p in parameters if p not in matrices]
    optimizers: list[torch.optim.Optimizer] = []
    if rest:
        betas = (0.9, beta2)
        optimizers.append(
            torch.optim.AdamW(rest, weight_decay=weight_decay, betas=betas, fused=True)
        )
    if matrices:
        chosen = [p for p in parameters if p in matrices]
        optimizers.append(
            torch.optim.Muon(chosen, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Return the autocast context for a forward pass; for "float32" it does nothing."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


class Ema:
    """Exponential moving average of the trainable parameters, in their own precision."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self._average = {n: p.detach().clone() for n, p in _trainable(module).items()}
        self._updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards the module's parameters; in the first steps faster than by `decay`."""
        self._updates += 1
        decay = min(self.decay, (1 + self._updates) / (10 + self._updates))
        parameters = _trainable(module)
        averages = [self._average[name] for name in parameters]
        get_ema_multi_avg_fn(decay)(averages, [p.detach() for p in parameters.values()], None)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the module's parameters and the average; a second call undoes it."""
        for name, parameter in _trainable(module).items():
            kept = parameter.detach().clone()
            parameter.copy_(self._average[name])
            self._average[name] = kept

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` takes, for resuming."""
        return {"average": self._average, "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`'s output."""
        self._average, self._updates = state["average"], state["updates"]


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def trainable_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the trainable parameters by name; other files hold the frozen ones."""
    return {name: parameter.detach() for name, parameter in _trainable(module).items()}


@torch.no_grad()
def load_trainable(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load the output of `trainable_state`.

    Raises:
        CheckpointError: it belongs to other parameters.
    """
    parameters = _trainable(module)
    shapes = [{n: tuple(v.shape) for n, v in part.items()} for part in (parameters, state)]
    if shapes[0] != shapes[1]:
        differing = [n for n in {**shapes[0], **shapes[1]} if shapes[0].get(n) != shapes[1].get(n)]
        raise CheckpointError(
            f"the saved progress trains other parameters ({', '.join(differing[:4])}, ...); "
            "remove progress.pt to start anew, or run with the same --train and sizes"
        )
    for name, parameter in parameters.items():
        parameter.copy_(state[name])


def save_progress(path: Path, state: dict[str, Any]) -> None:
    """Write a resumable training state (tensors and plain values) atomically.

    Raises:
        StorageError: it cannot be written; an earlier one stays.
    """
    with resume.saving(path) as temporary:
        try:
            with temporary.open("wb") as file:
                torch.save(state, file)
        except RuntimeError as error:  # of torch's own end of the file, after the disk's error
            if not isinstance(error.__context__, OSError):
                raise
            raise error.__context__ from error


def load_progress(path: Path, setup: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a state that `save_progress` wrote; its "setup" must be that of this run.

    Raises:
        CheckpointError: it is damaged, or was made with other arguments.
    """
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()  # compares the checksums, which torch does not
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise resume.damaged(path, error) from error
    if bad:
        raise resume.damaged(path, f"its part {bad} has changed")
    state = torch.load(path, weights_only=True, map_location=device)
    resume.check_same_run(path, state["setup"], setup)
    return state
