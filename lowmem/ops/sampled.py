"""The ``sampled`` family: weight gradients from some of the rows, columns or entries.

``dW = dY^T X`` (``dY [n, N]``, ``X [n, K]``) is a sum over ``n`` rows. *Rows*: ``k`` of them are chosen with known
probabilities and weighted by their inverse, so that the sum keeps its expectation while only ``k`` rows of ``X`` are
saved (WTA-CRS, arXiv 2305.15265; here by default with fixed-size systematic sampling, whose variance is lower).
*Columns* and *entries*: the parts of ``dW`` that partial-connection and sparse tuning train, exact, with no ``[N, K]``
temporary.

``sampled_norms``    ``|x_i|`` of every row
``sampled_choose``   ``k`` rows and their weights from importances ``p``, no value read on the host
``sampled_gather``   rows of a matrix, each times its weight, in one pass
``sampled_dw``       ``sum_j scale_j dY[rows_j]^T X[rows_j]``
``sampled_dw_coo``   single entries of ``dY^T X``

The graph is cut at the chosen rows: :func:`sampled_linear` saves ``X[rows]``, ``rows`` and ``scale``, ``k (iK + 12)``
bytes instead of ``i n K`` with ``i`` bytes an element, and layers over one input share them. ``y``, ``dx`` and the
bias's gradient are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dispatch import define
from .._errors import bad
from .philox import philox4x32

MODES = ("systematic", "wta", "crs", "topk")
"""How rows are chosen; :func:`lowmem.sampling.choose` says what each does."""

_DOMAIN = 1  # the third word of the counter: dropout's masks use 0
_CHUNK = 1 << 22  # elements of the products that single entries are summed from


# -------------------------------------------------------------------------------------------------------------- norms

NORMS = "(Tensor x) -> Tensor"


def norms_fake(x: Tensor) -> Tensor:
    """Shape of ``lowmem::sampled_norms``."""
    return x.new_empty(x.shape[0], dtype=torch.float64)


def norms_reference(x: Tensor) -> Tensor:
    """``|x_i|`` of the rows of ``x [n, K]``: float64 ``[n]``, squares summed in float64, so that nothing between 1e-150
    and 1e150 over- or underflows."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------- choose

CHOOSE = "(Tensor p, int k, str mode, Tensor seed) -> (Tensor, Tensor)"


