"""``ProjAdamW``: Adam in a low-rank subspace of each gradient, for every method that differs only in how the subspace
is found, when it is renewed, what becomes of the moments, and what is done with the rest of the gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from .._errors import bad
from ..nn.projected import ProjectedLinear
from . import projected, subspace
from .codec import find_codec
from .job import Job
from .policy import OP, STRUCTURE, FisherWindow, OnConverged, OnSimilar, check_group

_BATCH = 1 << 24  # elements of the gradients that one batched refresh stacks


class ProjAdamW(Optimizer):
    """Adam in a low-rank subspace of the gradient. For a matrix W [m, n] with gradient G and a basis P, orthonormal on
    one side (``side="auto"``: the shorter one)::

        R = P^T G  (or G P)                      M, V = Adam moments of R,  r (m or n) numbers each
        N = (M / (1-b1^t)) / (sqrt(V / (1-b2^t)) + eps)
        W <- (1 - lr weight_decay) W - lr (scale P N + residual)

    State per matrix, s the projected side and l the other: ``P s r`` and ``2 r l`` numbers, against AdamW's ``2 m n``.

    Rank: ``rank`` (fixed), ``density`` (a fraction of s) or ``energy``: at every refresh the smallest r with
    ``|G - P P^T G|^2 <= (1 - energy) |G|^2``, within [``rank_min``, ``rank_max``] (AdaRankGrad, arXiv 2410.17881).
    A rank above min(m, n) is lowered to it, with a warning. With none of them given, rank=128.

    Arguments that name a method's axes:

    - ``projector``: ``"rsvd"`` (randomized SVD), ``"power"`` (``iters``, by default 2, power steps from the basis of
      before and half as many random columns), ``"svd"`` (exact), ``"random"`` (orthonormal; Gaussian with variance 1/r
      under ``residual="apollo"``), ``"randk"`` (r rows or columns drawn at random: index gathers, no products).
    - ``refresh``: steps between two bases, :class:`OnConverged` or :class:`OnSimilar`. ``stagger`` moves each matrix's
      first period, so that refreshes spread over the steps.
    - ``moments`` on a new basis, with C = P_new^T P_old: ``"rotate"`` (M <- C M, V <- (C o C) V, never negative),
      ``"keep"`` (as they are), ``"reset"`` (zeros, and the bias corrections start again).
    - ``residual``, from E = G - P R, times ``residual_scale``: ``"fira"``: column (row) j of E times |N_j|/|R_j|;
      ``"sign"``: sign(E); ``"apollo"``: no P N at all, column j of G times ``scale`` |N_j|/|R_j|
      (``granularity="tensor"``: |N|/|R|). ``limiter``: the norm of a Fira or APOLLO residual grows by at most this
      factor a step; None turns it off.
    - ``precond``: :class:`FisherWindow` or None. ``reparam="weight_norm"``: W = g V/|V| by rows; the subspace holds V's
      gradient, g has moments of its own, and weight decay acts on g.
    - ``state``: ``"fp32"``, ``"bf16"``, ``"int8"``, ``"log8"``, ``"fp8"`` or a registered codec, for M and V.
      ``basis="int8"`` keeps P so too; by default P has the weight's dtype.
    - ``rounding``: ``"nearest"`` or ``"stochastic"``, of bf16 weights. ``eps_hat=True`` adds eps to sqrt(V) before the
      bias correction (Kingma and Ba's eps-hat; the released GaLore, Fira and APOLLO), not after.

    AdamW, as torch.optim.AdamW has it, serves parameters that are not matrices, matrices with a side below ``min_dim``,
    and groups with ``project=False``; :func:`lowrank_groups` makes such groups. Options may differ from group to group.

    A step in which any gradient holds NaN or infinity is skipped as a whole: nothing changes but :attr:`skipped`
    (one host read a step; ``nonfinite="ignore"`` saves it, fuses projection and Adam, and lets them through). ``lr``
    may be a tensor. The state holds tensors only, and a resumed run repeats the bits of an uninterrupted one.

    Raises ValueError for options that cannot be served, TypeError for sparse gradients.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int | None = None,
        energy: float | None = None,
        density: float | None = None,
        rank_max: int | None = None,
        rank_min: int = 1,
        side: str = "auto",
        refresh: int | OnConverged | OnSimilar = 200,
        stagger: bool = True,
        projector: str = "rsvd",
        iters: int | None = None,
        moments: str = "rotate",
        residual: str = "none",
        residual_scale: float = 1.0,
        limiter: float | None = 1.01,
        granularity: str = "channel",
        precond: FisherWindow | None = None,
        reparam: str | None = None,
        state: str = "fp32",
        basis: str | None = None,
        scale: float = 0.25,
        rounding: str = "nearest",
        eps_hat: bool = False,
        min_dim: int = 16,
        project: bool = True,
        nonfinite: str = "skip",
        seed: int | None = None,
    ) -> None:
        if rank is None and energy is None and density is None:
            rank = 128
        if isinstance(lr, Tensor) and lr.numel() != 1:
            bad(OP, "lr", "a number or a tensor of one element", f"shape {tuple(lr.shape)}")
        if rounding not in ("nearest", "stochastic"):
            bad(OP, "rounding", "'nearest' or 'stochastic'", repr(rounding))
        given = dict(locals())
        defaults = {name: given[name] for name in given if name not in ("self", "params", "__class__", "seed")}
        # one draw from torch's generator, so that manual_seed fixes every basis
        self._seed = int(torch.randint(0, 2**62, (1,))) if seed is None else int(seed)
        self._skipped = 0
        self._layers: dict[int, ProjectedLinear] = {}  # of the parameters that stand for a projected layer's weight
        super().__init__(params, defaults)

    # --------------------------------------------------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group's options are checked, ``rank``, ``energy`` and ``density`` replace each other."""
        own = [name for name in ("rank", "energy", "density") if param_group.get(name) is not None]
        if own:
            param_group = {**{name: None for name in ("rank", "energy", "density")}, **param_group}
        merged = {**self.defaults, **param_group}
        check_group(merged)
        find_codec("state", merged["state"])
        if merged["basis"] is not None:
            find_codec("basis", merged["basis"])
        param_group = {**param_group, "refresh": merged["refresh"], "precond": merged["precond"]}
        super().add_param_group(param_group)
        projected.attach(self, self.param_groups[-1])
        self._warn_clamped(self.param_groups[-1])

    def _warn_clamped(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            if self._projects(p, group) and group["energy"] is None and id(p) not in self._layers:
                wanted = subspace.wanted_rank(group, p.shape, subspace.is_left(group["side"], p.shape))
                if wanted > min(p.shape):
                    warnings.warn(
                        f"lowmem.ProjAdamW: rank: expected at most min(m, n) = {min(p.shape)} for a weight of shape "
                        f"{tuple(p.shape)}, got {wanted}: lowered",
                        stacklevel=4,
                    )

    def _projects(self, p: Tensor, group: dict[str, Any]) -> bool:
        if id(p) in self._layers:
            return True
        return bool(group["project"]) and p.dim() == 2 and min(p.shape) >= group["min_dim"] and p.is_floating_point()

    @property
    def skipped(self) -> int:
        """How many steps were skipped because a gradient was not finite."""
        return self._skipped

    # ----------------------------------------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step; returns the closure's loss, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._update()
        finally:
            projected.synchronise(self)
        return loss

    def _update(self, only: Tensor | None = None) -> None:
        """The update of every parameter, or of one."""
        jobs, others = self._collect(only)
        checks = [self._prepare(job) for job in jobs]
        checks += [projected.whole(torch.linalg.vector_norm(p.grad)) for p, _ in others if p.grad is not None]
        skip = any(group["nonfinite"] == "skip" for group in self.param_groups)
        if skip and not _all_finite([check for check in checks if check is not None]):
            self._skipped += 1
            return
        self._refresh([job for job in jobs if job.due])
        for job in jobs:
            job.advance()
        self._adamw(others)

    @torch.no_grad()
    def step_parameter(self, p: Tensor) -> None:
        """The update of one parameter from its ``.grad``, as :func:`lowmem.optim.layerwise_` wants it; a gradient that
        is not finite skips this parameter alone."""
        try:
            self._update(p)
        finally:
            projected.synchronise(self, p)

    def _collect(self, only: Tensor | None) -> tuple[list[Job], list[tuple[Tensor, dict[str, Any]]]]:
        jobs: list[Job] = []
        others = []
        count = 0
        for group in self.param_groups:
            for p in group["params"]:
                projects = self._projects(p, group)
                count += projects
                if p.grad is None or (only is not None and p is not only):
                    continue
                if p.grad.is_sparse:
                    bad(OP, "grad", "a dense gradient", "a sparse one", kind=TypeError, hint="torch.optim.SparseAdam")
                if not projects:
                    others.append((p, group))
                    continue
                job = self._job(p, group, count - 1)
                self._check_shapes(job)
                jobs.append(job)
        for job in jobs:
            # a projected layer that falls due has gathered G in this backward, or must wait for the next
            job.due = job.dense is not None if id(job.param) in self._layers else self._due(job, count)
        return jobs, others

    def _job(self, p: Tensor, group: dict[str, Any], index: int) -> Job:
        """What there is to do for ``p``; for a projected layer with another ``weight``, and R instead of G."""
        state = self.state[p]
        layer = self._layers.get(id(p))
        if not state:
            state["step"] = torch.tensor(0.0)
            state["since"] = torch.tensor(0.0)  # steps since the basis was found
            state["shape"] = torch.tensor(p.shape if layer is None else layer.weight.shape)
            state["place"] = torch.tensor(float(index))  # among the projected matrices, for staggering
            state["seed"] = torch.tensor([(self._seed + index * 0x9E3779B9) % 2**62])
            state["history"] = torch.zeros(0, 3, dtype=torch.float64)  # (step, rank, captured energy) of every refresh
        if layer is not None:
            return projected.job(layer, p, group, state)
        return Job(p, p, group, state, subspace.is_left(group["side"], p.shape), dense=p.grad)

    def _check_shapes(self, job: Job) -> None:
        layer = self._layers.get(id(job.param))
        made, now = job.shape, tuple((job.weight if layer is None else layer.weight).shape)
        if made != now:
            hint = "del optimizer.state[p] starts it anew"
            bad(OP, "params", f"the shape that the state was made for, {made}", now, hint=hint)

    def _due(self, job: Job, count: int) -> bool:
        state, rule = job.state, job.group["refresh"]
        if "basis" not in state:
            return True
        if float(state["norm"]) == 0.0:  # found from a zero gradient: there was nothing to find
            return True
        since, step = int(state["since"]), int(state["step"])
        gap = rule if isinstance(rule, int) else int(state["gap"])
        first = step == since
        if first and job.group["stagger"]:
            gap = max(1, gap - int(state["place"]) * gap // max(count, 1))
        if isinstance(rule, dict) and rule["rule"] == "OnConverged":
            calm = float(state["last"]) < rule["tol"] * float(state["norm"])
            return since >= gap or (calm and since >= rule["min_gap"])
        return since >= gap

    def _prepare(self, job: Job) -> Tensor | None:
        """R where the basis is known; the number that is finite only where the gradient is."""
        if job.r is None and not job.due and not job.fusable():
            job.r = job.project()
        if job.r is not None:
            return subspace.norm(job.r)
        return None if job.fusable() and not job.due else subspace.norm(job.dense)

    def _refresh(self, jobs: list[Job]) -> None:
        """New bases for ``jobs``; equal matrices with a fixed rank share the batched products."""
        batches: dict[Any, list[Job]] = {}
        for number, job in enumerate(jobs):
            group, g = job.group, job.dense
            known = job.state["basis"].shape if "basis" in job.state else None
            alone = group["energy"] is not None or group["reparam"] is not None or group["projector"] in ("svd", "rsvd")
            key = number if alone else (id(group), g.shape, g.dtype, g.device, known)
            batch = batches.setdefault(key, [])
            if len(batch) * g.numel() >= _BATCH:
                batches[(key, number)] = batches.pop(key)
                batch = batches[key] = []
            batch.append(job)
        for batch in batches.values():
            for job, basis in zip(batch, self._find(batch), strict=True):
                job.change_basis(basis)
                self.basis_changed(job)

    def _find(self, batch: list[Job]) -> list[Tensor]:
        job = batch[0]
        group, left, shape = job.group, job.left, job.shape
        short = shape[0] if left else shape[1]
        rank = min(subspace.wanted_rank(group, shape, left), *shape)
        if id(job.param) in self._layers:
            rank = min(rank, self._layers[id(job.param)].projection.width)
        seeds = [each.draw() for each in batch]
        projector = group["projector"]
        if projector == "randk":
            return [subspace.random_coordinates(short, rank, seed).to(job.weight.device) for seed in seeds]
        if rank == 0:
            return [each.weight.new_zeros(short, 0) for each in batch]
        if projector == "random":
            orthogonal = group["residual"] != "apollo"
            return [subspace.random_basis(short, rank, seed, orthogonal=orthogonal) for seed in seeds]
        olds = [each.basis() if "basis" in each.state else None for each in batch]
        dense = [each.direction() for each in batch]
        dense = [g if left else g.T for g in dense]
        if group["energy"] is not None:
            total = float(subspace.norm(dense[0]).double() ** 2)
            least = min(group["rank_min"], *shape)
            return [
                subspace.energy_rank(
                    dense[0], total, group["energy"], least, rank, projector, olds[0], seeds[0], group["iters"]
                )[0]
            ]
        old = None if olds[0] is None else torch.stack([o for o in olds if o is not None])
        bases, _ = subspace.singular_basis(torch.stack(dense) if len(dense) > 1 else dense[0][None], rank, projector,
                                           old, seeds, group["iters"])  # fmt: skip
        return list(bases)

    def basis_changed(self, job: Job) -> None:
        """Called after ``job``'s basis was renewed: a projected layer's forward and backward use it from here on."""
        if id(job.param) in self._layers:
            projected.renewed(self._layers[id(job.param)], job)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; the gradients that projected layers gather for a refresh are dropped too."""
        super().zero_grad(set_to_none)
        for layer in self._layers.values():
            layer.projection.dense = None

    # ----------------------------------------------------------------------------------------------------- the others

    def _adamw(self, others: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """torch's own AdamW for parameters without a subspace."""
        local = projected.local
        by_group: dict[int, list[Tensor]] = {}
        groups = {id(group): group for _, group in others}
        for p, group in others:
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            by_group.setdefault(id(group), []).append(p)
        for key, params in by_group.items():
            group = groups[key]
            states = [self.state[p] for p in params]
            on_cpu = all(p.device.type == "cpu" for p in params)
            adamw(
                [local(p) for p in params],
                [local(p.grad) for p in params if p.grad is not None],
                [local(s["exp_avg"]) for s in states],
                [local(s["exp_avg_sq"]) for s in states],
                [],
                [s["step"] for s in states],
                foreach=None if on_cpu else True,
                fused=on_cpu,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=float(group["lr"]),
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    # --------------------------------------------------------------------------------------------------------- report

    def report(self) -> list[dict[str, Any]]:
        """One entry a projected matrix that has a basis, in the optimizer's order: ``name`` (where parameters came
        with names, else None), ``shape``, ``side``, ``rank``, ``captured`` (energy at the last refresh), ``refreshes``,
        ``state_bytes`` (everything that the state holds) and ``history``: ``(step, rank, captured)`` of every refresh,
        ``step`` counted before the update that used the basis."""
        rows = []
        for group in self.param_groups:
            names = group.get("param_names", [None] * len(group["params"]))
            for name, p in zip(names, group["params"], strict=True):
                state = self.state.get(p, {})
                if "history" not in state or not len(state["history"]):
                    continue
                history = [(int(t), int(r), float(e)) for t, r, e in state["history"].tolist()]
                shape = tuple(state["shape"].tolist())
                layer = self._layers.get(id(p))
                left = subspace.is_left(group["side"], shape) if layer is None else layer.projection.left
                rows.append(
                    {
                        "name": name,
                        "shape": shape,
                        "side": "left" if left else "right",
                        "rank": history[-1][1],
                        "captured": history[-1][2],
                        "refreshes": len(history),
                        "state_bytes": sum(t.nbytes for t in state.values()),
                        "history": history,
                    }
                )
        return rows

    # ----------------------------------------------------------------------------------------------------- state_dict

    def state_dict(self) -> dict[str, Any]:
        """As torch's, tensors and plain values only; ``skipped`` is kept in the first group."""
        saved = super().state_dict()
        saved["param_groups"][0]["skipped"] = self._skipped
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, except that every state tensor keeps the dtype it was saved in, and that the options which
        decide the state's shapes or meaning (rank, energy, projector, side, state, ...) must be this optimizer's own:
        ValueError names the first that differs. lr, betas, weight_decay and the like follow the checkpoint."""
        state_dict = {**state_dict, "param_groups": [dict(g) for g in state_dict["param_groups"]]}
        skipped = 0
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            skipped += saved.pop("skipped", 0)
            for name in STRUCTURE:
                if name in saved and saved[name] != own[name]:
                    bad(f"{OP}.load_state_dict", name, f"{own[name]!r}, this optimizer's", f"{saved[name]!r}")
        super().load_state_dict(state_dict)
        ids = [i for saved in state_dict["param_groups"] for i in saved["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    held = self.state[p][name]
                    on_host = value.device.type == "cpu" and (name in _HOST or value.dim() == 0 and name != "residual")
                    where = torch.device("cpu") if on_host else held.device
                    self.state[p][name] = value.detach().to(where, copy=True)
        self._skipped = skipped
        projected.synchronise(self)


_HOST = frozenset(("step", "since", "updates", "shape", "place", "seed", "history", "norm", "last", "gap", "similar"))
"""State that decides what to do next and stays on the CPU, where reading it costs nothing."""


def _all_finite(checks: list[Tensor]) -> bool:
    """One host read for every device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for check in checks:
        by_device.setdefault(check.device, []).append(check.float())
    return all(bool(torch.stack(values).isfinite().all()) for values in by_device.values())
