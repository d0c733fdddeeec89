""":class:`RandLoRALinear`, a drop-in ``nn.Linear`` with a full-rank update of few parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._errors import bad
from ..ops.lora import accumulate_dtype
from ..ops.randlora import bases_of, randlora_delta, randlora_linear
from .lora_layer import MERGE_ROWS, check_adapter


class RandLoRALinear(nn.Linear):
    """``y = x W^T + bias + drop_p(x) dW^T`` over ``base``'s own weight and bias, frozen and not copied (RandLoRA, arXiv
    2502.00987; :mod:`lowmem.ops.randlora` has the formula of ``dW``).

    Trained are ``randlora_lambda`` ``[r, n]`` and ``randlora_gamma`` ``[n, min(K, N)]``, ``n = ceil(min(K, N) / r)``:
    PEFT's names, shapes and start (lambda 0, gamma ``1 / max(n, min(K, N))``). The bases take no memory: they are drawn
    again from ``basis_seed`` in every call, or belong to ``bases``, which any number of layers share. Saved for
    backward, per input row: ``K * itemsize`` for ``x``, one storage with every layer over it.

    Args:
        base: a plain ``nn.Linear``.
        r: rank of each base; fewer parameters the larger it is.
        alpha: the update is scaled by ``alpha / r``.
        dropout: drop probability of the update's input while training.
        seed: of the bases: equal for equal seeds, on every backend. Ignored where ``bases`` is given.
        bases: ``(A, B)`` as PEFT holds them: ``[r, 1, >= min(K, N)]`` and ``[>= max(K, N), >= n, r]``. They are not in
            the state dict.
        adapter_dtype: of lambda and gamma; None means fp32 over a 16-bit weight and the weight's dtype otherwise.

    ``state_dict`` keys: ``weight``, ``bias``, ``randlora_lambda``, ``randlora_gamma``, ``basis_seed``.

    Raises ValueError or TypeError ``lowmem.RandLoRALinear: <argument>: expected ..., got ...``.
    """

    basis_seed: Tensor | None

    def __init__(
        self,
        base: nn.Linear,
        *,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        seed: int = 0,
        bases: tuple[Tensor, Tensor] | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        op = "RandLoRALinear"
        if type(base) is not nn.Linear:
            got = type(base).__name__
            bad(op, "base", "an nn.Linear (no subclass: its own forward would be lost)", got, kind=TypeError)
        check_adapter(op, "default", r, alpha, dropout)
        low = min(base.weight.shape)
        if r > low:
            bad(op, "r", f"at most min(K, N) = {low}", r)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            bad(op, "seed", "an integer in [0, 2**63)", repr(seed))
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        base.requires_grad_(False)
        self.register_parameter("bias", base.bias)
        self.r, self.alpha, self.dropout = r, float(alpha), float(dropout)
        device, dtype = self.weight.device, adapter_dtype or accumulate_dtype(self.weight.dtype)
        count = -(-low // r)
        self.randlora_lambda = nn.Parameter(torch.zeros(r, count, device=device, dtype=dtype))
        start = 1.0 / max(count, low)
        self.randlora_gamma = nn.Parameter(torch.full((count, low), start, device=device, dtype=dtype))
        self.register_buffer("basis_seed", None if bases else torch.tensor([seed], device=device))
        self.bases = bases
        self.merged = False
        self._disabled = 0
        self.train(base.training)

    @property
    def scaling(self) -> float:
        """``alpha / r``."""
        return self.alpha / self.r

    def delta_weight(self) -> Tensor:
        """``dW`` ``[N, K]`` in the accumulation dtype."""
        dtype = accumulate_dtype(self.weight.dtype)
        k, n = self.in_features, self.out_features
        shared_a, shared_b = self.bases or (None, None)
        narrow, wide = bases_of(k, n, self.r, shared_a, shared_b, self.basis_seed, dtype)
        a, b = randlora_delta(k, n, self.randlora_lambda, self.randlora_gamma, narrow, wide)
        return (b.to(dtype) @ a.to(dtype)) * self.scaling

    @torch.no_grad()
    def _add(self, sign: float) -> None:
        delta = self.delta_weight()
        if not bool(torch.isfinite(delta).all()):
            hint = "the weight is untouched"
            bad("RandLoRALinear", "randlora_lambda", "finite adapter weights", "NaN or infinity", hint=hint)
        for start in range(0, self.out_features, MERGE_ROWS):
            block = slice(start, start + MERGE_ROWS)
            self.weight[block] = self.weight[block].to(delta.dtype).add_(delta[block], alpha=sign)

    def merge(self) -> None:
        """``W += dW``, computed in fp32 and rounded once; forward then costs one GEMM."""
        if self.merged:
            bad("RandLoRALinear", "merge", "a layer that is not merged", "a merged one")
        self._add(1.0)
        self.merged = True

    def unmerge(self) -> None:
        """Take ``dW`` out of W again, to within one rounding of the merged weight."""
        if not self.merged:
            bad("RandLoRALinear", "unmerge", "a merged layer", "a layer that is not merged")
        self._add(-1.0)
        self.merged = False

    @contextmanager
    def disabled(self) -> Iterator[RandLoRALinear]:
        """Context in which the layer computes its base alone, merged or not."""
        self._disabled += 1
        try:
            yield self
        finally:
            self._disabled -= 1

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Linear's name)
        """``[..., K]`` to ``[..., N]``; see :func:`lowmem.ops.randlora_linear`."""
        if bool(self._disabled) != self.merged:
            return F.linear(input, self.weight, self.bias)  # the base alone, or the merged weight
        p = self.dropout if self.training and not self.merged else 0.0
        return randlora_linear(
            input,
            self.weight,
            self.randlora_lambda,
            self.randlora_gamma,
            -self.scaling if self.merged else self.scaling,  # merged and disabled: take dW off again
            basis_seed=self.basis_seed,
            bases=self.bases,
            bias=self.bias,
            p=p,
            seed=torch.randint(0, 2**62, (1,), device=input.device) if p > 0 else None,
        )

    def extra_repr(self) -> str:
        """torch's own line and the adapter's."""
        bases = "shared bases" if self.bases else f"seed={int(self.basis_seed)}"  # type: ignore[arg-type]
        return f"{super().extra_repr()}, r={self.r}, alpha={self.alpha:g}, dropout={self.dropout:g}, {bases}"

    # ---------------------------------------------------------------------------------------------------- state dict

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            metadata[prefix[:-1]]["merged"] = self.merged

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *others: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)
        if prefix + "weight" in state_dict:
            self.merged = bool(local_metadata.get("merged", False))
