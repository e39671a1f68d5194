"""Triton device functions: what every program asks about the batch's rows, without a host read.

A batch has tens to hundreds of rows, so a program reads the whole table (16 bytes a row, from L2)
faster than a separate launch could prepare it. Importing this file imports Triton.

Shapes: B rows (segments), R rows of a block of the table.
"""

# Triton exists for Linux only, and its functions are not the Python that pyright takes them for.
# pyright: reportMissingImports=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import triton
import triton.language as tl


@triton.jit
def row_scales(segments, starts, ends, rows, ACC: tl.constexpr, BLOCK_R: tl.constexpr):
    """1 / (2 * number of valid labels) for starts and ends; 0 where no label is valid.

    A side's mean over its valid rows, halved: the weight of one row in the loss.
    """
    start_R = tl.zeros([BLOCK_R], tl.int32)
    end_R = tl.zeros([BLOCK_R], tl.int32)
    for first in range(0, rows, BLOCK_R):
        row_R = first + tl.arange(0, BLOCK_R)
        real_R = row_R < rows
        length_R = tl.load(segments + row_R * 2 + 1, mask=real_R, other=0)
        label_R = tl.load(starts + row_R, mask=real_R, other=-1)
        start_R += ((label_R >= 0) & (label_R < length_R)).to(tl.int32)
        label_R = tl.load(ends + row_R, mask=real_R, other=-1)
        end_R += ((label_R >= 0) & (label_R < length_R)).to(tl.int32)
    start_count = tl.sum(start_R, 0)
    end_count = tl.sum(end_R, 0)
    start_scale = tl.where(start_count > 0, 0.5 / tl.maximum(start_count, 1).to(ACC), 0.0)
    end_scale = tl.where(end_count > 0, 0.5 / tl.maximum(end_count, 1).to(ACC), 0.0)
    return start_scale, end_scale


@triton.jit
def row_extent(segments, row, tokens):
    """Offset and length of one row, int64, cut so that nothing outside the T tokens is touched.

    A segment that reaches outside is an error of the caller, whom we cannot ask without a host
    read; the result is then meaningless, but no foreign memory is read or written.
    """
    offset = tl.load(segments + row * 2).to(tl.int64)
    length = tl.load(segments + row * 2 + 1).to(tl.int64)
    length = tl.where(offset >= 0, tl.minimum(length, tokens - offset), 0)
    return tl.maximum(offset, 0), tl.maximum(length, 0)


@triton.jit
def gap_after(segments, rows, end, tokens, BLOCK_R: tl.constexpr):
    """Where the first non-empty segment at or behind token `end` begins; `tokens` if none does."""
    nearest_R = tl.full([BLOCK_R], 0, tl.int64) + tokens
    for first in range(0, rows, BLOCK_R):
        row_R = first + tl.arange(0, BLOCK_R)
        real_R = row_R < rows
        offset_R = tl.load(segments + row_R * 2, mask=real_R, other=0).to(tl.int64)
        length_R = tl.load(segments + row_R * 2 + 1, mask=real_R, other=0)
        behind_R = (length_R > 0) & (offset_R >= end)
        nearest_R = tl.minimum(nearest_R, tl.where(behind_R, offset_R, nearest_R))
    return tl.min(nearest_R, 0)


@triton.jit
def find_tile(segments, rows, slot, TILE: tl.constexpr, BLOCK_R: tl.constexpr):
    """The row and the tile within that row which work slot `slot` stands for.

    Rows are cut into tiles of TILE tokens and the tiles numbered through. Returns row == rows for
    a slot behind the last tile: the grid is an upper bound, since lengths stay on the device.
    """
    passed_R = tl.zeros([BLOCK_R], tl.int32)
    before_R = tl.zeros([BLOCK_R], tl.int32)
    sum_so_far = tl.sum(before_R, 0)
    for first in range(0, rows, BLOCK_R):
        row_R = first + tl.arange(0, BLOCK_R)
        real_R = row_R < rows
        length_R = tl.load(segments + row_R * 2 + 1, mask=real_R, other=0)
        tiles_R = ((tl.maximum(length_R, 0) + TILE - 1) // TILE).to(tl.int32)
        passed_here_R = real_R & (sum_so_far + tl.cumsum(tiles_R, 0) <= slot)
        passed_R += passed_here_R.to(tl.int32)
        before_R += tl.where(passed_here_R, tiles_R, 0)
        sum_so_far += tl.sum(tiles_R, 0)
    return tl.sum(passed_R, 0), slot - tl.sum(before_R, 0)
