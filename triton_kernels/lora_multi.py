"""Launchers of the ``lora`` family over a batch of many adapters: the CUDA kernels of ``lowmem::lora_multi_*``, with
exactly their schemas. One launch of a kernel serves all adapters; beside it go a small one that makes the block table
and, where a sum was split, one that adds the parts. Nothing here waits for the device.

Tiles, and what is served, are those of the single adapter's launchers (``lora.py``); what they do not serve goes to the
references, which read the segments' bounds on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import lora_multi as family
from . import device as gpu
from . import lora_configs as configs
from . import lora_multi_kernels as kernels
from .lora import _pairs, _parts

_TABLE_BLOCK, _TABLE_CHUNK = 64, 64
_SUM_BLOCK = 1024


def block_table(offsets: Tensor, rows: int, step: int, *, empty: bool = False) -> Tensor:
    """int64 ``[count, 2]``: the adapter (-1: none) and first position of every block of ``step`` positions; ``empty``
    gives adapters without rows a block too. ``count`` is the most there can be, by the shapes alone."""
    adapters = offsets.shape[0] - 1
    count = (rows // step if empty else gpu.cdiv(rows, step)) + adapters
    blocks = offsets.new_empty(count, 2)
    kernels.blocks_kernel[(gpu.cdiv(count, _TABLE_BLOCK),)](
        blocks, offsets, adapters, rows, count, step, EMPTY=empty, BLOCK=_TABLE_BLOCK, CHUNK=_TABLE_CHUNK, num_warps=4
    )
    return blocks


def _stack(matrices: Sequence[Tensor]) -> Tensor:
    return matrices[0].contiguous() if len(matrices) == 1 else torch.cat(list(matrices))


def _bits(
    x: Tensor,
    mask: Tensor | None,
    seeds: Tensor | None,
    order: Tensor | None,
    offsets: Tensor,
    table: Tensor,
    drop: bool,
) -> tuple[Tensor, int]:
    """``(packed bits as bytes, their row stride)``; drawn here where only the seeds were kept."""
    if not drop:
        return x, 0
    rows, columns = x.shape
    if mask is None:
        assert seeds is not None
        mask = x.new_empty(rows, gpu.cdiv(columns, 32), dtype=torch.int32)
        stride = mask.shape[1] * 4
        bm, bb, warps = configs.DRAW_TILE
        blocks = block_table(offsets, rows, bm)
        kernels.multi_draw_kernel[(blocks.shape[0], gpu.cdiv(stride, bb))](
            mask.view(torch.uint8), seeds, blocks, offsets, offsets if order is None else order, table, rows, columns,
            stride, ORDER=order is not None, BM=bm, BB=bb, num_warps=warps,
        )  # fmt: skip
    return mask.contiguous().view(torch.uint8), mask.shape[1] * 4


def shrink(
    x: Tensor,
    a: list[Tensor],
    table: Tensor,
    seeds: Tensor | None,
    order: Tensor | None,
    offsets: Tensor,
    drop: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor]:
    """``lowmem::lora_multi_shrink``."""
    arch = gpu.serves(x, *a)
    if arch is None:
        return family.shrink_reference(x, a, table, seeds, order, offsets, drop, save_mask)
    (m, k), width, count = x.shape, max(one.shape[0] for one in a), len(a)
    name = "shrink" if drop else "shrink_plain"
    x = gpu.rows(x)
    small = gpu.small(x)
    br = configs.rank_block(name, arch, width, small)
    bm, bk, _, warps, stages = configs.tile_of_many(name, arch, br, small)
    rank_tiles = gpu.cdiv(width, br)
    at_least = 2 if arch == "interpreter" else 8
    tiles = (gpu.cdiv(m, bm) + count) * rank_tiles
    parts, chunk = _parts(name, k, bk, tiles, x.device, at_least)
    s = x.new_zeros(m, width)
    out = s if parts == 1 else x.new_empty(parts, m, width, dtype=torch.float32)
    words = gpu.cdiv(k, 32)
    save = save_mask and drop
    bits = x.new_zeros((m, words) if save else (0,), dtype=torch.int32)
    by_order, order = order is not None, offsets if order is None else order
    with gpu.on(x.device):
        stacked = _stack(a)
        blocks = block_table(offsets, m, bm)
        kernels.multi_shrink_kernel[(blocks.shape[0], parts, rank_tiles)](
            x, stacked, out, bits.view(torch.uint8) if save else x, seeds if drop else x, blocks, offsets, order, table,
            m, k, width, x.stride(0), stacked.stride(0), words * 4, chunk,
            WHOLE=parts == 1, ORDER=by_order, DROP=drop, SAVE=save, PAIRS=_pairs(x), EVEN=k % bk == 0,
            PRECISION=gpu.precision(x), BM=bm, BK=bk, BR=br, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if parts > 1:
            _reduce(out, s, blocks, offsets, order, table, by_order, drop, bm, br)
    return s, bits


def _reduce(
    parts: Tensor,
    out: Tensor,
    blocks: Tensor,
    offsets: Tensor,
    order: Tensor,
    table: Tensor,
    by_order: bool,
    drop: bool,
    bm: int,
    br: int,
) -> None:
    m, width = out.shape
    kernels.multi_reduce_kernel[(blocks.shape[0], gpu.cdiv(width, br))](
        parts, out, blocks, offsets, order, table, m, width, parts.shape[0],
        ORDER=by_order, DROP=drop, BM=bm, BR=br, num_warps=4,
    )  # fmt: skip


def dy(
    dy: Tensor, b: list[Tensor], s: Tensor, table: Tensor, order: Tensor | None, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """``lowmem::lora_multi_dy``: one read of dy per 64 ranks of the widest adapter; repeatable bit for bit."""
    arch = gpu.serves(dy, *b, s)
    if arch is None:
        return family.dy_reference(dy, b, s, table, order, offsets)
    (m, n), width = dy.shape, max(one.shape[1] for one in b)
    dy, s = gpu.rows(dy), gpu.rows(s)
    small = gpu.small(dy)
    br = configs.rank_block("dy", arch, width, small)
    bm, bn, _, warps, stages = configs.tile_of_many("dy", arch, br, small)
    strips, rank_tiles = gpu.cdiv(n, bn), gpu.cdiv(width, br)
    _, chunk = _parts("dy", m, bm, strips * rank_tiles, dy.device, 2)
    ds = dy.new_zeros(m, width)
    ds_out = ds if strips == 1 else dy.new_empty(strips, m, width, dtype=torch.float32)
    db = dy.new_empty(sum(one.numel() for one in b), dtype=torch.float32)
    spare = dy.new_empty(m // chunk, n * width, dtype=torch.float32)
    by_order, order = order is not None, offsets if order is None else order
    with gpu.on(dy.device):
        stacked = _stack([one.reshape(-1) for one in b])
        blocks = block_table(offsets, m, chunk, empty=True)
        kernels.multi_dy_kernel[(strips, blocks.shape[0], rank_tiles)](
            dy, stacked, s, ds_out, db, spare, blocks, offsets, order, table, m, n, width, dy.stride(0), s.stride(0),
            chunk,
            WHOLE=strips == 1, ORDER=by_order, EVEN=n % bn == 0, PRECISION=gpu.precision(dy), BM=bm, BN=bn, BR=br,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        _sum(db, spare, blocks, offsets, table, m, n, width, chunk, False)
        if strips > 1:
            _reduce(ds_out, ds, block_table(offsets, m, bm), offsets, order, table, by_order, False, bm, br)
    return ds, db


def _sum(
    out: Tensor,
    spare: Tensor,
    blocks: Tensor,
    offsets: Tensor,
    table: Tensor,
    rows: int,
    cols: int,
    width: int,
    chunk: int,
    scaled: bool,
) -> None:
    if spare.shape[0] == 0:  # no adapter can have a second block
        return
    kernels.sum_kernel[(blocks.shape[0], gpu.cdiv(cols * width, _SUM_BLOCK))](
        out, spare, blocks, offsets, table, rows, cols, width, chunk, SCALED=scaled, BLOCK=_SUM_BLOCK, num_warps=4
    )


def da(
    ds: Tensor,
    x: Tensor,
    ranks: list[int],
    table: Tensor,
    mask: Tensor | None,
    seeds: Tensor | None,
    order: Tensor | None,
    offsets: Tensor,
    drop: bool,
) -> Tensor:
    """``lowmem::lora_multi_da``; repeatable bit for bit."""
    arch = gpu.serves(x, ds)
    if arch is None:
        return family.da_reference(ds, x, ranks, table, mask, seeds, order, offsets, drop)
    (m, k), width = x.shape, max(ranks)
    x, ds = gpu.rows(x), gpu.rows(ds)
    small = gpu.small(x)
    br = configs.rank_block("da", arch, width, small)
    bm, bk, _, warps, stages = configs.tile_of_many("da", arch, br, small)
    tiles = gpu.cdiv(k, bk), gpu.cdiv(width, br)
    _, chunk = _parts("da", m, bm, tiles[0] * tiles[1], x.device, 2)
    out = x.new_empty(sum(ranks), k, dtype=torch.float32)
    spare = x.new_empty(m // chunk, width * k, dtype=torch.float32)
    with gpu.on(x.device):
        mask_bytes, stride_mask = _bits(x, mask, seeds, order, offsets, table, drop)
        blocks = block_table(offsets, m, chunk, empty=True)
        kernels.multi_da_kernel[(tiles[0], blocks.shape[0], tiles[1])](
            ds, x, mask_bytes, out, spare, blocks, offsets, offsets if order is None else order, table, m, k, width,
            ds.stride(0), x.stride(0), stride_mask, chunk,
            ORDER=order is not None, DROP=drop, PAIRS=_pairs(x), EVEN=k % bk == 0,
            PRECISION=gpu.precision(x), BM=bm, BK=bk, BR=br, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        _sum(out, spare, blocks, offsets, table, m, k, width, chunk, drop)
    return out


def expand_(
    out: Tensor,
    s: Tensor,
    a: list[Tensor],
    table: Tensor,
    mask: Tensor | None,
    seeds: Tensor | None,
    order: Tensor | None,
    offsets: Tensor,
    drop: bool,
) -> None:
    """``lowmem::lora_multi_expand_``, in place on ``out`` ``[M, K]``."""
    arch = gpu.serves(out, *a, s)
    if arch is None:
        family.expand_reference(out, s, a, table, mask, seeds, order, offsets, drop)
        return
    if out.stride(1) != 1 and out.shape[1] != 1:
        copy = out.contiguous()
        expand_(copy, s, a, table, mask, seeds, order, offsets, drop)
        out.copy_(copy)
        return
    (m, k), width = out.shape, max(one.shape[0] for one in a)
    s = gpu.rows(s)
    small = gpu.small(out)
    br = configs.rank_block("masked_expand", arch, width, small)
    bm, bk, _, warps, stages = configs.tile_of_many("masked_expand", arch, br, small)
    with gpu.on(out.device):
        mask_bytes, stride_mask = _bits(out, mask, seeds, order, offsets, table, drop)
        stacked = _stack(a)
        blocks = block_table(offsets, m, bm)
        kernels.multi_expand_kernel[(blocks.shape[0], gpu.cdiv(k, bk))](
            out, s, stacked, mask_bytes, blocks, offsets, offsets if order is None else order, table, m, k,
            out.stride(0), s.stride(0), stacked.stride(0), stride_mask,
            ORDER=order is not None, DROP=drop, EVEN=k % bk == 0, PRECISION=gpu.precision(out), BM=bm, BK=bk, BR=br,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
