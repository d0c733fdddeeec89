"""Deliberately broken pieces of the kernels over many adapters; `test_interpret_lora_multi.py` shows that
its checks fail.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowmem.triton_kernels.lora_kernels import shrink_rows


@triton.jit
def shrink_rows_by_place(
    x_ptr, a_ptr, bits_ptr, seed_ptr, row, drawn, start, stop, r0, M, K, R, stride_x, stride_a, stride_bits, threshold,
    child, DROP: tl.constexpr, SAVE: tl.constexpr, PAIRS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The random map is asked by the row's number in the batch, not in its segment."""
    return shrink_rows(
        x_ptr, a_ptr, bits_ptr, seed_ptr, row, row, start, stop, r0, M, K, R, stride_x, stride_a, stride_bits,
        threshold, child, DROP, SAVE, PAIRS, EVEN, PRECISION, BM, BK, BR,
    )  # fmt: skip


@triton.jit
def number_of_another(table_ptr, j, COLUMN: tl.constexpr):
    """Adapter 0's number for everyone."""
    return tl.load(table_ptr + COLUMN).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def rows_at_without_order(order_ptr, position, stop, M, ORDER: tl.constexpr):
    """Positions taken for rows."""
    return tl.where(position < stop, position, M)


@triton.jit
def segment_without_end(blocks_ptr, block, offsets_ptr, M):
    """A segment's last block goes on into the next segment."""
    j = tl.load(blocks_ptr + block.to(tl.int64) * 2)
    start = tl.load(blocks_ptr + block.to(tl.int64) * 2 + 1)
    return j, start, tl.load(offsets_ptr + tl.maximum(j, 0)), tl.cast(M, tl.int64)
