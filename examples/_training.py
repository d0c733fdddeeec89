"""What every run of the examples shares: a learning rate's schedule, the loss, its mean over held-out text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate up over the first tenth, then down to a tenth of it."""
    up = max(1, steps // 10)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / up, 0.1 + 0.9 * max(0.0, 1 - (i - up) / max(1, steps - up)))
    )


@dataclass
class Run:
    """One way of fine-tuning: its model, its optimizer, and what was seen of it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Any
    numbers: dict[str, Any]


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[torch.Tensor], device: torch.device, progress: Any = None) -> float:
    """Mean loss over the batches' windows."""
    was, total = model.training, 0.0
    model.eval()
    for ids in batches:
        total += loss_of(model, ids.to(device)).item() * len(ids)
        if progress is not None:
            progress.step()
    model.train(was)
    return total / sum(len(ids) for ids in batches)
