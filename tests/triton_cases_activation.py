"""The `activation` kernels to compile: each with the configurations its launcher would give it."""

from __future__ import annotations

from typing import Any

from triton_case import TARGETS, Case

_BYTES = {"packed_ptr": "*u8", "packed_g_ptr": "*u8", "packed_u_ptr": "*u8"}
_FP32 = {name: "*fp32" for name in ("stats_ptr", "dw_ptr", "db_ptr", "loss_ptr", "factor_ptr")}
_TYPES = _BYTES | _FP32 | {"target_ptr": "*i64", "eps": "fp32"}
_TYPES |= {name: "fp32" for name in ("smoothing", "z_loss", "softcap")} | {"ignore_index": "i32"}
BITS = {"bf16": 16, "fp16": 16, "fp32": 32}


def _cases(arch: str, dtype: str) -> list[Case]:
    from lowmem.triton_kernels import activation as launchers
    from lowmem.triton_kernels import activation_kernels as k
    from lowmem.triton_kernels import activation_loss

    made: list[Case] = []
    tile = {"BLOCK": launchers.TILE[BITS[dtype]]}

    def add(
        name: str, kernel: Any, launch: tuple[int, int], types: dict[str, str] | None = None, **constants: Any
    ) -> None:
        for aligned in (True, False):
            made.append(
                Case(
                    f"{name}-{dtype}{'' if aligned else '-odd'}",
                    arch,
                    kernel,
                    dtype,
                    constants,
                    *launch,
                    aligned,
                    _TYPES | (types or {}),
                    ("eps", "ignore_index"),
                    "none",
                    wide=False,
                )  # fmt: skip
            )

    elementwise = (launchers.WARPS, 3)
    add("pack", k.pack_kernel, elementwise, **tile)
    add("unpack", k.unpack_kernel, elementwise, **tile)
    for columns in (128, 4096, launchers.MAX_ROW):
        block, warps = launchers.row_launch(columns)
        for center in (False, True):
            kind = "layer" if center else "rms"
            for packed in (False, True):
                label = f"{kind}-{'fp8' if packed else 'plain'}-{columns}"
                flags = {"CENTER": center, "RESIDUAL": packed, "WEIGHT": True, "BIAS": center, "PACK": packed}
                types = {"weight_ptr": "*fp32", "bias_ptr": "*fp32"}
                add(f"norm-{label}", k.norm_kernel, (warps, 3), types, **flags, BLOCK=block)
                flags = {"CENTER": center, "PACKED": packed, "DSUM": packed, "WEIGHT": True, "DW": center, "DB": center}
                types = {"weight_ptr": "*fp32", **({"saved_ptr": "*u8"} if packed else {})}
                add(f"norm_grad-{label}", k.norm_grad_kernel, (warps, 3), types, **flags, BLOCK=block)
    for kind in range(3):
        for form in range(4):
            types = {"saved_ptr": "*u8"} if form else {}
            for name, kernel in (("act", k.act_kernel), ("act_grad", k.act_grad_kernel)):
                add(f"{name}-{kind}-{form}", kernel, elementwise, types, KIND=kind, FORM=form, **tile)
    for packed, pack in ((False, False), (False, True), (True, False)):
        label = "from" if packed else "pack" if pack else "plain"
        add(f"swiglu-{label}", k.swiglu_kernel, elementwise, FROM_PACKED=packed, PACK=pack, **tile)
    for packed in (False, True):
        types = {"g_ptr": "*u8", "u_ptr": "*u8"} if packed else {}
        label = f"swiglu_grad-{'fp8' if packed else 'plain'}"
        add(label, k.swiglu_grad_kernel, elementwise, types, PACKED=packed, **tile)
    for bias, grad, cap in ((False, True, False), (True, True, True), (False, False, False)):
        flags = {"BIAS": bias, "GRAD": grad, "CAP": cap, "BLOCK": activation_loss.BLOCK}
        label = f"loss-{'bias-' if bias else ''}{'grad' if grad else 'value'}{'-cap' if cap else ''}"
        add(label, k.loss_kernel, (activation_loss.WARPS, 3), {"bias_ptr": "*fp32"}, **flags)
    return made


def every() -> list[Case]:
    """The full matrix."""
    return [case for arch in TARGETS for dtype in ("bf16", "fp16", "fp32") for case in _cases(arch, dtype)]


def usual() -> list[Case]:
    """bf16: the forms that matter most on sm_90, one kernel of each kind on the others."""
    few = (
        "pack-bf16",
        "norm-rms-fp8-4096-bf16",
        "norm_grad-layer-fp8-4096-bf16",
        "act-0-2-bf16",
        "act_grad-1-2-bf16",
    )
    few += ("swiglu-pack-bf16", "swiglu_grad-fp8-bf16", "loss-bias-grad-cap-bf16")
    more = (
        "unpack-bf16",
        "norm-layer-fp8-8192-bf16",
        "norm_grad-layer-fp8-8192-bf16",
        "act-1-2-bf16",
        "act-0-3-bf16",
    )
    more += ("act-1-1-bf16", "swiglu-from-bf16", "loss-grad-bf16", "pack-bf16-odd", "norm-rms-fp8-4096-bf16-odd")
    return [
        case
        for case in every()
        if case.arch != "sm_86" and (case.name in few or (case.arch == "sm_90" and case.name in more))
    ]
