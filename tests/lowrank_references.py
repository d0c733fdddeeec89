"""Short, independent forms of the published methods: what the presets of ProjAdamW are compared with.

Each is a function ``(w, gradients, ...) -> w`` in float64 that follows its paper's formulas with full matrices, and
uses nothing of the package.
"""

from __future__ import annotations

import torch

BETA1, BETA2 = 0.9, 0.999


def svd_basis(g, rank):
    """``(basis, left)`` of the shorter side; the right one for a square matrix."""
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    return (u[:, :rank], True) if g.shape[0] < g.shape[1] else (vh[:rank].T, False)


class Adam:
    """Moments and the bias-corrected direction; ``hat`` adds eps before the correction of sqrt(V)."""

    def __init__(self, eps, hat):
        self.m = self.v = 0.0
        self.t = 0
        self.eps, self.hat = eps, hat

    def __call__(self, x):
        self.t += 1
        self.m = BETA1 * self.m + (1 - BETA1) * x
        self.v = BETA2 * self.v + (1 - BETA2) * x * x
        c1, c2 = 1 - BETA1**self.t, (1 - BETA2**self.t) ** 0.5
        root = self.v**0.5
        return self.m / c1 * c2 / (root + self.eps) if self.hat else self.m / c1 / (root / c2 + self.eps)


def limit(s, state, gamma=1.01):
    """Fira's norm-growth limiter; ``state`` holds the norm of before."""
    norm = s.norm()
    ratio = max(float(norm / (state[0] + 1e-8)), gamma) / gamma if state else 1.0
    state[:] = [norm / ratio]
    return s / ratio


def project(g, p, left):
    return p.T @ g if left else g @ p


def back(r, p, left):
    return p @ r if left else r @ p.T


def column_scale(n, r, left):
    return (n.norm(dim=0 if left else 1) / (r.norm(dim=0 if left else 1) + 1e-8)).unsqueeze(0 if left else 1)


def galore(w, gradients, *, lr, rank, gap, scale, eps=1e-6, fira=False, window=0, lam=1.0):
    adam, growth, seen = Adam(eps, True), [], []
    for t, g in enumerate(gradients):
        if t % gap == 0:
            p, left = svd_basis(g, rank)
        r = project(g, p, left)
        x = r
        if window:  # the dense inverse of lam I + H H^T
            seen = [*seen, r.flatten()][-window:]
            h = torch.stack(seen, 1)
            eye = torch.eye(h.shape[0], dtype=h.dtype)
            x = torch.linalg.solve(lam * eye + h @ h.T, r.flatten()).view(r.shape)
        n = adam(x)
        update = scale * back(n, p, left)
        if fira:
            update = update + limit((g - back(r, p, left)) * column_scale(n, r, left), growth)
        w = w - lr * update
    return w


def apollo(w, gradients, bases, *, lr, gap, scale, tensor, eps=1e-6):
    adam, growth = Adam(eps, True), []
    left = w.shape[0] < w.shape[1]
    for t, g in enumerate(gradients):
        p = bases[t // gap]
        r = project(g, p, left)
        n = adam(r)
        phi = n.norm() / (r.norm() + 1e-8) if tensor else column_scale(n, r, left)
        w = w - lr * scale * limit(g * phi, growth)
    return w


def frugal(w, gradients, chosen, *, lr, gap, eps=1e-8):
    left = w.shape[0] < w.shape[1]
    for t, g in enumerate(gradients):
        if t % gap == 0:
            adam, index = Adam(eps, False), chosen[t // gap]
        update = torch.sign(g)
        if left:
            update[index] = adam(g[index])
        else:
            update[:, index] = adam(g[:, index])
        w = w - lr * update
    return w


def weight_norm(w, gradients, *, lr, rank, gap, scale, eps=1e-6):
    length, v = w.norm(dim=1, keepdim=True), w
    adam, adam_length = Adam(eps, True), Adam(eps, True)
    for t, g in enumerate(gradients):
        unit = v / v.norm(dim=1, keepdim=True)
        dlength = (g * unit).sum(1, keepdim=True)
        dv = length / v.norm(dim=1, keepdim=True) * (g - dlength * unit)
        if t % gap == 0:
            p, left = svd_basis(dv, rank)
        new = v - lr * scale * back(adam(project(dv, p, left)), p, left)
        length = length - lr * adam_length(dlength)
        v = length * new / new.norm(dim=1, keepdim=True)
    return v


def adarankgrad(w, gradients, *, lr, energy, tol, gap, least, eps=1e-8):
    """Exact SVD instead of a randomized one; the number of each refresh and its rank come back too."""
    adam, log, p = Adam(eps, False), [], None
    left = w.shape[0] < w.shape[1]
    calm = since = 0
    for t, g in enumerate(gradients):
        if p is None or since >= gap or (calm and since >= least):
            u, s, vh = torch.linalg.svd(g, full_matrices=False)
            lost = (s**2).sum() - (s**2).cumsum(0)
            rank = next(k + 1 for k in range(len(s)) if lost[k] <= (1 - energy) * (s**2).sum())
            new = u[:, :rank] if left else vh[:rank].T
            if p is not None:
                c = new.T @ p
                adam.m = c @ adam.m if left else adam.m @ c.T
                adam.v = c**2 @ adam.v if left else adam.v @ (c**2).T
            p, since = new, 0
            at_refresh = project(g, p, left).norm()
            log.append((t, rank))
        r = project(g, p, left)
        calm = r.norm() < tol * at_refresh
        since += 1
        w = w - lr * back(adam(r), p, left)
    return w, log
