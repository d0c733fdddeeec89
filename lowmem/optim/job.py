"""One projected matrix in one step: its basis and moments in the optimizer's state, and what the step does with them.

``ProjAdamW`` makes a :class:`Job` for each matrix that has a gradient. A job needs R, and G only where the basis is
renewed or a residual wants it: projected mode hands over R alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..factor.lowrank import working_dtype
from ..ops.lowrank import row_blocks
from . import subspace
from .codec import find_codec, get, put

_OPS = torch.ops.lowmem


@dataclass
class Job:
    """``param`` is the key of the state, ``weight`` what is updated (the same, but in projected mode); ``dense`` is G
    and ``r`` is R, either of which may be missing; ``due``: the basis is renewed in this step."""

    param: Tensor
    weight: Tensor
    group: dict[str, Any]
    state: dict[str, Any]
    left: bool
    dense: Any = None
    r: Any = None
    due: bool = False
    lengths: Any = None
    rows: slice | None = None
    """The rows of the matrix that ``weight`` holds, where it is one process's shard; G and R are always whole."""

    @property
    def shape(self) -> tuple[int, int]:
        """The whole matrix's."""
        m, n = self.state["shape"].tolist()
        return m, n

    def fusable(self) -> bool:
        """Whether projection and Adam may be one operator: nothing looks at R between the two."""
        group = self.group
        plain = group["state"] == "fp32" and group["precond"] is None and group["reparam"] is None
        fixed = isinstance(group["refresh"], int) and group["residual"] == "none" and group["projector"] != "randk"
        return plain and fixed and group["nonfinite"] == "ignore" and self.r is None

    def basis(self) -> Tensor:
        """P in the weight's dtype, or the numbers of the chosen rows or columns."""
        stored = self.state["basis"]
        name = self.group["basis"]
        if name is None:
            return stored
        return find_codec("basis", name).decode(get(self.state, "basis"), signed=True, shape=stored.shape)

    def project(self) -> Tensor:
        """R from G in the present basis."""
        basis = self.basis()
        r = subspace.project(self.dense, basis, self.left)
        if self.group["reparam"] is not None:
            r = r - self._radial(basis)
        return r

    def draw(self) -> Tensor:
        """A seed of this matrix that was not used before, int64[1] on the CPU."""
        seed = self.state["seed"]
        seed.add_(1)
        return seed.clone()

    def generator(self) -> torch.Generator:
        """A generator on the weight's device under a fresh seed."""
        return torch.Generator(self.weight.device).manual_seed(int(self.draw()))

    def change_basis(self, basis: Tensor) -> None:
        """Install ``basis``: move the moments, set R, and note rank and captured energy."""
        group, state = self.group, self.state
        index = basis.dtype == torch.int64
        if not index:
            basis = basis.to(self.weight.device, self.weight.dtype).contiguous()
        old = self.basis() if "basis" in state else None
        if group["basis"] is not None:
            codes = find_codec("basis", group["basis"]).encode(basis, signed=True, generator=self.generator())
            put(state, "basis", codes)
            basis = self.basis()
        else:
            state["basis"] = basis
        self._move_moments(old, basis)
        self._note_similar(old, basis)
        self.r = self.project()
        dense = self.direction()
        total = float(subspace.norm(dense))
        held = float(subspace.norm(self.r))
        captured = 1.0 if total == 0.0 else min((held / total) ** 2, 1.0)
        row = torch.tensor([[float(state["step"]), float(subspace.rank_of(basis)), captured]], dtype=torch.float64)
        state["history"] = torch.cat((state["history"], row))
        state["since"] = torch.tensor(0.0)
        # 0 says that the gradient was zero and the basis is arbitrary: it is looked for again at the next step
        state["norm"] = torch.tensor(max(held, 1e-30) if total > 0 else 0.0)

    def _moment_shape(self, basis: Tensor) -> tuple[int, int]:
        m, n = self.shape
        return (subspace.rank_of(basis), n) if self.left else (m, subspace.rank_of(basis))

    def _move_moments(self, old: Tensor | None, basis: Tensor) -> None:
        group, state = self.group, self.state
        shape = self._moment_shape(basis)
        kind = working_dtype(self.weight.dtype)
        if old is None or group["moments"] == "reset":
            m = torch.zeros(shape, dtype=kind, device=self.weight.device)
            v = torch.zeros_like(m)
            state["updates"] = torch.tensor(0.0)  # Adam steps that the moments hold: what the bias corrections count
            if group["precond"] is not None:
                state["window"] = m.new_zeros(group["precond"]["s"], *shape)
        else:
            m, v = self._moments()
            if group["moments"] == "rotate":
                c = subspace.overlap(basis, old)
                m, v = subspace.rotate(m, v, c, self.left)
                if group["precond"] is not None:
                    state["window"] = torch.stack([c @ h if self.left else h @ c.T for h in state["window"]])
            else:
                m, v = (subspace.resized(t, subspace.rank_of(basis), self.left) for t in (m, v))
        self._store(m, v)

    def _note_similar(self, old: Tensor | None, basis: Tensor) -> None:
        rule, state = self.group["refresh"], self.state
        if not isinstance(rule, dict):
            return
        if "gap" not in state:
            state["gap"] = torch.tensor(float(rule["max_gap" if rule["rule"] == "OnConverged" else "gap"]))
            state["similar"] = torch.zeros(0)
        if rule["rule"] == "OnSimilar" and old is not None and basis.shape[-1] and old.shape[-1]:
            a, b = basis[:, 0].float(), old[:, 0].float()
            cosine = torch.nn.functional.cosine_similarity(a, b, dim=0).abs().cpu()
            state["similar"] = torch.cat((state["similar"], cosine.view(1)))[-rule["window"] :]
            full = len(state["similar"]) == rule["window"]
            if full and float(state["similar"].mean()) >= rule["threshold"]:
                state["gap"] = (state["gap"] * rule["growth"]).floor()

    def _moments(self) -> tuple[Tensor, Tensor]:
        codec, state = find_codec("state", self.group["state"]), self.state
        shape, kind = state["exp_avg"].shape, working_dtype(self.weight.dtype)
        m = codec.decode(get(state, "exp_avg"), signed=True, shape=shape)
        return m.to(kind), codec.decode(get(state, "exp_avg_sq"), signed=False, shape=shape).to(kind)

    def _store(self, m: Tensor, v: Tensor) -> None:
        codec = find_codec("state", self.group["state"])
        generator = None if self.group["state"] == "fp32" else self.generator()  # fp32 draws nothing
        put(self.state, "exp_avg", codec.encode(m, signed=True, generator=generator))
        put(self.state, "exp_avg_sq", codec.encode(v, signed=False, generator=generator))

    # ------------------------------------------------------------------------------------------------ the update

    def advance(self) -> None:
        """One Adam step in the subspace and the update of W. The basis is there, and the gradient finite."""
        group, state, w = self.group, self.state, self.weight
        beta1, beta2 = group["betas"]
        lr = float(group["lr"])
        basis = self.basis()
        state["step"] += 1
        state["since"] += 1
        state["updates"] += 1
        t = float(state["updates"])
        bias1, bias2 = 1 - beta1**t, 1 - beta2**t
        eps = group["eps"] / bias2**0.5 if group["eps_hat"] else group["eps"]
        m, v = self._moments()
        if self.r is None:  # nothing looks at R
            n = _OPS.lowrank_project_adam_(m, v, self.dense, basis, self.left, beta1, beta2, bias1, bias2, eps)
            state["last"] = state["norm"]
        else:
            if isinstance(group["refresh"], dict) and group["refresh"]["rule"] == "OnConverged":
                state["last"] = subspace.norm(self.r).cpu()
            r = self.r if group["precond"] is None else self._natural(self.r)
            n = _OPS.lowrank_adam_(m, v, r, beta1, beta2, bias1, bias2, eps)
        if group["state"] != "fp32":
            self._store(m, v)
        seed = None
        if group["rounding"] == "stochastic" and w.dtype == torch.bfloat16:
            seed = torch.full((1,), int(self.draw()), dtype=torch.int64, device=w.device)
        decay = 1.0 - lr * group["weight_decay"]
        if group["reparam"] is not None:
            self._update_normalised(basis, n, lr, decay, (bias1, bias2, eps), seed)
        else:
            self._update(basis, n, lr, decay, seed)

    def _update(self, basis: Tensor, n: Tensor, lr: float, decay: float, seed: Tensor | None) -> None:
        group, w, g, left = self.group, self.weight, self.dense, self.left
        alpha, beta, kind = lr * group["scale"], lr * group["residual_scale"], group["residual"]
        index = basis.dtype == torch.int64
        if self.rows is not None:
            basis, n, seed = self._shard(basis, n, seed)
        if kind == "none":
            if index:
                subspace.update_coordinates(w, basis, n, None, None, left, alpha, 0.0, decay, seed)
            else:
                _OPS.lowrank_update_(w, basis, n, left, alpha, decay, seed)
            return
        if kind == "sign":
            if index:
                subspace.update_coordinates(w, basis, n, g, None, left, alpha, beta, decay, seed)
            else:
                _OPS.lowrank_update_sign_(w, g, basis, n, self.r, left, alpha, beta, decay, seed)
            return
        phi = self._factor(n)
        if kind == "apollo":
            f = phi * self._limited(phi * subspace.long_norms(g, left)) * alpha
            _OPS.lowrank_update_scaled_(w, g, basis[:, :0], n[:0] if left else n[:, :0], f, left, 0.0, decay, seed)
            return
        rest = subspace.long_norms(g, left) ** 2 - subspace.long_norms(self.r, left) ** 2
        f = phi * self._limited(phi * rest.clamp_min(0).sqrt()) * beta
        if index:
            subspace.update_coordinates(w, basis, n, g, f, left, alpha, beta, decay, seed)
            return
        # alpha P N + f (G - P R) = P (alpha N - f R) + f G: the rest of the gradient is never formed
        inner = n.to(f.dtype) * alpha - self.r.to(f.dtype) * (f.view(1, -1) if left else f.view(-1, 1))
        _OPS.lowrank_update_scaled_(w, g, basis, inner, f, left, 1.0, decay, seed)

    def _shard(self, basis: Tensor, n: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """What moves this process's rows; a stream of its own for their rounding."""
        assert self.rows is not None
        seed = None if seed is None else seed + (self.rows.start << 20)
        if not self.left:
            return basis, n[self.rows], seed
        if basis.dtype != torch.int64:
            return basis[self.rows], n, seed
        here = (basis >= self.rows.start) & (basis < self.rows.stop)
        return basis[here] - self.rows.start, n[here], seed

    def _factor(self, n: Tensor) -> Tensor:
        """phi [long] = |N_j| / (|R_j| + 1e-8), or the one ratio of the whole for all."""
        top, bottom = subspace.long_norms(n, self.left), subspace.long_norms(self.r, self.left)
        if self.group["granularity"] == "tensor":
            top, bottom = (torch.linalg.vector_norm(t).expand_as(t) for t in (top, bottom))
        return top / (bottom + 1e-8)

    def _limited(self, norms: Tensor) -> Tensor:
        """The norm-growth limiter's factor for a residual with these column norms; the norm kept is updated. A norm of
        zero limits nothing: the next step may be of any size."""
        limiter, state = self.group["limiter"], self.state
        if limiter is None:
            return norms.new_ones(())
        norm = torch.linalg.vector_norm(norms)
        before = state.get("residual")
        if before is None:
            state["residual"] = norm
            return norms.new_ones(())
        growth = (norm / (before + 1e-8)).clamp_min(limiter) / limiter
        factor = torch.where(before > 0, 1 / growth, 1.0)
        before.copy_(norm * factor)
        return factor

    # --------------------------------------------------------------------------- preconditioner, weight normalisation

    def _natural(self, r: Tensor) -> Tensor:
        """``(lam I + H H^T)^-1 r`` over the window's gradients as columns of H, by Woodbury: an s x s solve."""
        rule, window = self.group["precond"], self.state["window"]
        window[(int(self.state["updates"]) - 1) % rule["s"]] = r
        flat, x = window.flatten(1), r.to(window.dtype).flatten()
        inner = flat @ flat.T
        inner.diagonal().add_(rule["lam"])
        x = (x - flat.T @ torch.linalg.solve(inner, flat @ x)) / rule["lam"]
        return x.view(r.shape).to(r.dtype)

    def _lengths(self) -> tuple[Tensor, Tensor]:
        """``(|W_i|^2, <G_i, W_i>)`` of the rows, without an m x n temporary; once a step."""
        if self.lengths is not None:
            return self.lengths
        w, g = self.weight, self.dense
        kind = working_dtype(w.dtype)
        square, inner = (torch.empty(w.shape[0], dtype=kind, device=w.device) for _ in range(2))
        for _, rows in row_blocks(w):
            wide = w[rows].to(kind)
            square[rows] = torch.linalg.vecdot(wide, wide)
            inner[rows] = torch.linalg.vecdot(wide, g[rows].to(kind))
        self.lengths = square, inner
        return self.lengths

    def _along(self) -> Tensor:
        """``<G_i, W_i> / |W_i|^2``: how much of W's row i the gradient's row holds; 0 for a zero row."""
        square, inner = self._lengths()
        return torch.where(square > 0, inner / torch.where(square > 0, square, 1.0), 0.0)

    def _radial(self, basis: Tensor) -> Tensor:
        """The projection of the part of G along each row of W: what V's gradient has not."""
        w, along = self.weight, self._along()
        if self.left and basis.dtype != torch.int64:
            return subspace.project(w, (basis.to(along.dtype) * along[:, None]).to(basis.dtype), True)
        part = subspace.project(w, basis, self.left)
        return (part * (along[basis] if self.left else along)[:, None]).to(w.dtype)

    def direction(self) -> Tensor:
        """The matrix that the basis is found for: G, or the gradient of V under weight normalisation."""
        if self.group["reparam"] is None:
            return self.dense
        return (self.dense - self._along()[:, None] * self.weight).to(self.weight.dtype)

    def _update_normalised(
        self, basis: Tensor, n: Tensor, lr: float, decay: float, adam: tuple[float, float, float],
        seed: Tensor | None,
    ) -> None:  # fmt: skip
        group, state, w = self.group, self.state, self.weight  # no residual: policy.check_group
        square, inner = self._lengths()
        if "length" not in state:
            state["length"] = square.sqrt()  # fp32: a 16-bit weight does not remember it
            state["length_avg"], state["length_avg_sq"] = torch.zeros_like(square), torch.zeros_like(square)
        length = state["length"]
        grad = torch.where(square > 0, inner / torch.where(square > 0, square, 1.0).sqrt(), 0.0)
        step = _OPS.lowrank_adam_(state["length_avg"], state["length_avg_sq"], grad, *group["betas"], *adam)
        length.mul_(decay).sub_(step, alpha=lr)
        self._update(basis, n, lr, 1.0, seed)
        new = torch.linalg.vector_norm(w, dim=1, dtype=working_dtype(w.dtype))
        w.mul_(torch.where(new > 0, length / torch.where(new > 0, new, 1.0), 1.0).to(w.dtype)[:, None])
