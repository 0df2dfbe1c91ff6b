"""Divergences of maps as two Triton kernels, which write no map but the gradient.

A map is seen as (outer, n, rows), softmax over n: (B, C, H, W) over C is (B, C, H * W), and where n comes last, as in
(B, C, N), it is (B, N, C). Each side has three strides, so that no usual layout is copied. A program works on a tile
(some of n, some rows). What is computed is that of :mod:`lightning_kd.losses._dense`, in float32.

Where all of n fits into a tile, ``_pass`` gives the value in the forward pass, and in the backward pass the gradient,
already times what comes from above; nothing is kept in between. Where it does not, ``_scan`` first finds maximum, sum
and divergence of each row in one reading, and ``_pass`` takes them from there. To compute again what a gradient needs
is to read both maps twice and to write once, as it is to make it in the forward pass and to multiply it afterwards.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SECTOR = 32
"""Bytes that a GPU reads at once: so many at least where rows lie together (True, below), and not n."""
LONGEST = {False: 8192, True: 1024}
"""Up to which n a tile holds all of it."""
TILE = 4096
"""Elements of such a tile, unless it must be larger: 16 for each thread and side, for its registers."""
PART = {False: (2048, 1), True: (32, 64)}
"""Tile of (n, rows) where n is longer."""
CHUNK = 16
"""Tiles that one program of ``_scan`` reads; of few rows many programs are made."""
NOTHING = tl.constexpr(-3.4e38)  # both finite, so that differences are numbers, and exp of theirs is 0
START = tl.constexpr(-1.7e38)


@triton.jit
def _place(x, outer, column, row, stride_outer, stride_n, stride_row):
    # 64 bits: maps have more than 2^31 elements
    return x + outer * stride_outer + column.to(tl.int64)[:, None] * stride_n + row.to(tl.int64)[None, :] * stride_row


@triton.jit
def _rows(here, blocks, rows, tile_rows: tl.constexpr):
    """Return the program's outer index and rows, which of these there are, and which count."""
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * tile_rows + tl.arange(0, tile_rows)
    there = row < rows
    counts = there
    if here is not None:
        counts = tl.load(here + outer * rows + row, mask=there, other=0) != 0
    return outer, row, there, counts


@triton.jit
def _terms(log_s, log_t, beta, kind: tl.constexpr):
    """Return the divergence's terms, ``w`` and ``p_s``: the gradient in the logits is ``w - p_s * sum(w)``."""
    p_s, p_t = tl.exp(log_s), tl.exp(log_t)
    if kind == "forward":
        value, w = p_t * (log_t - log_s), -p_t
    elif kind == "reverse":
        value = p_s * (log_s - log_t)
        w = value
    else:
        a, b = log_t + tl.log(beta), log_s + tl.log(1 - beta)
        log_m = tl.maximum(a, b) + tl.log(1 + tl.exp(-tl.abs(a - b)))
        w = (1 - beta) * p_s * (log_s - log_m)
        value = beta * p_t * (log_t - log_m) + w
    return value, w, p_s


