"""The `lora` kernels over many adapters to compile: each with the configurations its launcher would give it."""

from __future__ import annotations

from typing import Any

from triton_case import TARGETS, Case

_TYPES = {
    "seed_ptr": "*i64",
    "blocks_ptr": "*i64",
    "offsets_ptr": "*i64",
    "order_ptr": "*i64",
    "table_ptr": "*i64",
    "bits_ptr": "*u8",
    "mask_ptr": "*u8",
    "parts_ptr": "*fp32",
    "spare_ptr": "*fp32",
    "db_ptr": "*fp32",
    "da_ptr": "*fp32",
}
_PLAIN = {"products": "none", "wide": False}


def _cases(arch: str, dtype: str) -> list[Case]:
    from lowmem.triton_kernels import lora_configs as configs
    from lowmem.triton_kernels import lora_multi as launchers
    from lowmem.triton_kernels import lora_multi_kernels as k

    half = dtype != "fp32"
    made: list[Case] = []

    def add(kernel: Any, family: str, columns: str, block: int, label: str, aligned: bool, **constants: Any) -> None:
        bm, bn, _, warps, stages = configs.tile_of_many(family, arch, block, not (half and aligned))
        full = {"PRECISION": "ieee", **constants, "EVEN": aligned, "BM": bm, columns: bn, "BR": block}
        name = f"multi_{family}-{label}-{dtype}-r{block}{'' if aligned else '-odd'}"
        made.append(Case(name, arch, kernel, dtype, full, warps, stages, aligned, _TYPES, ("parts", "J")))

    def blocks(family: str) -> list[tuple[int, bool]]:
        wide = [(block, True) for block in sorted(configs.TILES[family][arch])] if half else []
        return [*wide, (configs.SMALL_RANK_BLOCK, not half)]

    for order in (True, False):
        at = "order" if order else "runs"
        for br, aligned in blocks("shrink"):
            common = {"WHOLE": True, "ORDER": order, "PAIRS": half and aligned}
            add(k.multi_shrink_kernel, "shrink", "BK", br, f"bits-{at}", aligned, DROP=True, SAVE=True, **common)
        for br, aligned in blocks("shrink_plain"):
            common = {"WHOLE": True, "ORDER": order, "PAIRS": False}
            add(k.multi_shrink_kernel, "shrink_plain", "BK", br, at, aligned, DROP=False, SAVE=False, **common)
        for br, aligned in blocks("dy"):
            add(k.multi_dy_kernel, "dy", "BN", br, at, aligned, WHOLE=False, ORDER=order)
        for br, aligned in blocks("da"):
            for drop in (True, False):
                common = {"ORDER": order, "DROP": drop, "PAIRS": half and aligned}
                add(k.multi_da_kernel, "da", "BK", br, f"{'bits' if drop else 'none'}-{at}", aligned, **common)
        for br, aligned in blocks("masked_expand"):
            for drop in (True, False):
                label = f"{'bits' if drop else 'none'}-{at}"
                add(k.multi_expand_kernel, "masked_expand", "BK", br, label, aligned, DROP=drop, ORDER=order)
    types = _TYPES | {"out_ptr": f"*{dtype}"}
    constants: dict[str, Any] = {"ORDER": True, "DROP": True, "BM": 64, "BR": 16}
    made.append(
        Case(
            f"multi_reduce-{dtype}",
            arch,
            k.multi_reduce_kernel,
            dtype,
            constants,
            4,
            3,
            True,
            types,
            ("parts",),
            **_PLAIN,
        )
    )
    if dtype == "bf16":
        sizes = {"BLOCK": launchers._TABLE_BLOCK, "CHUNK": launchers._TABLE_CHUNK}
        for empty in (True, False):
            constants = {"EMPTY": empty, **sizes}
            made.append(
                Case(f"multi_blocks-{empty}", arch, k.blocks_kernel, dtype, constants, 4, 3, False, _TYPES, **_PLAIN)
            )
        constants = {"SCALED": True, "BLOCK": launchers._SUM_BLOCK}
        types = _TYPES | {"out_ptr": "*fp32"}
        made.append(Case("multi_sum", arch, k.sum_kernel, dtype, constants, 4, 3, True, types, (), **_PLAIN))
        bm, bb, warps = configs.DRAW_TILE
        constants = {"ORDER": True, "BM": bm, "BB": bb}
        made.append(Case("multi_draw", arch, k.multi_draw_kernel, dtype, constants, warps, 3, True, _TYPES, **_PLAIN))
    return made


def every() -> list[Case]:
    """The full matrix; fp16 on two architectures only: all that differs from bf16 is the opcode of the products."""
    cases = []
    for arch in TARGETS:
        for dtype in ("bf16", "fp16", "fp32") if arch in ("sm_80", "sm_90") else ("bf16", "fp32"):
            cases += _cases(arch, dtype)
    return cases


def usual() -> list[Case]:
    """What `make test` compiles: bf16, rows by an order; all ranks on sm_90 and rank 16 elsewhere."""
    return [
        case
        for case in every()
        if case.dtype == "bf16"
        and case.arch != "sm_86"
        and "runs" not in case.name
        and (case.arch == "sm_90" or (case.aligned and ("r16" in case.name or "-r" not in case.name)))
    ]
