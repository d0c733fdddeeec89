"""Cases of the lora family: inputs for each operator, its reference, and the check that every backend goes through."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from lowmem.ops import lora
from lowmem.ops.philox import inv_keep, keep_mask, pack_bits
from lowmem.testing import LAYOUTS, assert_close_to_reference, poison_empties, reference_pair, terms_of, to64

SEED = 0x0123456789ABCDEF
OPERATORS = ("lora_shrink", "lora_expand", "lora_dy", "lora_masked_expand_", "lora_dx", "lora_da")

# dtype of x and the base, dtype of the adapters
PRECISIONS = {
    "fp64": (torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16+fp32": (torch.bfloat16, torch.float32),
    "fp16+fp32": (torch.float16, torch.float32),
}


@dataclass(frozen=True)
class Case:
    """One point of the tests' grid. ``layout`` names how every activation lies in memory, ``adapters`` A, B and W."""

    m: int = 7
    k: int = 100
    n: int = 33
    r: int = 5
    precision: str = "fp32"
    p: float = 0.1
    bits: bool = True  # backward reads packed bits, or draws them again from the seed
    base: bool = True
    bias: bool = True
    accumulate: bool = True
    gate: bool = False  # a factor for each rank, of the whole linear
    layout: str = "contiguous"
    adapters: str = "contiguous"
    device: str = "cpu"
    scale: float = 1.7
    child: int = 3
    draw: int = 0

    def but(self, **changes: Any) -> Case:
        """The same case with some fields changed."""
        return replace(self, **changes)


def tensors(case: Case) -> dict[str, Any]:
    """Inputs of ``case``: x, w, a, b, bias, dy, s, ds, out, seed, mask (or None), values of order one."""
    dtype, adapter = PRECISIONS[case.precision]
    g = torch.Generator().manual_seed(case.draw + 1)

    def rand(rows: int, cols: int, size: float, to: torch.dtype, layout: str) -> torch.Tensor:
        made = (torch.randn(rows, cols, generator=g, dtype=torch.float64) * size).to(to)
        return LAYOUTS[layout](made.to(case.device))

    m, k, n, r = case.m, case.k, case.n, case.r
    t: dict[str, Any] = {
        "x": rand(m, k, 1.0, dtype, case.layout),
        "w": rand(n, k, k**-0.5, dtype, case.adapters),
        "a": rand(r, k, k**-0.5, adapter, case.adapters),
        "b": rand(n, r, 1.0, adapter, case.adapters),
        "bias": rand(1, n, 1.0, dtype, "contiguous")[0] if case.bias else None,
        "dy": rand(m, n, n**-0.5, dtype, case.layout),
        "s": rand(m, r, 1.0, dtype, case.layout),
        "ds": rand(m, r, r**-0.5, dtype, case.layout),
        "out": rand(m, k, 1.0, dtype, "contiguous" if case.layout == "expanded" else case.layout),
        "seed": torch.tensor([SEED], device=case.device),
    }
    if not case.base:
        t["w"] = None
    t["gate"] = rand(1, r, 1.0, adapter, "contiguous")[0] if case.gate else None
    t["keep"] = keep_mask(m, k, case.p, t["seed"], case.child)
    t["mask"] = pack_bits(t["keep"]) if case.bits and case.p > 0 else None
    return t


def arguments(name: str, case: Case) -> tuple[Any, ...]:
    """The operator's arguments, in its schema's order."""
    t = tensors(case)
    # an operator that is given bits must not need the seed, nor one without dropout
    seed = t["seed"] if case.p > 0 and t["mask"] is None else None
    drop = (t["mask"], case.p, seed, case.child)
    if name == "lora_shrink":
        return t["x"], t["a"], case.scale, case.p, t["seed"] if case.p > 0 else None, case.child, case.bits
    if name == "lora_expand":
        return t["x"], t["w"], t["s"], t["b"], t["bias"]
    if name == "lora_dy":
        return t["dy"], t["b"], t["s"], case.scale
    if name == "lora_masked_expand_":
        return t["out"], t["ds"], t["a"], *drop, case.accumulate
    if name == "lora_dx":
        return t["dy"], t["w"], t["ds"], t["a"], *drop
    assert name == "lora_da"
    return t["ds"], t["x"], *drop


