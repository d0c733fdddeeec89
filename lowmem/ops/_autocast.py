"""What ``torch.autocast`` does to a layer's inputs, for operators that it does not know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cast(x: Tensor, *others: Tensor | None) -> Any:
    """``x`` and ``others`` (None stays None) in autocast's dtype where it is on for x's device and x is not float64."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype == torch.float64:
        return (x, *others)
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if t is None else t.to(dtype) for t in (x, *others))
