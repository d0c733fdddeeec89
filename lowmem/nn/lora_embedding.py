""":class:`FusedLoRAEmbedding`, a drop-in ``nn.Embedding`` with named low-rank adapters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._errors import bad
from ..ops.lora import accumulate_dtype
from ..ops.lora_embedding import lora_embedding
from .lora_layer import LoRALayer


class FusedLoRAEmbedding(LoRALayer, nn.Embedding):
    """``y = W[ids] + scale * A[:, ids]^T B^T`` over ``base``'s own weight ``W`` ``[V, N]``, frozen and not copied.

    Saved for backward: ``ids`` and nothing else. Gradients are dense and exact; column ``padding_idx`` of A gets none.
    A ``[r, V]`` starts at zero and B ``[N, r]`` normal, as PEFT's do. ``dropout`` is kept for the adapter's file and
    has no effect: an index has no elements to drop (PEFT applies none here either). No DoRA and no gate.

    Args:
        base: a plain ``nn.Embedding`` without ``max_norm``.
        name: the first adapter's name.
        adapter: r, alpha and the rest of :meth:`add_adapter`'s options.

    ``state_dict`` keys: ``weight``, ``lora_A.<name>``, ``lora_B.<name>``.

    Raises ValueError or TypeError ``lowmem.FusedLoRAEmbedding: <argument>: expected ..., got ...``.
    """

    op = "FusedLoRAEmbedding"
    only_plain = "an embedding has plain adapters"

    def __init__(self, base: nn.Embedding, *, name: str = "default", **adapter: Any) -> None:
        if type(base) is not nn.Embedding:
            got = type(base).__name__
            bad(self.op, "base", "an nn.Embedding (no subclass: its own forward would be lost)", got, kind=TypeError)
        if base.max_norm is not None:
            bad(self.op, "base", "an embedding without max_norm, which rewrites W", f"max_norm={base.max_norm}")
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = base.num_embeddings, base.embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = base.padding_idx, None, base.norm_type
        self.scale_grad_by_freq, self.sparse = base.scale_grad_by_freq, False
        self.weight = base.weight
        self.bias = None
        self._init_adapters("seed")
        self.add_adapter(name, **adapter)
        self.set_adapter(name)
        self.train(base.training)

    def adapter_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """``[r, V]`` and ``[N, r]``."""
        return (r, self.num_embeddings), (self.embedding_dim, r)

    def _new_parts(self, r: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        # A lies in memory as [V, r]: the numbers of a token are neighbours
        a = torch.zeros(self.num_embeddings, r, device=device, dtype=dtype).t()
        return {"A": a, "B": torch.randn(self.embedding_dim, r, device=device, dtype=dtype)}

    def _delta(self, name: str) -> tuple[Tensor, Tensor]:
        dtype = accumulate_dtype(self.weight.dtype)
        return (self.lora_B[name].to(dtype) * self.scaling(name)).t(), self.lora_A[name].to(dtype).t()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Embedding's name)
        """ids of any shape to ``[..., N]``; see :func:`lowmem.ops.lora_embedding`."""
        if self._disabled and self.merged is not None:
            a, b = self._delta(self.active_adapter)  # take the adapter off the merged rows
            rows = F.embedding(input, self.weight)
            return rows - (F.embedding(input, b) @ a).to(rows.dtype)
        if self._disabled or self.merged is not None:
            return F.embedding(input, self.weight)
        name = self.active_adapter
        return lora_embedding(
            input,
            self.weight,
            self.lora_A[name],
            self.lora_B[name],
            self.scaling(name),
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )
