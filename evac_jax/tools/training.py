"""What every PyTorch training tool shares: schedule, moving average, resumable state."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn


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


class Ema:
    """Exponential moving average of the trainable parameters, kept in float32."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self._average = {n: p.detach().clone() for n, p in module.named_parameters()}
        self._updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards the module's parameters; early on, faster than `decay` says."""
        self._updates += 1
        decay = min(self.decay, (1 + self._updates) / (10 + self._updates))
        for name, parameter in module.named_parameters():
            self._average[name].lerp_(parameter.detach(), 1 - decay)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the module's parameters and the average; call twice to get back."""
        for name, parameter in module.named_parameters():
            kept = parameter.detach().clone()
            parameter.copy_(self._average[name])
            self._average[name] = kept

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` takes, for resuming."""
        return {"average": self._average, "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`'s output."""
        self._average, self._updates = state["average"], state["updates"]


def save_progress(path: Path, state: dict[str, Any]) -> None:
    """Write a resumable training state (tensors and plain values) atomically."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)
