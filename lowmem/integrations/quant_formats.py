"""Readers of quantized weights that other packages wrote: GPTQ, AWQ, HQQ and torchao.

Each takes the tensors of one layer (a state dict, or what safetensors loaded, and the layer's name) and gives a
:class:`lowmem.quant.QTensor` of the same codes, scales and zeros. Sizes are checked against each other before anything
is read through them; errors are ``lowmem.<reader>: <key>: expected ..., got ...``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._errors import bad
from ..quant.formats import GROUP_SIZES, QuantSpec
from ..quant.qtensor import QTensor, packed_shape, scale_shape
from . import _foreign as foreign

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds column AWQ_ORDER[i] of its eight


def _key(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


# ---------------------------------------------------------------------------------------------------------------- GPTQ


def from_gptq(
    tensors: Mapping[str, Tensor],
    *,
    name: str = "",
    bits: int = 4,
    checkpoint_format: str = "gptq",
) -> tuple[QTensor, Tensor | None]:
    """A GPTQ layer: ``<name>.qweight`` int32 ``[K bits / 32, N]``, ``.qzeros`` int32 ``[groups, N bits / 32]``,
    ``.scales`` ``[groups, N]`` and, if there, ``.g_idx`` ``[K]``, the group of each column.

    Codes and zeros are little-endian bit streams along K and along N: ``W[n, k] = s (q - z)``.

    Args:
        tensors: holds the layer's tensors.
        name: of the layer, the keys' prefix.
        bits: 2, 3, 4 or 8 (the file's ``quantize_config``).
        checkpoint_format: ``"gptq"`` (version 1: the file holds ``z - 1``) or ``"gptq_v2"`` (``z``).

    Returns ``(q, perm)``. With act-order (``desc_act``) the columns of a group are not neighbours: they are brought
    together, ``perm [K]`` (int64) says which column came where, and the layer is ``qmatmul(x[..., perm], q)``. None
    where ``g_idx`` is missing or in order.
    """
    op = "from_gptq"
    if bits not in (2, 3, 4, 8):
        bad(op, "bits", "2, 3, 4 or 8", repr(bits))
    if checkpoint_format not in ("gptq", "gptq_v2"):
        bad(op, "checkpoint_format", "'gptq' or 'gptq_v2'", repr(checkpoint_format))
    key = _key(name, "qweight")
    qweight = foreign.take(op, tensors, key, (torch.int32,), (None, None))
    words, n = qweight.shape
    k = words * 32 // bits
    if not words or not n or k * bits != words * 32 or n * bits % 32:
        bad(op, key, f"whole 32-bit words of {bits}-bit codes along K and N", f"shape {list(qweight.shape)}")
    scales = foreign.take(op, tensors, _key(name, "scales"), foreign.FLOATS, (None, n))
    groups = scales.shape[0]
    group = _group(op, _key(name, "scales"), k, groups)
    qzeros = foreign.take(op, tensors, _key(name, "qzeros"), (torch.int32,), (groups, n * bits // 32))
    codes = foreign.unpack_words(qweight.T, bits, k)
    zeros = foreign.unpack_words(qzeros, bits, n).T
    if checkpoint_format == "gptq":
        zeros = (zeros.to(torch.int16) + 1 & 2**bits - 1).to(torch.uint8)  # a zero of 0 was stored as -1
    perm = _order(op, tensors, _key(name, "g_idx"), k, groups, group)
    if perm is not None:
        codes = codes[:, perm]
    q = foreign.int_tensor(op, codes, scales.T, zeros, bits=bits, group=group, dtype=scales.dtype)
    return q, perm


def _order(op: str, tensors: Mapping[str, Tensor], key: str, k: int, groups: int, group: int) -> Tensor | None:
    if key not in tensors:
        return None
    index = foreign.take(op, tensors, key, (torch.int32, torch.int64), (k,)).long()
    if bool((index < 0).any()) or bool((index >= groups).any()):
        bad(op, key, f"groups in [0, {groups})", f"[{int(index.min())}, {int(index.max())}]")
    if not bool((torch.bincount(index, minlength=groups) == group).all()):
        bad(op, key, f"{group} columns in each of {groups} groups", "groups of other sizes")
    if bool((index == torch.arange(k, device=index.device) // group).all()):
        return None
    return torch.argsort(index, stable=True)


def _group(op: str, key: str, k: int, groups: int) -> int:
    if groups < 1 or k % groups or (groups > 1 and k // groups not in GROUP_SIZES):
        bad(op, key, f"groups of 16 to 4096 columns (a power of two) or one for K = {k}", f"{groups} groups")
    return k // groups


# ----------------------------------------------------------------------------------------------------------------- AWQ


def from_awq(tensors: Mapping[str, Tensor], *, name: str = "") -> QTensor:
    """An AWQ layer in the GEMM layout, 4 bits: ``<name>.qweight`` int32 ``[K, N / 8]``, ``.qzeros`` int32
    ``[groups, N / 8]``, ``.scales`` ``[groups, N]``.

    Nibble i of a word (the lowest first) holds column ``(0, 2, 4, 6, 1, 3, 5, 7)[i]`` of the word's eight;
    ``W[n, k] = s (q - z)``.
    """
    op = "from_awq"
    key = _key(name, "qweight")
    qweight = foreign.take(op, tensors, key, (torch.int32,), (None, None))
    k, words = qweight.shape
    if not k or not words:
        bad(op, key, "[K, N / 8] with neither of them 0", f"shape {list(qweight.shape)}")
    n = 8 * words
    scales = foreign.take(op, tensors, _key(name, "scales"), foreign.FLOATS, (None, n))
    groups = scales.shape[0]
    group = _group(op, _key(name, "scales"), k, groups)
    qzeros = foreign.take(op, tensors, _key(name, "qzeros"), (torch.int32,), (groups, words))
    places = [AWQ_ORDER.index(column) for column in range(8)]

    def columns(packed: Tensor) -> Tensor:
        return foreign.unpack_words(packed, 4, n).unflatten(1, (words, 8))[..., places].flatten(1)

    return foreign.int_tensor(
        op, columns(qweight).T, scales.T, columns(qzeros).T, bits=4, group=group, dtype=scales.dtype
    )


# ----------------------------------------------------------------------------------------------------------------- HQQ

_HQQ_PACKING = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4)}  # bits, codes a word


def from_hqq(tensors: Mapping[str, Any], *, name: str = "") -> QTensor:
    """An HQQ layer with ``axis=1``: ``<name>.W_q``, ``.scale``, ``.zero`` and its metadata (``.nbits``,
    ``.group_size``, ``.shape``, ``.axis``, ``.packing``), encoded as tensors, as safetensors needs them, or plain.

    Groups are rows of a matrix ``[numel / group_size, group_size]`` whose row blocks share bytes: with 4 bits rows of
    the first half are high nibbles, those of the second half low ones. ``W = s (q - z)`` with float zeros. The packed
    bytes may be viewed as floats (``view_as_float``).
    """
    op = "from_hqq"

    def meta(part: str) -> Any:
        if _key(name, part) not in tensors:
            bad(op, "tensors", repr(_key(name, part)), f"{len(tensors)} keys without it")
        return tensors[_key(name, part)]

    if foreign.whole(op, _key(name, "axis"), meta("axis"), 0, 1) != 1:
        bad(op, _key(name, "axis"), "1 (groups along K)", 0)
    shape = foreign.shape_of(op, _key(name, "shape"), meta("shape"))
    n, k = shape[-2:]
    packing = foreign.text_of(op, _key(name, "packing"), meta("packing"))
    bits, per = _HQQ_PACKING.get(packing, (0, 0))
    if not per or len(shape) != 2:
        bad(op, _key(name, "packing"), f"one of {', '.join(_HQQ_PACKING)} for a matrix", f"{packing[:40]!r}")
    foreign.whole(op, _key(name, "nbits"), meta("nbits"), bits, bits)
    given = tensors.get(_key(name, "group_size"))
    group = k if given is None else foreign.whole(op, _key(name, "group_size"), given, 1)
    if k % group or group not in (*GROUP_SIZES, k):
        bad(op, _key(name, "group_size"), f"a power of two from 16 to 4096 that divides K = {k}, or K", group)
    rows = n * k // group
    word = torch.int32 if per == 10 else torch.uint8
    stored = foreign.take(op, tensors, _key(name, "W_q"), (word, *foreign.FLOATS))
    count = -(-rows // per)
    if rows % per and per != 10 or stored.nbytes != count * group * word.itemsize:
        want = f"{count} rows of {group} {packing} words for shape {list(shape)}"
        bad(op, _key(name, "W_q"), want, f"{stored.nbytes} bytes")
    packed = stored.contiguous().reshape(-1).clone().view(word).reshape(count, group)
    shifts = [27 - 3 * i for i in range(10)] if per == 10 else [bits * (per - 1 - i) for i in range(per)]
    codes = torch.cat([(packed >> shift & 2**bits - 1).to(torch.uint8) for shift in shifts])[:rows]
    scale, zero = (foreign.take(op, tensors, _key(name, part), foreign.FLOATS, (rows, 1)) for part in ("scale", "zero"))
    if zero.dtype != scale.dtype:
        bad(op, _key(name, "zero"), f"{scale.dtype}, as the scales", zero.dtype, kind=TypeError)
    parts = (t.reshape(n, k // group) for t in (scale, zero))
    return foreign.int_tensor(op, codes.view(n, k), *parts, bits=bits, group=group, dtype=scale.dtype)


# -------------------------------------------------------------------------------------------------------------- torchao


def from_torchao(weight: Any, metadata: Mapping[str, Any] | None = None) -> QTensor:
    """A torchao weight: an ``NF4Tensor``, an ``Int4Tensor`` (plain packing) or an ``IntxUnpackedToInt8Tensor``, or a
    mapping of the same names to its parts (``qdata``, ``scale``, ``zero_point``, ``block_size``, ...). torchao need not
    be installed.

    - ``NF4Tensor``: codes as in bitsandbytes; scales ``int8 / quantization_factor + scaler_mean`` become doubly
      quantized scales of as many bits. torchao's table has four digits, ours bitsandbytes' seven: values differ by up
      to 5e-5 of the scale.
    - ``Int4Tensor``: ``W = q s + z`` with q in [-8, 7] becomes ``s (q + 8 - (8 - z / s))``, scale and zero in fp32.
    - ``IntxUnpackedToInt8Tensor`` (int2, int3, int4, int8): ``W = s (q - z)``, packed to its bits.

    Args:
        weight: the tensor, or a mapping of its parts.
        metadata: more parts, such as the JSON ``_data`` that torchao writes into safetensors' metadata.
    """
    op = "from_torchao"
    names: tuple[str, ...] = (
        "quantized_data",
        "quantized_scalers",
        "quantization_factor",
        "scaler_mean",
        "scaler_block_size",
    )
    names += ("block_size", "qdata", "scale", "zero_point", "target_dtype", "dtype", "shape", "act_pre_scale")
    parts: dict[str, Any] = dict(weight) if isinstance(weight, Mapping) else {}
    if not isinstance(weight, Mapping):
        parts = {part: getattr(weight, part) for part in names if hasattr(weight, part)}
    parts |= {key: _plain(value) for key, value in (metadata or {}).items()}
    if "quantized_data" in parts:
        return _torchao_nf4(op, parts)
    if "qdata" not in parts:
        got = type(weight).__name__ if not isinstance(weight, Mapping) else f"keys {', '.join(map(str, weight))[:200]}"
        bad(op, "weight", "an NF4Tensor, Int4Tensor or IntxUnpackedToInt8Tensor", got, kind=TypeError)
    if parts.get("act_pre_scale") is not None:
        bad(op, "weight", "no scale on the activations", "act_pre_scale")
    block = parts.get("block_size")
    if not isinstance(block, (list, tuple)) or len(block) not in (2, 3) or any(b != 1 for b in block[:-1]):
        bad(op, "block_size", "[1, group] or [1, 1, group]", repr(block)[:80])
    group = foreign.whole(op, "block_size", block[-1], 1)
    return (_torchao_intx if "target_dtype" in parts else _torchao_int4)(op, parts, group)


def _plain(value: Any) -> Any:
    # torchao's JSON writes dtypes and sizes as {"_type": ..., "_data": ...}
    return value.get("_data") if isinstance(value, dict) and "_type" in value else value


def _fits(op: str, k: int, group: int) -> int:
    if k % group or group not in (*GROUP_SIZES, k):
        bad(op, "block_size", f"a power of two from 16 to 4096 that divides K = {k}, or K", group)
    return k // group


def _torchao_int4(op: str, parts: dict[str, Any], group: int) -> QTensor:
    qdata = foreign.take(op, parts, "qdata", (torch.int8, torch.uint8))
    if qdata.dim() not in (2, 3) or not qdata.numel():
        bad(op, "qdata", "[N, K / 2] or [E, N, K / 2]", f"shape {list(qdata.shape)}")
    data = qdata.contiguous().view(torch.uint8)
    codes = torch.stack([data & 15, data >> 4], -1).flatten(-2) ^ 8  # two's complement to q + 8
    *lead, n, k = codes.shape
    groups = _fits(op, k, group)
    scale, zero = (
        foreign.take(op, parts, part, foreign.FLOATS, (*lead, groups, n)).mT.float() for part in ("scale", "zero_point")
    )
    dtype = parts["scale"].dtype
    z = torch.where(scale == 0, 8.0, 8 - zero / torch.where(scale == 0, 1.0, scale))
    return foreign.int_tensor(op, codes, scale, z, bits=4, group=group, dtype=dtype)


def _torchao_intx(op: str, parts: dict[str, Any], group: int) -> QTensor:
    target = str(parts["target_dtype"]).removeprefix("torch.")
    bits = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}.get(target)
    if bits is None:
        bad(op, "target_dtype", "int8, int4, int3 or int2", target[:40])
    qdata = foreign.take(op, parts, "qdata", (torch.int8,))
    if qdata.dim() not in (2, 3) or not qdata.numel():
        bad(op, "qdata", "[N, K] or [E, N, K]", f"shape {list(qdata.shape)}")
    middle = 2 ** (bits - 1)
    wide = qdata.to(torch.int16) + middle
    if bool((wide < 0).any()) or bool((wide >= 2 * middle).any()):
        bad(op, "qdata", f"values of {target}", f"[{int(qdata.min())}, {int(qdata.max())}]")
    groups = _fits(op, qdata.shape[-1], group)
    shape = (*qdata.shape[:-1], groups)
    scale = foreign.take(op, parts, "scale", foreign.FLOATS, shape)
    zero = foreign.take(op, parts, "zero_point", (torch.int8, *foreign.FLOATS), shape)
    if zero.dtype == torch.int8:
        shifted = zero.to(torch.int16) + middle
        whole = bool((shifted >= 0).all())
        zero = shifted.to(torch.uint8) if whole else shifted.to(scale.dtype)
    else:
        zero = (zero.float() + middle).to(scale.dtype)
    dtype = foreign.dtype_of(op, "dtype", parts.get("dtype", scale.dtype))
    return foreign.int_tensor(op, wide.to(torch.uint8), scale, zero, bits=bits, group=group, dtype=dtype)


def _torchao_nf4(op: str, parts: dict[str, Any]) -> QTensor:
    shape = foreign.shape_of(op, "shape", parts.get("shape"))
    if len(shape) != 2:
        bad(op, "shape", "a matrix", list(shape))
    numel = shape[0] * shape[1]
    block, second = (foreign.whole(op, key, parts.get(key), 1) for key in ("block_size", "scaler_block_size"))
    for key, size in (("block_size", block), ("scaler_block_size", second)):
        if size not in GROUP_SIZES:
            bad(op, key, "a power of two from 16 to 4096", size)
    if numel % (block * second):
        bad(op, "shape", f"a multiple of {block * second} elements", list(shape))
    spec = QuantSpec("nf4", block, double_quant=True, scale_dtype=torch.float32, scale_group=second)
    packed = foreign.take(op, parts, "quantized_data", (torch.uint8,), (numel // 2,))
    codes = foreign.take(op, parts, "quantized_scalers", (torch.int8,), (numel // block,))
    factor = foreign.take(op, parts, "quantization_factor", foreign.FLOATS, (numel // block // second,))
    mean = foreign.take(op, parts, "scaler_mean", foreign.FLOATS, ())
    if bool((factor == 0).any()):
        bad(op, "quantization_factor", "numbers that are not 0", "0")
    q = QTensor(
        packed.contiguous().view(packed_shape(spec, shape)),
        (codes.to(torch.int16) + 128).to(torch.uint8).view(scale_shape(spec, shape)),
        spec,
        shape,
        factor.dtype,
        # value = int8 / factor + mean; inf, from a block without spread, divides to 0
        scale_code=torch.arange(-128, 128, dtype=torch.float32, device=packed.device),
        scale_absmax=1 / factor.float(),
        scale_offset=mean.float().reshape(1),
    )
    foreign.finite(op, "scaler_mean", mean)
    foreign.finite(op, "quantization_factor", q.scale_absmax)  # type: ignore[arg-type]
    return q.check(op)
