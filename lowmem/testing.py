"""What this package's tests are built from, and what a new kernel's tests should use: the error rule, awkward layouts,
poisoned memory, huge offsets and the count of bytes saved for backward.

The error rule. ``exact`` is the reference run in float64 on the same inputs, ``lowprec`` the same reference run by
torch in the dtype under test. A kernel passes where::

    max|actual - exact|  <=  2 * max|lowprec - exact| + tiny

``tiny`` covers the draws in which torch's own error happens to vanish (one element, a sum of one term) and is derived,
never chosen by hand::

    tiny = max(eps(dtype) * |exact|, eps(rounded_to) * |rounded_1|, ...)  +  eps(accumulator) * max(terms)

The first term is one rounding of the result to ``dtype``, or of an intermediate value that the operator is documented
to round on its way (``rounded``, in the result's units; ``rounded_to`` is the dtype they are rounded to, the result's
own unless given). The second is one rounding per unit of ``terms``, the same formula evaluated on the inputs' absolute
values, which bounds every partial sum in any order of summation; it is what separates a legitimate reordering from an
error where terms cancel. The accumulator is fp32 for 16-bit floats and the dtype itself otherwise. In float64 the
reference is no more exact than what it judges, so torch's error cannot be measured: ``tiny`` stands for it, and the
bound is ``3 * tiny``.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "COLUMNS",
    "DTYPES",
    "LAYOUTS",
    "RANKS",
    "ROWS",
    "Saved",
    "assert_close_to_reference",
    "error_bound",
    "huge_view",
    "max_error",
    "poison_empties",
    "reference_pair",
    "saved_bytes",
    "saved_for_backward",
    "terms_of",
    "tiny",
    "to64",
]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Every floating dtype that an operator serves."""

ROWS = (0, 1, 2, 7, 33, 65)
"""Row counts: empty, one, and odd numbers on both sides of a tile."""

COLUMNS = (1, 3, 31, 32, 33, 100, 257)
"""Reduction and output widths: one, below, at and above a mask word, and multiples of nothing."""

RANKS = (1, 2, 7, 16, 33, 64, 130)
"""Adapter ranks: one, not powers of two, below and above 16, beyond a tile of 64 or 128."""


# ------------------------------------------------------------------------------------------------------ the error rule


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(_map(v, change) for v in value)
    return value


def to64(*values: Any) -> Any:
    """The same values, every floating tensor (also inside tuples and lists) as float64; one value comes back alone."""
    out = tuple(_map(v, lambda t: t.detach().double() if t.is_floating_point() else t) for v in values)
    return out[0] if len(out) == 1 else out


