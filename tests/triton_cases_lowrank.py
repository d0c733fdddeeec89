"""The `lowrank` kernels to compile: each with the configurations its launcher would give it."""

from __future__ import annotations

from typing import Any

from triton_case import TARGETS, Case

_FLOATS = {name: "fp32" for name in ("beta1", "beta2", "bias1", "bias2", "eps", "alpha", "beta", "decay")}
_TYPES = _FLOATS | {name: "*fp32" for name in ("m_ptr", "v_ptr", "parts_ptr", "f_ptr")}
_TYPES |= {"locks_ptr": "*i32", "seed_ptr": "*i64"}


def _language(dtype: str) -> Any:
    import triton.language as tl

    return {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[dtype]


def _case(name: str, arch: str, kernel: Any, dtype: str, constants: dict[str, Any], tile: Any, **rules: Any) -> Case:
    constants = {**constants, "dtype": _language(dtype), "PRECISION": "ieee"}
    constants |= dict(zip(("BM", "BN", "BK"), tile[:3], strict=True))
    return Case(name, arch, kernel, dtype, constants, tile[3], tile[4], types=_TYPES, **rules)


def _projects(arch: str, dtype: str) -> list[Case]:
    from lowmem.triton_kernels import lowrank
    from lowmem.triton_kernels import lowrank_kernels as k

    made = []
    for small in (False, True) if dtype != "fp32" else (True,):
        for rank in (16, 32, 64, 128) if not small else (32,):
            for left in (True, False):
                tile = lowrank.project_tile(arch, rank, small, left)
                # contiguous P and G: which strides are one
                ones = {"stride_ax": 1, "stride_by": 1} if left else {"stride_ak": 1, "stride_by": 1}
                for adam, parts in ((True, 1), (True, 4), (False, 1)):
                    if parts == 4 and (rank, arch) not in ((128, "sm_90"), (32, "sm_90")):
                        continue
                    side = "left" if left else "right"
                    name = f"project-{side}-{'adam' if adam else 'plain'}-s{parts}-{dtype}-r{rank}"
                    name += "-odd" if small else ""
                    constants = {**ones, "ADAM": adam, "SPLITS": parts}
                    # the transposed operand of a warpgroup is loaded, not described: no rule for its width
                    made.append(
                        _case(name, arch, k.project_kernel, dtype, constants, tile, aligned=not small, wide=False)
                    )
    return made


def _updates(arch: str, dtype: str) -> list[Case]:
    from lowmem.triton_kernels import lowrank
    from lowmem.triton_kernels import lowrank_kernels as k

    made = []
    for small in (False, True) if dtype != "fp32" else (True,):
        for left in (True, False):
            ones = {"stride_gn": 1, "stride_ar": 1} | ({"stride_bn": 1} if left else {"stride_br": 1})
            for residual in ("none", "scaled", "sign"):
                tile = lowrank.update_tile(arch, small, residual)
                for stochastic in (True, False) if dtype == "bf16" else (False,):
                    name = f"update-{'left' if left else 'right'}-{residual}-{'sr' if stochastic else 'near'}-{dtype}"
                    constants = {**ones, "LEFT": left, "RESIDUAL": residual, "STOCHASTIC": stochastic}
                    name += "-odd" if small else ""
                    made.append(_case(name, arch, k.update_kernel, dtype, constants, tile, aligned=not small))
    return made


def _adam(arch: str, dtype: str) -> list[Case]:
    from lowmem.triton_kernels import lowrank
    from lowmem.triton_kernels import lowrank_kernels as k

    constants = {"BLOCK": lowrank.ADAM_BLOCK}
    return [Case(f"adam-{dtype}", arch, k.adam_kernel, dtype, constants, 4, 3, types=_TYPES, products="none")]


def every() -> list[Case]:
    """The full matrix."""
    cases = []
    for arch in TARGETS:
        for dtype in ("bf16", "fp16", "fp32"):
            cases += _projects(arch, dtype) + _updates(arch, dtype) + _adam(arch, dtype)
    return cases


def usual() -> list[Case]:
    """bf16: rank 128 and the stochastic updates everywhere, all the rest on sm_90."""
    keep = []
    for case in every():
        main = "-r128" in case.name or ("-sr-" in case.name and "right" not in case.name and case.aligned)
        if case.dtype == "bf16" and case.arch != "sm_86" and (main or (case.arch == "sm_90" and case.aligned)):
            keep.append(case)
    return keep