def choose_fake(p: Tensor, k: int, mode: str, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of ``lowmem::sampled_choose``."""
    return p.new_empty(k, dtype=torch.int64), p.new_empty(k, dtype=torch.float32)


def uniforms(seed: Tensor, count: int) -> Tensor:
    """``count`` numbers in [0, 1), float64, 53 bits each, from words 0 and 1 of the Philox block at counter
    ``(i, 0, 1, 0)``."""
    i = torch.arange(count, device=seed.device)
    w0, w1, _, _ = philox4x32(seed, i, torch.zeros_like(i), _DOMAIN, 0)
    return ((w0 << 21) | (w1 >> 11)).double() * 2.0**-53


def relative(p: Tensor) -> Tensor:
    """Importances over the largest finite one, in float64: the scale of the gradient cancels. What is not finite counts
    as beyond all others (its rows are chosen, so that a NaN shows in the gradient), what is negative as zero."""
    p = p.double()
    finite = p.isfinite()
    top = torch.where(finite, p, 0.0).amax().clamp(min=0.0)
    return torch.where(finite, p.clamp(min=0.0) / torch.where(top > 0, top, 1.0), 2.0**100)


def water_level(s: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """For importances ``s [n]`` in descending order: ``S_t`` (what they sum to from place ``t`` on, from the least up)
    and ``k - t``, each ``[k]``, and the least ``t`` with ``(k - t) s_t <= S_t``, from which no inclusion is above 1."""
    suffix = s.flip(0).cumsum(0).flip(0)[:k]
    left = k - torch.arange(k, device=s.device)
    return suffix, left, (left * s[:k] <= suffix).int().argmax()


def choose_reference(p: Tensor, k: int, mode: str, seed: Tensor) -> tuple[Tensor, Tensor]:
    """``rows`` int64 ``[k]``, ascending, and ``scale`` fp32 ``[k]`` for importances ``p [n]``, ``1 <= k <= n``.

    With the rows in descending order of ``p``, the first ``t`` are taken for certain (scale 1), and ``k - t`` points
    are thrown into the rest, whose importances sum to ``S_t``; a row that is hit gets ``S_t / ((k - t) p_i)``, one over
    its expected number of hits. ``t`` is, for

    * systematic: the least with ``(k - t) p_t <= S_t``, so that ``min(1, c p_i)`` sums to ``k``; the points have equal
      distances and one random offset, hence no row is hit twice;
    * wta: where ``S_t / (k - t)`` is least; independent points;
    * crs: 0; independent points;
    * topk: ``k`` (biased: the rest counts as zero).

    Where fewer than ``k`` importances are positive, the others are filled in with scale 0.
    """
    s, order = torch.sort(relative(p), descending=True, stable=True)
    suffix, left, t = water_level(s, k)
    places = torch.arange(k, device=p.device)
    if mode == "topk":
        at, scale = places, torch.ones_like(suffix)
    else:
        if mode == "wta":
            t = (suffix / left).argmin()
        elif mode == "crs":
            t = torch.zeros((), dtype=torch.int64, device=p.device)
        mass, count = suffix[t], left[t]
        tail = torch.where(torch.arange(s.numel(), device=p.device) < t, 0.0, s).cumsum(0)
        if mode == "systematic":
            points = (uniforms(seed, 1) + (places - t).clamp(min=0)) * (mass / count)
        else:
            points = uniforms(seed, k) * mass
        hit = torch.searchsorted(tail, points, right=True)
        # rounding may put the last point behind the last row that has any importance
        last = (s > 0).sum() - 1
        at = torch.where((places < t) | (mass <= 0), places, torch.minimum(hit, last.clamp(min=0)))
        scale = torch.where(places < t, 1.0, mass / (count * s[at]))
    rows, ascending = order[at].sort()
    return rows, torch.where(s[at] > 0, scale, 0.0)[ascending].float()


# ------------------------------------------------------------------------------------------------------------- gather

GATHER = "(Tensor x, Tensor rows, Tensor? scale) -> Tensor"


def gather_fake(x: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
    """Shape of ``lowmem::sampled_gather``."""
    return x.new_empty(rows.shape[0], x.shape[1])


def gather_reference(x: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
    """``scale_j x[rows_j]``: ``[k, K]`` in ``x.dtype``. A row of scale 0 is exactly zero, whatever it holds."""
    taken = x.index_select(0, rows)
    if scale is None:
        return taken
    factor = scale.to(x.dtype if x.dtype == torch.float64 else torch.float32)[:, None]
    return torch.where(factor == 0, 0.0, taken * factor).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------------- dW

DW = "(Tensor dy, Tensor x, Tensor? rows, Tensor? scale) -> Tensor"


def dw_fake(dy: Tensor, x: Tensor, rows: Tensor | None, scale: Tensor | None) -> Tensor:
    """Shape of ``lowmem::sampled_dw``."""
    return dy.new_empty(dy.shape[1], x.shape[1])


def dw_reference(dy: Tensor, x: Tensor, rows: Tensor | None, scale: Tensor | None) -> Tensor:
    """``sum_j scale_j dy[rows_j]^T x[j]``: ``[N, K]`` in ``dy.dtype``, ``x [k, K]`` the chosen rows; ``rows`` None:
    all of them."""
    taken = dy if rows is None else gather_reference(dy, rows, scale)
    return taken.T @ x


DW_COO = "(Tensor dy, Tensor x, Tensor i, Tensor j) -> Tensor"


def dw_coo_fake(dy: Tensor, x: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Shape of ``lowmem::sampled_dw_coo``."""
    return dy.new_empty(i.shape[0])


def dw_coo_reference(dy: Tensor, x: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """``sum_m dy[m, i_e] x[m, j_e]``: ``[e]`` in ``dy.dtype``, summed in fp32 (fp64 for fp64). Holds the products of as
    many entries at a time as make 4 M."""
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    out = dy.new_empty(i.shape[0])
    step = max(1, _CHUNK // max(dy.shape[0], 1))
    for start in range(0, i.shape[0], step):
        part = slice(start, start + step)
        out[part] = (dy.index_select(1, i[part]).to(wide) * x.index_select(1, j[part]).to(wide)).sum(0)
    return out


define("sampled_norms", NORMS, fake=norms_fake, reference=norms_reference)
define("sampled_choose", CHOOSE, fake=choose_fake, reference=choose_reference)
define("sampled_gather", GATHER, fake=gather_fake, reference=gather_reference)
define("sampled_dw", DW, fake=dw_fake, reference=dw_reference)
define("sampled_dw_coo", DW_COO, fake=dw_coo_fake, reference=dw_coo_reference)


# ---------------------------------------------------------------------------------------------------- public functions


def _check_pair(op: str, dy: Tensor, x: Tensor) -> None:
    for name, value in (("dY", dy), ("X", x)):
        if value.dim() != 2 or not value.is_floating_point():
            bad(op, name, "a floating matrix [n, features]", f"shape {tuple(value.shape)} in {value.dtype}")
    if dy.dtype != x.dtype or dy.device != x.device:
        bad(op, "X", f"dY's dtype and device ({dy.dtype}, {dy.device})", f"{x.dtype}, {x.device}", kind=TypeError)
    if dy.shape[0] != x.shape[0]:
        bad(op, "X", f"as many rows as dY ({dy.shape[0]})", x.shape[0])


def _check_index(op: str, name: str, index: Tensor, like: Tensor, size: int) -> None:
    if index.dim() != 1 or index.dtype != torch.int64 or index.device != like.device:
        got = f"shape {tuple(index.shape)} in {index.dtype} on {index.device}"
        bad(op, name, f"int64 [k] on {like.device}", got, kind=TypeError)
    if index.device.type == "cpu" and index.numel() and not bool(((index >= 0) & (index < size)).all()):
        bad(op, name, f"indices in [0, {size})", f"{int(index.min())} to {int(index.max())}")


def sampled_dw(
    dY: Tensor,
    X: Tensor,
    *,
    rows: Tensor | None = None,
    row_scale: Tensor | None = None,
    cols: Tensor | None = None,
    coo: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Parts of ``dW = dY^T X`` for ``dY [n, N]``, ``X [n, K]``, with no larger temporary than the result.

    Args:
        rows: int64 ``[k]``: ``sum_j row_scale_j dY[rows_j]^T X[rows_j]``, ``[N, K]`` (WTA-CRS, arXiv 2305.15265); a row
            may stand in it several times.
        row_scale: ``[k]`` fp32, with ``rows``; None means 1.
        cols: int64 ``[c]``: ``dW[:, cols]``, ``[N, c]`` (partial connections, PaCA, arXiv 2503.01905).
        coo: int64 ``(i [e], j [e])``: the entries ``dW[i_e, j_e]``, ``[e]`` (sparse tuning).

    At most one of ``rows``, ``cols`` and ``coo``; none gives all of ``dW``. The result has ``dY``'s dtype, sums are
    made in fp32 (fp64 for fp64). No derivative of its own. Indices are checked on the CPU; on a GPU, where that would
    wait for the device, torch's own device-side check catches them.

    Raises ValueError or TypeError ``lowmem.sampled_dw: <argument>: expected ..., got ...``.
    """
    op = "sampled_dw"
    _check_pair(op, dY, X)
    given = [name for name, value in (("rows", rows), ("cols", cols), ("coo", coo)) if value is not None]
    if len(given) > 1:
        bad(op, given[1], f"nothing beside {given[0]}", "both")
    if row_scale is not None and (rows is None or row_scale.shape != rows.shape):
        bad(op, "row_scale", "one number for each of rows", f"shape {tuple(row_scale.shape)}")
    ops = torch.ops.lowmem
    with torch.no_grad():
        if rows is not None:
            _check_index(op, "rows", rows, X, X.shape[0])
            return ops.sampled_dw(dY, ops.sampled_gather(X, rows, None), rows, row_scale)
        if cols is not None:
            _check_index(op, "cols", cols, X, X.shape[1])
            return ops.sampled_dw(dY, X.index_select(1, cols), None, None)
        if coo is None:
            return ops.sampled_dw(dY, X, None, None)
        i, j = coo
        _check_index(op, "coo", i, X, dY.shape[1])
        _check_index(op, "coo", j, X, X.shape[1])
        if i.shape != j.shape:
            bad(op, "coo", "two lists of one length", f"{i.numel()} and {j.numel()}")
        return ops.sampled_dw_coo(dY, X, i, j)


class Pick(NamedTuple):
    """What a sampled backward keeps of an input: ``rows`` int64 ``[k]``, ``scale`` fp32 ``[k]``, ``x`` ``[k, K]``.
    Layers over one input share one."""

    rows: Tensor
    scale: Tensor
    x: Tensor


def check_pick(op: str, x: Tensor, pick: Pick) -> None:
    """Raise unless ``pick`` may be one of ``x [..., K]``."""
    if pick.x.dtype != x.dtype or pick.x.device != x.device:
        want = f"x's dtype and device ({x.dtype}, {x.device})"
        bad(op, "pick.x", want, f"{pick.x.dtype}, {pick.x.device}", kind=TypeError)
    if pick.x.shape != (pick.rows.shape[0], x.shape[-1]):
        bad(op, "pick.x", f"[{pick.rows.shape[0]}, {x.shape[-1]}]", tuple(pick.x.shape))


class _SampledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor,
        scale: Tensor,
        taken: Tensor,
        tell: Callable[[Tensor], None] | None,
    ) -> Tensor:
        kept = (rows, scale, taken) if ctx.needs_input_grad[1] else (None, None, None)
        ctx.save_for_backward(weight, *kept)
        ctx.tell = tell
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, rows, scale, taken = ctx.saved_tensors
        ops = torch.ops.lowmem
        dy = grad.reshape(-1, grad.shape[-1])
        dx = (dy @ weight).view(*grad.shape[:-1], weight.shape[1]) if ctx.needs_input_grad[0] else None
        dw = ops.sampled_dw(dy, taken, rows, scale) if ctx.needs_input_grad[1] else None
        db = dy.sum(0) if ctx.needs_input_grad[2] else None
        if ctx.tell is not None:
            ctx.tell(ops.sampled_norms(dy))
        return dx, dw, db, None, None, None, None


def sampled_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, pick: Pick, *, tell: Callable[[Tensor], None] | None = None
) -> Tensor:
    """``y = x W^T + bias``, exact, whose backward estimates ``dW`` from the rows of ``pick``; ``dx`` and the bias's
    gradient are exact.

    ``x [..., K]``, ``weight [N, K]``, ``pick`` from :func:`lowmem.sampling.pick` over the same ``x``; ``tell``, where
    given, is called in backward with the gradient's row norms (float64 ``[n]``). Saves for backward ``weight`` and
    ``pick`` alone.

    Raises ValueError or TypeError ``lowmem.sampled_linear: <argument>: expected ..., got ...``.
    """
    op = "sampled_linear"
    same = f"x's dtype and device ({x.dtype}, {x.device})"
    if not x.is_floating_point() or x.dim() < 1:
        bad(op, "x", "a floating tensor [..., K]", f"shape {tuple(x.shape)} in {x.dtype}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        bad(op, "weight", f"[N, {x.shape[-1]}]", tuple(weight.shape))
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and (value.dtype != x.dtype or value.device != x.device):
            bad(op, name, same, f"{value.dtype}, {value.device}", kind=TypeError)
    check_pick(op, x, pick)
    return _SampledLinear.apply(x, weight, bias, pick.rows, pick.scale, pick.x, tell)