def reference_pair(fn: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """``(exact, lowprec)``: the reference ``fn`` over ``args`` in float64 and in the dtypes given."""
    wide = to64(args)
    with torch.no_grad():
        return fn(*wide), fn(*args)


def terms_of(fn: Callable[..., Any], *args: Any) -> Any:
    """``fn`` in float64 over absolute values: for a sum of products, a bound on every partial sum in any order."""

    def absolute(value: Any) -> Any:
        if isinstance(value, float):
            return abs(value)
        return _map(value, lambda t: t.detach().double().abs() if t.is_floating_point() else t)

    with torch.no_grad():
        return fn(*(absolute(a) for a in args))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _largest(value: Tensor | None) -> float:
    if value is None or value.numel() == 0:
        return 0.0
    finite = value.detach().double().abs()
    finite = finite[finite.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


def tiny(
    exact: Tensor,
    dtype: torch.dtype,
    *,
    terms: Tensor | None = None,
    rounded: Iterable[Tensor] = (),
    rounded_to: torch.dtype | None = None,
) -> float:
    """The rule's second summand (see the module's head) for a result in ``dtype``; also one subnormal step of it."""
    info = torch.finfo(dtype)
    middle = torch.finfo(rounded_to or dtype).eps
    size = max([info.eps * _largest(exact), *(middle * _largest(value) for value in rounded)])
    partial = _largest(exact if terms is None else terms)
    return size + torch.finfo(_accumulator(dtype)).eps * partial + info.smallest_normal * info.eps


def max_error(actual: Tensor, exact: Tensor) -> float:
    """``max|actual - exact|`` over the places where both are finite; 0 for empty tensors, inf where only one is finite
    or the two differ in which infinity or NaN they hold."""
    a, e = actual.detach().double().cpu(), exact.detach().double().cpu()
    same = (a == e) | (a.isnan() & e.isnan())
    diff = torch.where(same, 0.0, (a - e).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    return float(diff.max()) if diff.numel() else 0.0


def error_bound(
    exact: Tensor,
    lowprec: Tensor,
    *,
    terms: Tensor | None = None,
    rounded: Iterable[Tensor] = (),
    rounded_to: torch.dtype | None = None,
) -> float:
    """``2 * max|lowprec - exact| + tiny``, in float64 at least ``3 * tiny``. Raises ValueError where torch's own
    low-precision result is not finite but the exact one is: such inputs would let anything pass."""
    torch_error = max_error(lowprec, exact)
    if not math.isfinite(torch_error):
        raise ValueError(
            f"lowmem.error_bound: lowprec: expected finite values where exact is finite, got others (torch overflows "
            f"in {lowprec.dtype} on these inputs, which therefore cannot judge a kernel)"
        )
    least = tiny(exact, lowprec.dtype, terms=terms, rounded=rounded, rounded_to=rounded_to)
    return 2.0 * (max(torch_error, least) if lowprec.dtype == torch.float64 else torch_error) + least


def assert_close_to_reference(
    actual: Tensor,
    exact: Tensor,
    lowprec: Tensor,
    *,
    terms: Tensor | None = None,
    rounded: Iterable[Tensor] = (),
    rounded_to: torch.dtype | None = None,
    what: str = "result",
) -> None:
    """AssertionError unless ``actual`` has ``lowprec``'s shape and dtype, the exact result's infinities and NaNs in the
    same places, and an error within :func:`error_bound`. The message gives both errors and the worst element."""
    if actual.shape != lowprec.shape or actual.dtype != lowprec.dtype or actual.shape != exact.shape:
        raise AssertionError(
            f"{what}: expected shape {tuple(lowprec.shape)} in {lowprec.dtype}, "
            f"got {tuple(actual.shape)} in {actual.dtype}"
        )
    bound = error_bound(exact, lowprec, terms=terms, rounded=rounded, rounded_to=rounded_to)
    error = max_error(actual, exact)
    if error <= bound:
        return
    a, e = actual.detach().double().cpu(), exact.detach().double().cpu()
    same = (a == e) | (a.isnan() & e.isnan())
    diff = torch.where(same, 0.0, (a - e).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    flat = int(diff.flatten().argmax())
    raise AssertionError(
        f"{what}: error {error:.4g} exceeds the bound {bound:.4g} (torch's own error in {lowprec.dtype}: "
        f"{max_error(lowprec, exact):.4g}); {int((diff > bound).sum())} of {diff.numel()} elements, worst at flat "
        f"index {flat} of shape {tuple(a.shape)}: got {float(a.flatten()[flat]):.9g}, "
        f"exact {float(e.flatten()[flat]):.9g}"
    )


# ------------------------------------------------------------------------------------------------------------- layouts


def _wide(t: Tensor, before: int, after: int) -> Tensor:
    wide = torch.full((*t.shape[:-1], t.shape[-1] + before + after), math.nan, dtype=t.dtype, device=t.device)
    wide[..., before : before + t.shape[-1]] = t
    return wide[..., before : before + t.shape[-1]]


def _strided(t: Tensor) -> Tensor:
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), math.nan, dtype=t.dtype, device=t.device)
    wide[..., ::2] = t
    return wide[..., ::2]


def _unaligned(t: Tensor) -> Tensor:
    flat = torch.full((t.numel() + 1,), math.nan, dtype=t.dtype, device=t.device)
    flat[1:] = t.reshape(-1)
    return flat[1:].view(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.t().contiguous().t(),
    "padded": lambda t: _wide(t, 3, 5),
    "strided": _strided,
    "unaligned": _unaligned,
    "expanded": lambda t: t[:1].expand_as(t),
}
"""Ways for a 2-D float tensor to lie in memory. Each returns equal values ("expanded": row 0 repeated by stride 0),
with NaN in the gaps: a kernel that reads beside its view shows it."""


def huge_view(
    rows: int, cols: int, dtype: torch.dtype, device: str | torch.device = "cpu", *, span: int = 2**31
) -> Tensor:
    """Zeros ``[rows, cols]`` whose last row starts at least ``span`` elements behind the first (``rows >= 2``): offsets
    that a 32-bit integer cannot hold. On the CPU the memory between the rows is reserved address space that is never
    touched, so only the rows cost anything; a GPU allocates it."""
    if rows < 2 or cols < 1:
        raise ValueError(f"lowmem.huge_view: rows, cols: expected rows >= 2 and cols >= 1, got {rows} and {cols}")
    stride = max(-(-span // (rows - 1)), cols)
    count = (rows - 1) * stride + cols
    if torch.device(device).type == "cpu":
        size = count * dtype.itemsize
        flags = 0
        for name in ("MAP_PRIVATE", "MAP_ANONYMOUS", "MAP_NORESERVE"):  # absent on Windows
            flags |= getattr(mmap, name, 0)
        flat = torch.frombuffer(mmap.mmap(-1, size, flags=flags) if flags else mmap.mmap(-1, size), dtype=dtype)
        return flat.as_strided((rows, cols), (stride, 1))
    view = torch.empty_strided((count,), (1,), dtype=dtype, device=device).as_strided((rows, cols), (stride, 1))
    return view.zero_()


@contextlib.contextmanager
def poison_empties() -> Iterator[None]:
    """Inside, every uninitialised tensor (``torch.empty``, ``new_empty``, outputs that C++ kernels allocate) holds NaN,
    or the largest value of an integer dtype: an element that a kernel forgets to write shows.

    It is torch's own switch for that (``torch.utils.deterministic.fill_uninitialized_memory``), which acts below
    Python; it comes with deterministic algorithms, here in their warn-only form. The former settings
    return at the end."""
    enabled, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        memory.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(enabled, warn_only=warn)


# -------------------------------------------------------------------------------------------- bytes saved for backward


@dataclass(frozen=True)
class Saved:
    """One storage that autograd keeps for backward: shape and dtype under which it was first saved, and its size."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int


def _tensors(items: Any) -> Iterator[Tensor]:
    if isinstance(items, Tensor):
        yield items
    elif isinstance(items, torch.nn.Module):
        yield from items.parameters()
        yield from items.buffers()
    else:
        for item in items:
            yield from _tensors(item)


def saved_for_backward(fn: Callable[[], Any], *, exclude: Any = ()) -> list[Saved]:
    """What autograd saves for backward while ``fn()`` runs, one entry per storage, in the order of saving.

    Two views of one storage count once, at the whole storage's size, because that is what stays allocated. Parameters
    (``nn.Parameter``, trainable or frozen, and views of them) do not count, nor does what shares a storage with
    ``exclude``: a tensor, a module (its parameters and buffers) or an iterable of these. The graph is dropped."""
    left_out = {t.untyped_storage()._cdata for t in _tensors(exclude)}
    kept: dict[int, tuple[Tensor, Saved]] = {}  # the tensors stay alive until the end, so no storage is reused

    def pack(t: Tensor) -> Tensor:
        if isinstance(t, torch.nn.Parameter) or isinstance(t._base, torch.nn.Parameter):
            return t
        storage = t.untyped_storage()
        if storage._cdata not in left_out and storage._cdata not in kept:
            kept[storage._cdata] = (t.detach(), Saved(tuple(t.shape), t.dtype, storage.nbytes()))
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = fn()
    del result
    return [saved for _, saved in kept.values()]


def saved_bytes(fn: Callable[[], Any], *, exclude: Any = ()) -> int:
    """Bytes saved for backward while ``fn()`` runs: the sum over :func:`saved_for_backward`."""
    return sum(saved.bytes for saved in saved_for_backward(fn, exclude=exclude))
