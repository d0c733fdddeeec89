"""The `quant` kernels to compile: each with the configurations its launcher would give it."""

from __future__ import annotations

from typing import Any

from triton_case import TARGETS, Case

# (bits, table) of the formats; one stands for those that share a kernel
FORMATS = {"nf4": (4, True), "nf3": (3, True), "nf2": (2, True), "int8": (8, False), "int4": (4, False)}
FORMATS |= {"int3": (3, False), "int2": (2, False)}
_TYPES = {"packed_ptr": "*u8", "table_ptr": "*fp32", "code_ptr": "*fp32", "zero_ptr": "*u8"}
# numbers that 16 need not divide where all sizes are multiples of 16
_INDIVISIBLE = ("row_bytes", "row_groups", "group_size", "scale_group", "spans", "row0", "col0", "stride_col")


def _dequantize(arch: str, name: str, dtype: str, nested: bool, aligned: bool) -> Case:
    from lowmem.triton_kernels import quant_configs as configs
    from lowmem.triton_kernels import quant_kernels as k

    bits, table = FORMATS[name]
    bm, bk, _, warps, stages = configs.dequantize(arch)
    constants: dict[str, Any] = {"TABLE": table, "BITS": bits, "PER_ROW": False, "ZEROS": not table, "OFFSETS": False}
    constants |= {"SCALE_BITS": 8 if nested else 0, "ALIGNED": aligned, "BM": bm, "BK": bk}
    types = _TYPES | {"scale_ptr": "*u8" if nested else "*fp32", "absmax_ptr": "*fp32", "offset_ptr": "*fp32"}
    label = f"dequantize-{name}-{'nested-' if nested else ''}{dtype}{'' if aligned else '-odd'}"
    rules: dict[str, Any] = {"products": "none", "wide": False, "indivisible": _INDIVISIBLE}
    return Case(label, arch, k.dequantize_kernel, dtype, constants, warps, stages, aligned, types, **rules)


def _scale_grad(arch: str, name: str, dtype: str, span: int) -> Case:
    from lowmem.triton_kernels import quant_configs as configs
    from lowmem.triton_kernels import quant_kernels as k

    bits, table = FORMATS[name]
    bn, bk, bm, warps, stages = configs.scale_grad(arch, dtype == "fp32")
    constants = {"TABLE": table, "BITS": bits, "PER_ROW": span == 0, "ZEROS": not table, "SPAN": min(span or bk, bk)}
    constants |= {"EVEN": True, "PRECISION": "ieee", "GROUP": configs.GROUP_TILES, "BM": bm, "BN": bn, "BK": bk}
    types = _TYPES | {"ds_ptr": "*fp32", "dw_ptr": "*fp32"}
    label = f"scale_grad-{name}-{dtype}-g{span or 'row'}"
    rules: dict[str, Any] = {"indivisible": _INDIVISIBLE}
    return Case(label, arch, k.scale_grad_kernel, dtype, constants, warps, stages, True, types, **rules)


def _lattice(arch: str, dtype: str, weight: bool) -> Case:
    from lowmem.triton_kernels import quant_lattice as lattice

    bn, bk, br, warps = lattice.TILE
    constants = {"HALF": 8, "WEIGHT": weight, "BN": bn, "BK": bk, "BR": br}
    types = {"phi_ptr": "*i8", "a_ptr": "*fp32", "b_ptr": "*fp32", "scale_ptr": "*fp32", "c": "fp32", "step": "fp32"}
    types |= {} if weight else {"out_ptr": "*i16"}
    label = f"lattice-{'weight' if weight else 'codes'}-{dtype}"
    rules: dict[str, Any] = {"products": "none", "indivisible": (*_INDIVISIBLE, "stride_scale")}
    return Case(label, arch, lattice.lattice_kernel, dtype, constants, warps, 1, True, types, **rules)


def every() -> list[Case]:
    """The full matrix; fp16 differs from bf16 by opcodes alone."""
    cases = []
    for arch in TARGETS:
        for name in FORMATS:
            for dtype in ("bf16", "fp32"):
                cases.append(_dequantize(arch, name, dtype, FORMATS[name][1], True))
                cases.append(_scale_grad(arch, name, dtype, 64))
            cases.append(_dequantize(arch, name, "bf16", FORMATS[name][1], False))
        cases.append(_scale_grad(arch, "int4", "bf16", 0))
        cases += [_lattice(arch, "bf16", weight) for weight in (True, False)]
    return cases


def usual() -> list[Case]:
    """What `make test` compiles: bf16, every format on sm_90, nf4 and the lattice's codes elsewhere."""

    def taken(case: Case) -> bool:
        if case.dtype != "bf16" or case.arch == "sm_86":
            return False
        if case.arch == "sm_90":
            return case.aligned or "nf3" in case.name
        return case.aligned and ("nf4" in case.name or "codes" in case.name)

    return [case for case in every() if taken(case)]
