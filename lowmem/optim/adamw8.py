"""AdamW whose moments are 8-bit codes in groups: :class:`AdamW8`, and COAT's choice of formats, :class:`Fp8AdamW`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .._errors import bad
from ..ops.codecs import WITH_SPAN, groups_of
from ..ops.lowbit_optim import check_codec, check_group_size
from ._shards import Shard, local, reduce_over_shards, shard_of, wrap

WEIGHTS = ("auto", "bf16+sr", "bf16+rem16", "fp32")
SMALL = 4096
"""Parameters with fewer elements keep fp32 moments."""

_NOT_SERVED = ("amsgrad", "differentiable")
_SHARED = ("m", "v", "group_size", "weights")  # groups that differ in these cannot load each other's state


def _number(op: str, name: str, value: Any, expected: str, ok: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not ok(value):
        bad(op, name, expected, repr(value))


class AdamW8(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with both moments in 8 bits, one multi-tensor step for all parameters.

    ``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``, ``p <- p - lr (wd p + m^ / (sqrt(v^) + eps))``, where m
    and v are decoded from their codes, updated in fp32, used, and encoded again.

    ``m``, ``v``: codecs of :mod:`lowmem.ops.codecs`; the default pair had the least error of m / sqrt(v) of all
    (docs/lowbit_optim.md). ``group_size``: elements that share a scale, 16 to 512. ``weights``: how bf16 parameters are
    written; fp32 parameters are always written in fp32.

    * ``"auto"``, ``"bf16+sr"``: stochastic rounding, no further state.
    * ``"bf16+rem16"``: an int16 remainder beside each bf16 weight; together they are an exact fp32 master.
    * ``"fp32"``: bf16 parameters are refused.

    Bytes of state a parameter at group 128: ``2 + 9/128 = 2.070`` for the default pair (a group keeps 4 bytes of scale
    for m and 5 for v), ``2 + 10/128 = 2.078`` at most, 2 more with the remainder. Parameters under 4096 elements keep
    fp32 moments (8 bytes a parameter).

    **Skipping.** With ``skip_nonfinite`` (the default) one pass over the gradients finds infinities and NaNs, and where
    there is one nothing is written and no step is counted; the decision stays on the device. ``max_grad_norm`` clips
    the global norm in the same pass. ``last_norm`` and ``last_skipped`` hold its results (float64 and bool tensors),
    None before the first such pass. GradScaler's scale and found_inf are taken as torch's fused optimizers take them.

    ``lr`` may be a tensor (one element). ``maximize``, ``capturable``, ``foreach`` and ``fused`` are accepted: the
    step is always fused over all tensors, and its state always lies on the parameters' devices. ``amsgrad`` and
    ``differentiable`` are refused.

    **State** a parameter, tensors only (``torch.load(weights_only=True)`` reads it): ``step`` (fp32), ``seed``
    (int64[1], drawn once from torch's generator), ``exp_avg`` and ``exp_avg_sq`` (codes, or fp32 where small) with
    ``_scale`` and, where the codec has one, ``_span``; ``remainder``. Loading it continues bit for bit. Parameters
    sharded by ``fully_shard`` (DTensor) keep DTensor states, cut where the parameter is: groups there divide a row,
    so whole groups move when the number of ranks changes (:mod:`lowmem.optim._shards`).

    Raises ValueError or TypeError (``lowmem.AdamW8: <argument>: expected ..., got ...``).
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        m: str = "de8",
        v: str = "log8",
        group_size: int = 128,
        weights: str = "auto",
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        op = type(self).__name__
        for name, value in (("amsgrad", amsgrad), ("differentiable", differentiable)):
            if value:
                bad(op, name, "False (it is not served)", repr(value))
        if foreach and fused:
            bad(op, "foreach, fused", "at most one of them True", "both")
        if max_grad_norm is not None:
            _number(op, "max_grad_norm", max_grad_norm, "a number > 0 or None", lambda x: x > 0)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "m": m,
            "v": v,
            "group_size": group_size,
            "weights": weights,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": False,
            "amsgrad": False,
        }
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.last_norm: Tensor | None = None
        self.last_skipped: Tensor | None = None
        super().__init__(params, defaults)
        self._step_supports_amp_scaling = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._step_supports_amp_scaling = True

    # ------------------------------------------------------------------------------------------------ what is accepted

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group that cannot be served is refused before it is added."""
        given = param_group["params"]
        if not isinstance(given, Tensor):
            param_group = {**param_group, "params": list(given)}
        self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        op = type(self).__name__
        lr, betas = group["lr"], group["betas"]
        if isinstance(lr, Tensor):
            if lr.numel() != 1:
                bad(op, "lr", "a number or a tensor of one element", f"shape {tuple(lr.shape)}")
        else:
            _number(op, "lr", lr, "a finite number >= 0", lambda x: x >= 0)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            bad(op, "betas", "two numbers in [0, 1)", repr(betas))
        for beta in betas:
            _number(op, "betas", beta, "two numbers in [0, 1)", lambda x: 0 <= x < 1)
        _number(op, "eps", group["eps"], "a finite number >= 0", lambda x: x >= 0)
        _number(op, "weight_decay", group["weight_decay"], "a finite number >= 0", lambda x: x >= 0)
        for name in ("m", "v"):
            check_codec(op, name, group[name])
        check_group_size(op, group["group_size"])
        if group["weights"] not in WEIGHTS:
            bad(op, "weights", f"one of {', '.join(WEIGHTS)}", repr(group["weights"]))
        for name in _NOT_SERVED:
            if group.get(name):
                bad(op, name, "False (it is not served)", repr(group[name]))
        params = group["params"]
        for entry in [params] if isinstance(params, Tensor) else params:
            p = entry[1] if isinstance(entry, tuple) else entry
            if not isinstance(p, Tensor):
                continue  # torch says what is wrong
            if p.dtype not in (torch.float32, torch.bfloat16):
                bad(op, "params", "float32 or bfloat16 parameters", p.dtype, kind=TypeError)
            if p.dtype == torch.bfloat16 and group["weights"] == "fp32":
                bad(op, "params", "float32 parameters (weights='fp32')", p.dtype, kind=TypeError)

    # ----------------------------------------------------------------------------------------------------------- state

    def _layout(self, p: Tensor, group: dict[str, Any]) -> tuple[Shard, int]:
        """How ``p`` is sharded, and its group size; 0 where its moments are fp32."""
        shard = shard_of(p, group["group_size"])
        return shard, shard.group_size if p.numel() >= SMALL else 0

    def _new_state(self, p: Tensor, group: dict[str, Any], *, seed: bool = True) -> dict[str, Tensor]:
        shard, size = self._layout(p, group)
        data = local(p)
        drawn = torch.zeros(1, dtype=torch.int64, device=data.device)
        if seed:
            drawn = shard.same_everywhere(torch.randint(0, 2**62, (1,), device=data.device))
        state = {"step": torch.zeros((), dtype=torch.float32, device=data.device), "seed": drawn}
        for name, codec in (("exp_avg", group["m"]), ("exp_avg_sq", group["v"])):
            if size == 0:
                state[name] = wrap(torch.zeros_like(data, dtype=torch.float32).contiguous(), p, shard, 0)
                continue
            n, groups = data.numel(), groups_of(data.numel(), size)
            shape = ((n + 1) // 2,) if codec == "int4" else tuple(data.shape)
            codes = torch.zeros(shape, dtype=torch.uint8, device=data.device)
            state[name] = wrap(codes, p, shard, 2 if codec == "int4" else 1)
            state[f"{name}_scale"] = wrap(torch.zeros(groups, device=data.device), p, shard, size)
            if codec in WITH_SPAN:
                span = torch.zeros(groups, dtype=torch.uint8, device=data.device)
                state[f"{name}_span"] = wrap(span, p, shard, size)
        if p.dtype == torch.bfloat16 and group["weights"] == "bf16+rem16":
            state["remainder"] = wrap(torch.zeros(data.shape, dtype=torch.int16, device=data.device), p, shard, 1)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, without its casts: codes and scales keep their dtypes. A state that does not fit these parameters
        (other formats, shapes or dtypes, keys that are missing) is refused before anything is replaced."""
        op = f"{type(self).__name__}.load_state_dict"
        groups, saved = self.param_groups, state_dict.get("param_groups")
        if saved is None or "state" not in state_dict:
            bad(op, "state_dict", "the keys 'state' and 'param_groups'", sorted(map(str, state_dict)))
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved]:
            bad(op, "state_dict", "as many groups and parameters as this optimizer has", "others")
        named: dict[Any, tuple[Tensor, dict[str, Any]]] = {}
        for group, other in zip(groups, saved, strict=True):
            for name in _SHARED:
                if name in other and other[name] != group[name]:
                    bad(op, name, repr(group[name]), repr(other[name]))
            named |= {key: (p, group) for key, p in zip(other["params"], group["params"], strict=True)}
        fresh: dict[Tensor, dict[str, Any]] = {}
        for key, state in state_dict["state"].items():
            p, group = named[key]
            if not state:
                continue
            wanted = self._new_state(p, group, seed=False)
            if set(wanted) != set(state):
                bad(op, f"state of parameter {key}", f"the keys {sorted(wanted)}", sorted(state))
            for name, like in wanted.items():
                got = state[name]
                if not isinstance(got, Tensor) or got.dtype != like.dtype or got.shape != like.shape:
                    what = f"{got.dtype} {tuple(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
                    bad(op, f"{name} of parameter {key}", f"{like.dtype} {tuple(like.shape)}", what)
            fresh[p] = {
                name: value.detach().clone().to(like.device)
                for (name, like), value in zip(wanted.items(), (state[name] for name in wanted), strict=True)
            }
        super().load_state_dict({**state_dict, "state": {}})
        self.state.clear()
        self.state.update(fresh)

    # ------------------------------------------------------------------------------------------------------------ step

    def _gather(self) -> list[tuple[dict[str, Any], list[Tensor], list[Tensor]]]:
        """Groups with the parameters that have gradients, and these, after all checks."""
        op, found = f"{type(self).__name__}.step", []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads: list[Tensor] = []
            for p in params:
                g = p.grad
                assert g is not None
                if g.is_sparse:
                    bad(op, "params", "dense gradients", "a sparse one", kind=TypeError)
                if g.is_complex() or local(g).dtype not in (torch.float32, torch.bfloat16):
                    bad(op, "params", "gradients in float32 or bfloat16", g.dtype, kind=TypeError)
                if local(g).shape != local(p).shape or local(g).device != local(p).device:
                    bad(op, "params", "gradients like their parameters", f"{g.device} {tuple(g.shape)}")
                grads.append(local(g))
            if params:
                found.append((group, params, grads))
        return found

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over every parameter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = self._gather()
        for group, params, _ in work:
            for p in params:
                if not self.state[p]:
                    self.state[p] = self._new_state(p, group)
        everything = [g for _, _, grads in work for g in grads]
        scale, found = self._factor([p for _, params, _ in work for p in params], everything)
        for group, params, grads in work:
            devices = dict.fromkeys(g.device for g in grads)
            for device in devices:
                picked = [i for i, g in enumerate(grads) if g.device == device]
                self._run(group, [params[i] for i in picked], [grads[i] for i in picked], scale, found, device)
        return loss

    def _factor(self, params: list[Tensor], grads: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """The number that gradients are multiplied by, and whether to skip (fp32 tensors, or None where there is
        none)."""
        amp_scale, amp_found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        scale = None if amp_scale is None else 1.0 / amp_scale.reshape(()).double()
        found = None if amp_found is None else amp_found.reshape(()).double()
        measure = self.max_grad_norm is not None or (self.skip_nonfinite and amp_found is None)
        if measure and grads:
            home = grads[0].device
            total = torch.zeros(2, dtype=torch.float64, device=home)
            for device in dict.fromkeys(g.device for g in grads):
                total += _norm_of([g for g in grads if g.device == device], params, grads, device).to(home)
            norm = total[0].sqrt()
            if scale is not None:
                norm = norm * scale.to(home)
            if self.skip_nonfinite:
                broken = total[1].clamp(max=1.0)
                found = broken if found is None else torch.maximum(found.to(home), broken)
            self.last_norm = norm
            if self.max_grad_norm is not None:
                clip = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
                scale = clip if scale is None else scale.to(home) * clip
        self.last_skipped = None if found is None else found != 0
        return (None if scale is None else scale.float()), (None if found is None else found.float())

    def _run(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        scale: Tensor | None,
        found: Tensor | None,
        device: torch.device,
    ) -> None:
        states = [self.state[p] for p in params]
        steps = [s["step"] for s in states]
        scale = None if scale is None else scale.to(device)
        found = None if found is None else found.to(device)
        if found is None:
            torch._foreach_add_(steps, 1.0)
        else:
            torch._foreach_add_(steps, (found == 0).float())
        lr = group["lr"]
        lr = lr.detach().float().to(device).reshape(()) if isinstance(lr, Tensor) else _number_on(device, float(lr))
        none_f, none_b = torch.empty(0, device=device), torch.empty(0, dtype=torch.uint8, device=device)
        none_s = torch.empty(0, dtype=torch.int16, device=device)
        by_size: dict[int, list[int]] = {}
        layouts = [self._layout(p, group) for p in params]
        for i, (_, size) in enumerate(layouts):
            by_size.setdefault(size or group["group_size"], []).append(i)
        for size, picked in by_size.items():
            data = [local(params[i]) for i in picked]
            dense = [d if d.is_contiguous() else d.contiguous() for d in data]
            some = [states[i] for i in picked]

            def column(key: str, none: Tensor, some: list[Any] = some) -> list[Tensor]:
                return [local(s[key]) if key in s else none for s in some]

            torch.ops.lowmem.lowbit_adamw_(
                dense,
                [grads[i].contiguous() for i in picked],
                column("remainder", none_s),
                column("exp_avg", none_b),
                column("exp_avg_scale", none_f),
                column("exp_avg_span", none_b),
                column("exp_avg_sq", none_b),
                column("exp_avg_sq_scale", none_f),
                column("exp_avg_sq_span", none_b),
                [steps[i] for i in picked],
                [s["seed"] for s in some],
                [layouts[i][0].offset for i in picked],
                lr,
                scale,
                found,
                *group["betas"],
                group["eps"],
                group["weight_decay"],
                group["m"],
                group["v"],
                size,
                group["maximize"],
            )
            for old, new in zip(data, dense, strict=True):
                if new is not old:
                    old.copy_(new)


def _number_on(device: torch.device, value: float) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=device)


def _norm_of(some: list[Tensor], params: list[Tensor], grads: list[Tensor], device: torch.device) -> Tensor:
    """``[sum of squares, 1 where one is not finite]`` of the gradients on ``device``, over all ranks that hold
    shards."""
    by_mesh: dict[Any, list[Tensor]] = {}
    meshes: dict[Any, Any] = {}
    for p, g in zip(params, grads, strict=True):
        if g.device == device:
            key, mesh = shard_of(p, 16).mesh_key, p
            by_mesh.setdefault(key, []).append(g.contiguous())
            meshes.setdefault(key, mesh)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for key, tensors in by_mesh.items():
        part = torch.ops.lowmem.lowbit_grad_norm(tensors)
        total += part if key is None else reduce_over_shards(part, meshes[key])
    return total


class Fp8AdamW(AdamW8):
    """:class:`AdamW8` with COAT's formats (arXiv 2410.19313): both moments E4M3 with dynamic range expansion.

    ``2 + 10/128 = 2.078`` bytes of state a parameter at group 128, as COAT's with its three fp32 numbers a group cut to
    one and a byte.
    """

    def __init__(self, params: Any, lr: float | Tensor = 1e-3, **options: Any) -> None:
        super().__init__(params, lr, **{"m": "e4m3+exp", "v": "e4m3+exp", **options})


def state_bytes(optimizer: torch.optim.Optimizer, params: Iterable[Tensor] | None = None) -> int:
    """Bytes of the states of ``params`` (default: all that have one), on this rank."""
    kept = optimizer.state if params is None else {p: optimizer.state[p] for p in params}
    return sum(local(t).nbytes for state in kept.values() for t in state.values() if isinstance(t, Tensor))