@triton.jit
def _pass(
    s, t, here, gradient, upstream, values, sums, statistics, scale, beta, n, rows, blocks, every,
    s_outer, s_n, s_row, t_outer, t_n, t_row, g_outer, g_n, g_row,
    kind: tl.constexpr, tile_n: tl.constexpr, tile_rows: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a tile or, without a place for it, its sum of the divergence, and of ``w`` for each row."""
    outer, row, there, counts = _rows(here, blocks, rows, tile_rows)
    column = tl.program_id(1) * tile_n + tl.arange(0, tile_n)
    exists = (column < n)[:, None]
    inside = exists & there[None, :]  # what does not count is read: loads by its mask would be of one number each
    valid = exists & counts[None, :]
    factor = tl.load(scale)
    log_s = tl.load(_place(s, outer, column, row, s_outer, s_n, s_row), mask=inside, other=0.0).to(tl.float32) * factor
    log_t = tl.load(_place(t, outer, column, row, t_outer, t_n, t_row), mask=inside, other=0.0).to(tl.float32) * factor
    log_s = tl.where(exists, tl.where(valid, log_s, 0.0), NOTHING)  # equal rows diverge by 0
    log_t = tl.where(exists, tl.where(valid, log_t, 0.0), NOTHING)
    of_row = outer * rows + row
    if statistics is None:
        log_s, log_t = log_s - tl.max(log_s, 0)[None, :], log_t - tl.max(log_t, 0)[None, :]
        log_s -= tl.log(tl.sum(tl.exp(log_s), 0))[None, :]
        log_t -= tl.log(tl.sum(tl.exp(log_t), 0))[None, :]
    else:  # the maximum first: it may be large, and the logarithm of the sum small
        log_s -= tl.load(statistics + of_row, mask=there, other=0.0)[None, :]
        log_s -= tl.load(statistics + every + of_row, mask=there, other=0.0)[None, :]
        log_t -= tl.load(statistics + 2 * every + of_row, mask=there, other=0.0)[None, :]
        log_t -= tl.load(statistics + 3 * every + of_row, mask=there, other=0.0)[None, :]
    value, w, p_s = _terms(log_s, log_t, beta, kind)
    w = tl.where(valid, w, 0.0)
    if gradient is None:
        program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        tl.store(values + program, tl.sum(tl.where(valid, value, 0.0)))
        if sums is not None:
            tl.store(sums + tl.program_id(1) * every + of_row, tl.sum(w, 0), mask=there)
    else:
        if statistics is None:  # noqa: SIM108  # in an expression the compiler would look into both sides
            total = tl.sum(w, 0)
        else:
            total = tl.load(statistics + 4 * every + of_row, mask=there, other=0.0)
        slope = tl.where(valid, (w - p_s * total[None, :]) * tl.load(upstream) * factor, 0.0)
        tl.store(_place(gradient, outer, column, row, g_outer, g_n, g_row), slope, mask=inside)


@triton.jit
def _step(x, top, total):
    """Return maximum and sum of exp with one more element, what the old sum and the new one were scaled by: one exp."""
    smaller = tl.exp(-tl.abs(x - top))
    kept, new = tl.where(x > top, smaller, 1.0), tl.where(x > top, 1.0, smaller)
    return tl.maximum(top, x), total * kept + new, kept, new


@triton.jit
def _scan(
    x, y, here, parts, scale, n, rows, blocks, every, x_outer, x_n, x_row, y_outer, y_n, y_row,
    chunk: tl.constexpr, tile_n: tl.constexpr, tile_rows: tl.constexpr,
):  # fmt: skip
    """Write the maxima of a chunk of rows, the sums of exp, and what gives ``KL(p_x || p_y)``.

    That is ``apart = sum(exp(x - max x) * ((x - max x) - (y - max y)))``, which a shift of all logits does not change.
    Each place in the tile goes along alone, through all tiles of the chunk: they meet once, at the end.
    """
    outer, row, there, counts = _rows(here, blocks, rows, tile_rows)
    top_x, top_y = tl.full((tile_n, tile_rows), START, tl.float32), tl.full((tile_n, tile_rows), START, tl.float32)
    sum_x, sum_y = tl.zeros((tile_n, tile_rows), tl.float32), tl.zeros((tile_n, tile_rows), tl.float32)
    apart = tl.zeros((tile_n, tile_rows), tl.float32)
    factor = tl.load(scale)
    for tile in range(chunk):
        column = (tl.program_id(1) * chunk + tile) * tile_n + tl.arange(0, tile_n)
        inside = (column < n)[:, None] & there[None, :]
        valid = inside & counts[None, :]
        a = tl.load(_place(x, outer, column, row, x_outer, x_n, x_row), mask=inside, other=0.0).to(tl.float32) * factor
        b = tl.load(_place(y, outer, column, row, y_outer, y_n, y_row), mask=inside, other=0.0).to(tl.float32) * factor
        a, b = tl.where(valid, a, NOTHING), tl.where(valid, b, NOTHING)
        was_x, was_y, was_sum = top_x, top_y, sum_x
        top_x, sum_x, kept, new = _step(a, top_x, sum_x)
        top_y, sum_y, _, _ = _step(b, top_y, sum_y)
        apart = kept * (apart + was_sum * ((was_x - top_x) - (was_y - top_y))) + new * ((a - top_x) - (b - top_y))
    best_x, best_y = tl.max(top_x, 0), tl.max(top_y, 0)
    down_x, down_y = top_x - best_x[None, :], top_y - best_y[None, :]
    size = tl.num_programs(1) * every
    place = parts + tl.program_id(1) * every + outer * rows + row
    tl.store(place, best_x, mask=there)
    tl.store(place + size, tl.sum(tl.exp(down_x) * sum_x, 0), mask=there)
    tl.store(place + 2 * size, best_y, mask=there)
    tl.store(place + 3 * size, tl.sum(tl.exp(down_y) * sum_y, 0), mask=there)
    tl.store(place + 4 * size, tl.sum(tl.exp(down_x) * (apart + sum_x * (down_x - down_y)), 0), mask=there)


class Divergence:
    """The divergence of two maps, and its gradient; see :func:`lightning_kd.losses._dense.divergence`."""

    def __init__(
        self, student: Tensor, teacher: Tensor, temperature: float | Tensor, beta: float, dim: int, here: Tensor | None
    ) -> None:
        self.shape, self.dim = student.shape, dim % student.ndim
        self.s, self.t = _view(student, self.dim), _view(teacher, self.dim)
        self.here = None if here is None else here.contiguous()
        self.kind = {0.0: "forward", 1.0: "reverse"}.get(beta, "jsd")
        # not by a number on the host: a temperature on the device would have to be waited for
        self.scale = (torch.ones((), device=student.device) / temperature).float()
        self.beta = float(beta)
        outer, n, rows = self.s.shape
        strided = self.s.stride(1) != 1
        self.whole = n <= LONGEST[strided]
        tile_n, tile_rows = PART[strided]
        if self.whole:
            tile_n = triton.next_power_of_2(n)
            tile_rows = max(TILE // tile_n, SECTOR // self.s.element_size() if strided else 1)
        tile_rows = min(tile_rows, triton.next_power_of_2(rows))
        self.grid = outer * triton.cdiv(rows, tile_rows), triton.cdiv(n, tile_n)
        self.sizes = n, rows, triton.cdiv(rows, tile_rows), outer * rows
        threads = tile_n * tile_rows // (16 if self.whole else 8)
        self.tiles: dict[str, Any] = {
            "tile_n": tile_n,
            "tile_rows": tile_rows,
            "num_warps": max(1, min(16, threads // 32)),
            "enable_fp_fusion": True,  # as nvcc does; what Triton does unasked depends on its version
        }

    def value(self) -> tuple[Tensor, Tensor | None]:
        """Return the sum, and of rows that fit into no tile what the gradient needs to know of them."""
        statistics = None if self.whole else self._statistics()
        if statistics is not None and self.kind != "jsd":
            total = statistics[4].sum()
            if self.kind == "forward":
                statistics[4] = -1.0  # the sum of w = -p_t
            return total, statistics
        values = self.s.new_empty(math.prod(self.grid), dtype=torch.float32)
        sums = None if statistics is None else values.new_empty(self.grid[1], self.sizes[-1])
        self._run(values=values, sums=sums, statistics=statistics)
        if statistics is not None and sums is not None:
            statistics[4] = sums.sum(0)
        return values.sum(), statistics

    def gradient(self, upstream: Tensor, statistics: Tensor | None) -> Tensor:
        """Return the gradient in the student's logits, in their type and layout, times a number from above."""
        made = torch.empty_like(self.s)
        self._run(gradient=made, upstream=upstream, statistics=statistics)
        if self.dim < len(self.shape) - 1:
            return made.view(self.shape)
        *before, rows, n = self.shape
        return made.view(*before, n, rows).transpose(-2, -1)

    def _run(self, **places: Tensor | None) -> None:
        named = (places.get(name) for name in ("gradient", "upstream", "values", "sums", "statistics"))
        made = places.get("gradient")
        strides = *self.s.stride(), *self.t.stride(), *((0, 0, 0) if made is None else made.stride())
        with torch.cuda.device_of(self.s):
            _pass[self.grid](
                self.s, self.t, self.here, *named, self.scale, self.beta, *self.sizes, *strides,
                kind=self.kind, **self.tiles,
            )  # fmt: skip

    def _statistics(self) -> Tensor:
        """Return maxima and logarithms of sums, the student's first, and KL divergences, of (outer * rows) each."""
        x, y = (self.s, self.t) if self.kind == "reverse" else (self.t, self.s)
        chunk = min(CHUNK, self.grid[1])
        chunks = triton.cdiv(self.grid[1], chunk)
        parts = x.new_empty(5, chunks, self.sizes[-1], dtype=torch.float32)
        with torch.cuda.device_of(x):
            _scan[self.grid[0], chunks](
                x, y, self.here, parts, self.scale, *self.sizes, *x.stride(), *y.stride(),
                chunk=chunk, **self.tiles,
            )  # fmt: skip
        top_x, sum_x, top_y, sum_y, apart = parts
        best_x, best_y = top_x.amax(0), top_y.amax(0)
        down_x, down_y = top_x - best_x, top_y - best_y
        apart = (down_x.exp() * (apart + sum_x * (down_x - down_y))).sum(0)
        sum_x, sum_y = (down_x.exp() * sum_x).sum(0), (down_y.exp() * sum_y).sum(0)
        kl = apart / sum_x - sum_x.log() + sum_y.log()
        of_x, of_y = (best_x, sum_x.log()), (best_y, sum_y.log())
        found = torch.stack([*of_x, *of_y, kl] if self.kind == "reverse" else [*of_y, *of_x, kl])
        return found if self.here is None else found.masked_fill_(~self.here.flatten(), 0.0)


def _view(x: Tensor, dim: int) -> Tensor:
    """Return a map as (outer, n, rows): a copy of such layouts only as three strides cannot tell."""
    if dim == x.ndim - 1:
        x, dim = x.transpose(dim - 1, dim), dim - 1
    return x.reshape(math.prod(x.shape[:dim]), x.shape[dim], -1)