def copy_in_place(t: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, offset and gaps."""
    flat = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage().clone())
    return flat.as_strided(t.size(), t.stride(), t.storage_offset())


def functional(name: str, implementation: Any) -> Any:
    """``implementation`` as a function that returns a tuple of results: a mutating operator gets a copy to write on."""

    def call(*args: Any) -> tuple[torch.Tensor, ...]:
        if name == "lora_masked_expand_":
            out = copy_in_place(args[0])
            implementation(out, *args[1:])
            return (out,)
        result = implementation(*args)
        return result if isinstance(result, tuple) else (result,)

    return call


def served(name: str) -> Any:
    """The operator as the dispatcher serves it."""
    return functional(name, getattr(torch.ops.lowmem, name))


def reference(name: str) -> Any:
    """The operator's reference in plain torch."""
    return functional(name, getattr(lora, name.removeprefix("lora_").removesuffix("_") + "_reference"))


def _rounded(name: str, args: tuple[Any, ...]) -> list[torch.Tensor]:
    # expand and dx over a library's GEMM round the base product before the rank-r term is added onto it
    if name == "lora_expand" and args[1] is not None:
        base = args[0].double() @ args[1].double().T
        return [base if args[4] is None else base + args[4].double()]
    if name == "lora_dx" and args[1] is not None:
        return [args[0].double() @ args[1].double()]
    return []


def check(
    name: str, args: tuple[Any, ...], *, implementation: Any = None, what: str = "", threads: int = 1
) -> tuple[torch.Tensor, ...]:
    """Run ``implementation`` (the served operator by default) on ``args`` and compare every output with the reference:
    integers exactly, floats by the error rule. Returns the outputs."""
    run = served(name) if implementation is None else functional(name, implementation)
    torch.set_num_threads(threads)
    try:
        actual = run(*args)
    finally:
        torch.set_num_threads(1)
    exact, low = reference_pair(reference(name), *args)
    terms = terms_of(reference(name), *args)
    assert len(actual) == len(exact), f"{name}: {len(actual)} results, expected {len(exact)}"
    for i, (got, wide, torch_low, sums) in enumerate(zip(actual, exact, low, terms, strict=True)):
        label = f"{name}[{i}] {what}"
        if got.is_floating_point():
            assert_close_to_reference(got, wide, torch_low, terms=sums, rounded=_rounded(name, args), what=label)
        else:
            assert got.dtype == torch_low.dtype and torch.equal(got, torch_low), f"{label}: integers differ"
    return actual


def check_case(name: str, case: Case, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """:func:`check` on the arguments of ``case``."""
    return check(name, arguments(name, case), what=str(case), **kwargs)


def check_repeats(name: str, args: tuple[Any, ...], *, implementation: Any = None, runs: int = 4) -> None:
    """Every run on two threads gives the same bits."""
    run = served(name) if implementation is None else functional(name, implementation)
    torch.set_num_threads(2)
    try:
        first, *others = (run(*args) for _ in range(runs))
    finally:
        torch.set_num_threads(1)
    for other in others:
        for i, (one, two) in enumerate(zip(first, other, strict=True)):
            assert torch.equal(one, two), f"{name}[{i}]: two runs differ in {int((one != two).sum())} elements"


def check_writes_inside(args: tuple[Any, ...], *, implementation: Any = None) -> None:
    """lora_masked_expand_ on ``args`` changes its view and nothing of the storage round it."""
    run = torch.ops.lowmem.lora_masked_expand_ if implementation is None else implementation
    out = copy_in_place(args[0])
    inside = torch.zeros(out.untyped_storage().nbytes() // out.element_size(), dtype=torch.bool, device=out.device)
    inside.as_strided(out.size(), out.stride(), out.storage_offset()).fill_(True)
    memory = out.as_strided(inside.shape, (1,), 0)
    before = memory.clone()
    run(out, *args[1:])
    same = (memory == before) | (memory.isnan() & before.isnan())
    assert same[~inside].all(), "written outside the view"
    assert not same[inside].all(), "nothing written"


# -------------------------------------------------------------------------------------------------- the whole linear


def composed(x, base, a, b, scale, *, bias=None, gate=None, p=0.0, seed=None, child=0):
    """lora_linear in plain differentiable torch, same mask; adapters are rounded to x's dtype, as documented."""
    rows = x.reshape(-1, x.shape[-1])
    dropped = rows
    if p > 0:
        keep = keep_mask(*rows.shape, p, seed, child)
        dropped = torch.where(keep, rows, 0) * inv_keep(p)
    s = dropped @ a.to(x.dtype).T * scale
    if gate is not None:
        s = s * gate.to(x.dtype)
    y = s @ b.to(x.dtype).T
    if base is not None:
        y = y + F.linear(rows, base)
    if bias is not None:
        y = y + bias
    return y.view(*x.shape[:-1], b.shape[0])


def linear_inputs(case: Case, lead: tuple[int, ...] | None = None) -> dict[str, Any]:
    """Keyword arguments of lora_linear / composed for ``case``; ``lead`` replaces the leading shape ``(m,)``."""
    t = tensors(case)
    x = t["x"] if lead is None else t["x"].view(*lead, case.k)
    kwargs = {"bias": t["bias"], "gate": t["gate"], "p": case.p, "seed": t["seed"], "child": case.child}
    return {"x": x, "base": t["w"], "a": t["a"], "b": t["b"], "scale": case.scale, **kwargs}


def run_linear(
    fn: Any, inputs: dict[str, Any], *, trainable: tuple[str, ...] = ("x", "a", "b"), **more: Any
) -> dict[str, Any]:
    """``y`` and the gradients of ``trainable`` under an upstream gradient fixed by the output's shape."""
    kwargs = dict(inputs)
    for key in trainable:
        if kwargs[key] is not None:
            kwargs[key] = kwargs[key].detach().requires_grad_()
    leaves = {key: kwargs[key] for key in trainable if kwargs[key] is not None}
    x, base, a, b, scale = (kwargs.pop(key) for key in ("x", "base", "a", "b", "scale"))
    y = fn(x, base, a, b, scale, **kwargs, **more)
    y.backward(upstream_like(y))  # not autograd.grad: reentrant checkpointing refuses that
    return {"y": y.detach(), **{key: leaf.grad for key, leaf in leaves.items()}}


def upstream_like(y: torch.Tensor) -> torch.Tensor:
    """The gradient that run_linear sends: fixed by the shape, and exact in every dtype."""
    g = torch.Generator().manual_seed(77)
    return torch.randn(y.shape, generator=g, dtype=torch.float64).to(torch.bfloat16).to(y.device, y.dtype)


def bounds(inputs: dict[str, Any]) -> dict[str, tuple[torch.Tensor, list[torch.Tensor]]]:
    """For y and each gradient of the linear, in float64: ``terms`` (bounds on partial sums) and ``rounded``, the shares
    of what the family rounds on its way: S, dS, and the base product where the rank-r term is added onto it."""
    i = {
        k: v.detach().double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    x, a, b, w, scale = i["x"].reshape(-1, i["x"].shape[-1]), i["a"], i["b"], i["base"], i["scale"]
    keep = keep_mask(*x.shape, i["p"], i["seed"], i["child"]) * inv_keep(i["p"]) if i["p"] > 0 else torch.ones_like(x)
    dropped = x * keep
    dy = upstream_like(x.new_empty(*i["x"].shape[:-1], b.shape[0])).reshape(-1, b.shape[0])
    factor = scale if i.get("gate") is None else scale * i["gate"]
    s, ds = factor * (dropped @ a.T), factor * (dy @ b)
    bare, bare_sum = scale * (dropped @ a.T), abs(scale) * (dropped.abs() @ a.abs().T)  # before the gate
    size = abs(scale) if i.get("gate") is None else abs(scale) * i["gate"].abs()
    s_sum, ds_sum = size * (dropped.abs() @ a.abs().T), size * (dy.abs() @ b.abs())
    base, base_sum = (x @ w.T, x.abs() @ w.abs().T) if w is not None else (s @ b.T * 0, s @ b.T * 0)
    dbase, dbase_sum = (dy @ w, dy.abs() @ w.abs()) if w is not None else (x * 0, x * 0)
    if i["bias"] is not None:
        base, base_sum = base + i["bias"], base_sum + i["bias"].abs()
    lead = i["x"].shape[:-1]
    return {
        "y": ((base_sum + s_sum @ b.abs().T).view(*lead, b.shape[0]), [base, s.abs() @ b.abs().T]),
        "x": ((dbase_sum + keep * (ds_sum @ a.abs())).view(i["x"].shape), [dbase, keep * (ds.abs() @ a.abs())]),
        "a": (ds_sum.T @ dropped.abs(), [ds.abs().T @ dropped.abs()]),
        "b": (dy.abs().T @ s_sum, [dy.abs().T @ s.abs()]),
        "base": (dy.abs().T @ x.abs(), []),
        "bias": (dy.abs().sum(0), []),
        "gate": ((bare_sum * (dy.abs() @ b.abs())).sum(0), [(bare * (dy @ b)).abs().sum(0)]),
    }


def check_linear(
    case: Case,
    *,
    trainable: tuple[str, ...] = ("x", "a", "b"),
    lead: tuple[int, ...] | None = None,
    fn: Any = lora.lora_linear,
) -> dict[str, Any]:
    """y and every gradient of ``fn`` against plain torch with the same mask, by the error rule."""
    inputs = linear_inputs(case, lead)
    with poison_empties():
        actual = run_linear(fn, inputs, trainable=trainable, save_mask=case.bits)
    exact = run_linear(composed, dict(zip(inputs, to64(*inputs.values()), strict=True)), trainable=trainable)
    low = run_linear(composed, inputs, trainable=trainable)
    limits = bounds(inputs)
    for key, got in actual.items():
        terms, rounded = limits[key]
        assert_close_to_reference(
            got,
            exact[key],
            low[key],
            terms=terms,
            rounded=rounded,
            rounded_to=inputs["x"].dtype,
            what=f"{key} of {case}",
        )
    return actual
