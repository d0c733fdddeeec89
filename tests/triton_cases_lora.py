"""The `lora` kernels to compile: each with the configurations its launcher would give it."""

from __future__ import annotations

from typing import Any

from triton_case import TARGETS, Case

_TYPES = {"seed_ptr": "*i64", "bits_ptr": "*u8", "mask_ptr": "*u8", "db_ptr": "*fp32", "scale": "fp32"}


def _case(
    name: str,
    arch: str,
    kernel: Any,
    dtype: str,
    constants: dict[str, Any],
    launch: tuple[int, int],
    aligned: bool = True,
    types: dict[str, str] | None = None,
    **rules: Any,
) -> Case:
    all_types = _TYPES | (types or {})
    rules["indivisible"] = ("threshold", "child", "parts")
    return Case(name, arch, kernel, dtype, constants, *launch, aligned, all_types, **rules)


def _memory_bound(arch: str, dtype: str) -> list[Case]:
    from lowmem.triton_kernels import lora_configs as configs
    from lowmem.triton_kernels import lora_kernels as k
    from lowmem.triton_kernels import philox

    size = 4 if dtype == "fp32" else 2
    base = {"PRECISION": "ieee"}
    made: list[Case] = []

    def add(kernel: Any, family: str, columns: str, block: int, label: str, aligned: bool, **constants: Any) -> None:
        bm, bn, _, warps, stages = configs.tile(family, arch, block, size == 4 or not aligned)
        full = {**base, **constants, "EVEN": aligned, "BM": bm, columns: bn, "BR": block}
        types = {"out_ptr": "*fp32"} if kernel is k.da_kernel else {}
        name = f"{family}-{label}-{dtype}-r{block}{'' if aligned else '-odd'}"
        made.append(_case(name, arch, kernel, dtype, full, (warps, stages), aligned, types))

    def blocks(family: str) -> list[tuple[int, bool]]:
        """Rank blocks, and whether sizes are multiples of 16."""
        wide = [] if size == 4 else [(block, True) for block in sorted(configs.TILES[family][arch])]
        return [*wide, (configs.SMALL_RANK_BLOCK, size == 4)]

    for br, aligned in blocks("shrink"):
        pairs = size == 2 and aligned
        add(k.shrink_kernel, "shrink", "BK", br, "bits", aligned, DROP=True, SAVE=True, PAIRS=pairs)
        add(k.shrink_kernel, "shrink", "BK", br, "seed", aligned, DROP=True, SAVE=False, PAIRS=pairs)
    for br, aligned in blocks("shrink_plain"):
        add(k.shrink_kernel, "shrink_plain", "BK", br, "none", aligned, DROP=False, SAVE=False, PAIRS=False)
    for br, aligned in blocks("dy"):
        add(k.dy_kernel, "dy", "BN", br, "pass", aligned)
    for br, aligned in blocks("da"):
        pairs = size == 2 and aligned
        add(k.da_kernel, "da", "BK", br, "bits", aligned, DROP=True, PAIRS=pairs)
        add(k.da_kernel, "da", "BK", br, "none", aligned, DROP=False, PAIRS=pairs)
    for br, aligned in blocks("masked_expand"):
        for onto in (False, True):
            what = "onto" if onto else "over"
            for drop, label in ((True, "bits"), (False, "none")):
                add(
                    k.masked_expand_kernel, "masked_expand", "BK", br, f"{label}-{what}", aligned,
                    DROP=drop, ACCUMULATE=onto,
                )  # fmt: skip
    types = {"parts_ptr": "*fp32"}
    plain = {"products": "none", "wide": False}
    made.append(_case(f"reduce-{dtype}", arch, k.reduce_kernel, dtype, {"BLOCK": 1024}, (4, 3), True, types, **plain))
    if dtype == "bf16":
        bm, bb, warps = configs.DRAW_TILE
        made.append(_case("draw", arch, philox.draw_kernel, dtype, {"BM": bm, "BB": bb}, (warps, 3), **plain))
    return made


def _gemms(arch: str, dtype: str) -> list[Case]:
    from lowmem.triton_kernels import lora_configs as configs
    from lowmem.triton_kernels import lora_gemm as g

    made: list[Case] = []
    for rank in (16, 64, 200):
        for family, flag in (("expand", "BIAS"), ("dx", "DROP")):
            for on in (True, False):
                for small in (False, True):
                    block = configs.rank_block(family, arch, rank, small)
                    bm, bn, bk, warps, stages = configs.tile(family, arch, block, small)
                    constants = {"PRECISION": "ieee", "GROUP": configs.GROUP_ROWS, "BM": bm, "BN": bn, "BK": bk}
                    constants |= {"BR": block, "RANK_TILES": -(-rank // block), flag: on}
                    kernel = g.expand_kernel if family == "expand" else g.dx_kernel
                    label = f"{flag.lower() if on else 'none'}-{dtype}-r{rank}"
                    odd = "-odd" if small else ""
                    name, products = f"{family}-{label}{odd}", "any" if small else "gemm"
                    launch = (warps, stages)
                    made.append(_case(name, arch, kernel, dtype, constants, launch, not small, products=products))
                    if small or arch not in ("sm_90", "sm_100"):
                        continue
                    constants = {**constants, "PROGRAMS": 132}
                    constants["FLATTEN"] = configs.flatten(arch, block, constants["RANK_TILES"])
                    if family == "expand":
                        kernel = g.expand_descriptor_kernel
                        boxes = {"x_desc": (bm, bk), "w_desc": (bn, bk), "y_desc": (bm, bn)}
                    else:
                        kernel = g.dx_descriptor_kernel
                        boxes = {"dy_desc": (bm, bk), "w_desc": (bk, bn), "dx_desc": (bm, bn)}
                    types = {name: f"tensordesc<{dtype}[{a}, {b}]>" for name, (a, b) in boxes.items()}
                    name = f"{family}_descriptor-{label}"
                    rules = {"products": "gemm", "descriptors": True}
                    made.append(_case(name, arch, kernel, dtype, constants, launch, True, types, **rules))
    return made


def every() -> list[Case]:
    """The full matrix; fp16 on two architectures only: all that differs from bf16 is the opcode of the products."""
    cases = []
    for arch in TARGETS:
        for dtype in ("bf16", "fp16", "fp32") if arch in ("sm_80", "sm_90") else ("bf16", "fp32"):
            cases += _memory_bound(arch, dtype)
        for dtype in ("bf16", "fp16") if arch in ("sm_80", "sm_90") else ("bf16",):
            cases += _gemms(arch, dtype)
    return cases


def usual() -> list[Case]:
    """What `make test` compiles: bf16, everything on sm_90 and rank 16 with sizes that 16 divides elsewhere."""
    return [
        case
        for case in every()
        if case.dtype == "bf16"
        and case.arch != "sm_86"
        and (case.arch == "sm_90" or (case.aligned and ("r16" in case.name or "-r" not in case.name)))
    ]
