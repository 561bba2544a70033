"""Scales and minima of llama.cpp's blocks: the ones of least weighted squared error.

minimise  sum_i h_i (w_i - (s_g c_i - m_g))²  over codes c and over s_g = d a_g, m_g = e b_g, with
a, b small integers and d, e float16 of a super-block (K-quants); or over float16 s, m (Q4_1, Q5_1).
h_i is a column's importance, such as the Hessian's diagonal. Three stages:

1. every group for itself: from several shrunken ranges, codes and least-squares (s, m) by turns;
2. every super-block: d, e from several divisors of its largest scale and minimum, a, b rounded;
3. descent: (d, e) by least squares for given codes, then (a_g, b_g) over their neighbours, codes
   rounded anew each time; what does not lower the error is not taken.

llama.cpp (ggml-quants.c) does stages 1 and 2 once each, with an importance of its own.
Cost: about 3 · steps + 60 passes over the weight.

Legend: O rows, S super-blocks, G groups of a super-block (here), n weights of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pocketlm.core.scales import Scale, smallest_scale
from pocketlm.core.spec import SUB_SCALE_BITS, SUPER_BLOCK, QuantSpec

ROWS_AT_ONCE_BYTES = 64 << 20
DIVISORS = 6  # of the largest scale that stage 2 tries
ROUNDS = 3  # of stage 3
TURNS = 2  # of codes and least squares, for each range of stage 1
NEIGHBOURS = (-1, 0, 1)
TINY = 1e-30


@dataclass(frozen=True)
class Codes:
    """Which integers stand for weights, and for scales and minima.

    Attributes:
        low: The lowest level of a weight.
        high: The highest one.
        least: The lowest integer of a scale.
        most: The highest one, and that of a minimum.
        minima: Whether there are any.
    """

    low: int
    high: int
    least: int
    most: int
    minima: bool

    @classmethod
    def of(cls, spec: QuantSpec) -> Codes:
        """Those of a number format of type "k"."""
        sub = SUB_SCALE_BITS[spec.bits]
        if spec.symmetric:
            half = 1 << (sub - 1)
            return cls(spec.code_min, spec.code_max, -half, half - 1, False)
        return cls(0, (1 << spec.bits) - 1, 1, (1 << sub) - 1, True)


def block_scale(
    weight_OI: Tensor,
    spec: QuantSpec,
    importance_I: Tensor | None = None,
    *,
    smallest: float = 0.5,
    steps: int = 24,
) -> Scale:
    """The scales and minima of a weight as they are stored.

    Args:
        weight_OI: The weight, float32.
        spec: Its number format, of type "k".
        importance_I: A weight for each column's error; None: all alike.
        smallest: The strongest shrink of a group's range that is tried.
        steps: How many shrinks are tried; 0: the whole range, without any search.
    """
    rows, columns = weight_OI.shape
    at_once = max(1, ROWS_AT_ONCE_BYTES // (columns * 4 * 8))
    if importance_I is None or not bool((importance_I > 0).any()):
        importance_I = weight_OI.new_ones(columns)
    else:  # a column that no token excites still prefers its weight
        importance_I = importance_I.clamp(min=float(importance_I.mean()) * 1e-6)
    parts = [
        _some_rows(weight_OI[start : start + at_once], spec, importance_I, smallest, steps)
        for start in range(0, rows, at_once)
    ]
    fields = [
        torch.cat(tensors) if all(tensor is not None for tensor in tensors) else None
        for tensors in zip(*parts, strict=True)
    ]
    stored, outer, minimum, outer_minimum = fields
    assert stored is not None
    return Scale(spec.scale, stored, outer, None, minimum, outer_minimum)


def _some_rows(
    weight_OI: Tensor, spec: QuantSpec, importance_I: Tensor, smallest: float, steps: int
) -> tuple[Tensor | None, ...]:
    """Stored scales [O, G], their float16 [O, S], minima and their float16, of all groups."""
    rows, columns = weight_OI.shape
    size, codes = spec.group_size or columns, Codes.of(spec)
    width = SUPER_BLOCK if spec.scale == "k" else size
    shape = (rows, columns // width, width // size, size)
    weight_OSGn = weight_OI.reshape(shape)
    importance_SGn = importance_I.view(shape[1:])
    free = spec.scale == "float"  # minima of either sign, nothing shared
    scale, minimum = _each_group(weight_OSGn, importance_SGn, codes, smallest, steps, free=free)
    if free:
        scale, minimum = _halves(weight_OSGn, importance_SGn, scale, minimum, codes)
        return scale.half().view(rows, -1), None, minimum.half().view(rows, -1), None
    found = _super_blocks(weight_OSGn, importance_SGn, scale, minimum, codes, search=steps > 0)
    if steps:
        found = _descend(weight_OSGn, importance_SGn, found, codes)
    a, b = found.a.view(rows, -1), found.b.view(rows, -1)
    if not codes.minima:
        return a.to(torch.int8), found.d.half(), None, None
    return a.to(torch.int8), found.d.half(), b.to(torch.uint8), found.e.half()


def _levels(weight: Tensor, scale: Tensor, minimum: Tensor, codes: Codes) -> Tensor:
    """The nearest levels of weights for scales and minima that broadcast against them."""
    divisor = torch.where(scale.abs() < TINY, TINY, scale)
    return ((weight + minimum) / divisor).round_().clamp_(codes.low, codes.high)


def _error(
    weight: Tensor, importance: Tensor, scale: Tensor, minimum: Tensor, codes: Codes
) -> Tensor:
    """The weighted error of each group [O, S, G], codes rounded for it."""
    scale, minimum = scale[..., None], minimum[..., None]
    level = _levels(weight, scale, minimum, codes)
    return level.mul_(scale).sub_(minimum).sub_(weight).square_().mul_(importance).sum(-1)


def _each_group(
    weight: Tensor, importance: Tensor, codes: Codes, smallest: float, steps: int, *, free: bool
) -> tuple[Tensor, Tensor]:
    """Stage 1: scale and minimum of each group [O, S, G], unrounded."""
    high, low = weight.amax(-1), weight.amin(-1)
    if codes.minima and not free:
        high, low = high.clamp(min=0), low.clamp(max=0)
    span = codes.high - codes.low

    def start(share: float, flip: bool) -> tuple[Tensor, Tensor]:
        if codes.minima:
            return (high - low) * share / span, -low * share
        largest = torch.where(high > -low, high, low) * share
        return largest / (codes.high if flip else codes.low), torch.zeros_like(low)

    best = start(1.0, False)
    best_error = _error(weight, importance, *best, codes)
    shares = [1.05 - (1.05 - smallest) * step / max(1, steps) for step in range(steps)]
    for share in shares:
        for flip in (False,) if codes.minima else (False, True):
            scale, minimum = start(share, flip)
            for _ in range(TURNS):
                level = _levels(weight, scale[..., None], minimum[..., None], codes)
                fitted = _least_squares(weight, importance, level, codes, free=free)
                usable = fitted[0].abs() > TINY
                scale = torch.where(usable, fitted[0], scale)
                minimum = torch.where(usable, fitted[1], minimum)
            error = _error(weight, importance, scale, minimum, codes)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = (torch.where(better, scale, best[0]), torch.where(better, minimum, best[1]))
    return best


def _least_squares(
    weight: Tensor, importance: Tensor, level: Tensor, codes: Codes, *, free: bool
) -> tuple[Tensor, Tensor]:
    """The scale and minimum of each group that suit given levels."""
    of_level = importance * level
    qq, wq = (of_level * level).sum(-1), (of_level * weight).sum(-1)
    alone = wq / qq.clamp(min=TINY)
    if not codes.minima:
        return alone, torch.zeros_like(alone)
    total = importance.sum(-1)
    q, w = of_level.sum(-1), (importance * weight).sum(-1)
    determinant = total * qq - q * q
    safe = torch.where(determinant.abs() < TINY, TINY, determinant)
    scale, minimum = (total * wq - q * w) / safe, (q * wq - qq * w) / safe
    good = (determinant > 0) & (scale > 0)
    if not free:  # a minimum below zero has no code
        alone_where = good & (minimum < 0)
        scale = torch.where(alone_where, alone, scale)
        minimum = torch.where(alone_where, 0.0, minimum)
    return torch.where(good, scale, 0.0), torch.where(good, minimum, 0.0)


def _halves(
    weight: Tensor, importance: Tensor, scale: Tensor, minimum: Tensor, codes: Codes
) -> tuple[Tensor, Tensor]:
    """Float16 scales, and the float16 minima that suit them."""
    scale = _storable(scale)
    level = _levels(weight, scale[..., None], minimum[..., None], codes)
    total = importance.sum(-1).clamp(min=TINY)
    fitted = ((scale[..., None] * level - weight) * importance).sum(-1) / total
    one, other = minimum.half().float(), fitted.half().float()
    better = _error(weight, importance, scale, other, codes) < _error(
        weight, importance, scale, one, codes
    )
    return scale, torch.where(better, other, one)


def _storable(values: Tensor) -> Tensor:
    """Rounded to float16, and never zero."""
    least = smallest_scale(torch.float16)
    rounded = values.half().float()
    return torch.where(rounded.abs() < least, least, rounded)


@dataclass(frozen=True)
class Found:
    """Scales d·a and minima e·b: d, e [O, S] as float16 holds them, a, b [O, S, G] integers."""

    d: Tensor
    e: Tensor
    a: Tensor
    b: Tensor

    @property
    def scale(self) -> Tensor:
        """[O, S, G]."""
        return self.d[..., None] * self.a

    @property
    def minimum(self) -> Tensor:
        """[O, S, G]."""
        return self.e[..., None] * self.b

    def where(self, keep_OS: Tensor, other: Found) -> Found:
        """This one in the super-blocks where `keep_OS` is true, the other elsewhere."""
        keep_OS1 = keep_OS[..., None]
        return Found(
            torch.where(keep_OS, self.d, other.d),
            torch.where(keep_OS, self.e, other.e),
            torch.where(keep_OS1, self.a, other.a),
            torch.where(keep_OS1, self.b, other.b),
        )

    def error_OS(self, weight: Tensor, importance: Tensor, codes: Codes) -> Tensor:
        """The weighted error of each super-block."""
        return _error(weight, importance, self.scale, self.minimum, codes).sum(-1)


def round_scales(
    scale_OSG: Tensor, codes: Codes, divisor: int | None = None
) -> tuple[Tensor, Tensor]:
    """Scales as integers over a float16.

    Args:
        scale_OSG: The scales wanted.
        codes: The integers there are.
        divisor: Which integer the largest scale becomes; None: the one of largest magnitude.

    Returns:
        The float16 [O, S] in float32, and the integers, none of them zero.
    """
    places = scale_OSG.abs().argmax(-1, keepdim=True)
    largest_OS = scale_OSG.gather(-1, places)[..., 0]
    end = divisor or (codes.most if codes.minima else codes.least)
    d_OS = _storable(largest_OS / end)
    a_OSG = (scale_OSG / d_OS[..., None]).round_().clamp_(codes.least, codes.most)
    return d_OS, torch.where(a_OSG == 0, 1.0, a_OSG)


def rounded_blocks(scale_OG: Tensor, spec: QuantSpec) -> Scale:
    """Scales of a symmetric K-quant as they are stored, each the nearest to what is wanted."""
    codes = Codes.of(spec)
    groups = SUPER_BLOCK // (spec.group_size or SUPER_BLOCK)
    d_OS, a_OSG = round_scales(scale_OG.view(scale_OG.shape[0], -1, groups), codes)
    return Scale("k", a_OSG.view(scale_OG.shape).to(torch.int8), d_OS.half())


def _round_minima(minimum: Tensor, codes: Codes, divisor: int) -> tuple[Tensor, Tensor]:
    e = _storable(minimum.amax(-1) / divisor)
    return e, (minimum / e[..., None]).round_().clamp_(0, codes.most)


def _super_blocks(
    weight: Tensor,
    importance: Tensor,
    scale: Tensor,
    minimum: Tensor,
    codes: Codes,
    *,
    search: bool,
) -> Found:
    """Stage 2: integers and float16 for what stage 1 found."""
    end, best, best_error = codes.most if codes.minima else codes.least, None, None
    sign = 1 if end > 0 else -1
    for less in range(DIVISORS if search else 1):
        d, a = round_scales(scale, codes, end - sign * less)
        wanted = minimum
        if codes.minima and search:  # the minima that suit the rounded scales
            rounded = (d[..., None] * a)[..., None]
            level = _levels(weight, rounded, minimum[..., None], codes)
            fitted = ((rounded * level - weight) * importance).sum(-1)
            wanted = (fitted / importance.sum(-1).clamp(min=TINY)).clamp(min=0)
        for fewer in range(DIVISORS if codes.minima and search else 1):
            if codes.minima:
                e, b = _round_minima(wanted, codes, codes.most - fewer)
            else:
                e, b = torch.zeros_like(d), torch.zeros_like(a)
            found = Found(d, e, a, b)
            error = found.error_OS(weight, importance, codes)
            if best is None or best_error is None:
                best, best_error = found, error
                continue
            better = error < best_error
            best, best_error = found.where(better, best), torch.where(better, error, best_error)
    assert best is not None
    return best


def _descend(weight: Tensor, importance: Tensor, found: Found, codes: Codes) -> Found:
    """Stage 3: descent over (d, e), and over each group's integers."""
    for _ in range(ROUNDS):
        fitted = _fitted_halves(weight, importance, found, codes)
        better = fitted.error_OS(weight, importance, codes) < found.error_OS(
            weight, importance, codes
        )
        found = _neighbours(weight, importance, fitted.where(better, found), codes)
    return found


def _fitted_halves(weight: Tensor, importance: Tensor, found: Found, codes: Codes) -> Found:
    """(d, e) by least squares for the codes that the present ones give: w ≈ d (a c) - e b."""
    level = _levels(weight, found.scale[..., None], found.minimum[..., None], codes)
    x, y = level * found.a[..., None], found.b[..., None].expand_as(weight)

    def dot(one: Tensor, other: Tensor) -> Tensor:
        return (one * other * importance).sum((-1, -2))

    xx, xw = dot(x, x), dot(x, weight)
    alone = xw / xx.clamp(min=TINY)
    d, e = alone, found.e
    if codes.minima:
        yy, xy, yw = dot(y, y), dot(x, y), dot(y, weight)
        determinant = xx * yy - xy * xy
        safe = torch.where(determinant.abs() < TINY, TINY, determinant)
        both = determinant > 1e-6 * xx * yy
        d = torch.where(both, (yy * xw - xy * yw) / safe, (xw + found.e * xy) / xx.clamp(min=TINY))
        e = torch.where(both, (xy * xw - xx * yw) / safe, found.e)
    good = torch.isfinite(d) & torch.isfinite(e) & (xx > 0) & (d.abs() < 6e4) & (e.abs() < 6e4)
    d, e = torch.where(good, d, found.d), torch.where(good, e, found.e)
    return Found(_storable(d), e.half().float(), found.a, found.b)


def _neighbours(weight: Tensor, importance: Tensor, found: Found, codes: Codes) -> Found:
    """The best of each group's integers and those beside them."""
    best_a, best_b = found.a, found.b
    best = _error(weight, importance, found.scale, found.minimum, codes)
    for of_scale in NEIGHBOURS:
        for of_minimum in NEIGHBOURS if codes.minima else (0,):
            if of_scale == of_minimum == 0:
                continue
            a = (found.a + of_scale).clamp(codes.least, codes.most)
            a = torch.where(a == 0, found.a, a)
            b = (found.b + of_minimum).clamp(0, codes.most) if codes.minima else found.b
            error = _error(
                weight, importance, found.d[..., None] * a, found.e[..., None] * b, codes
            )
            better = error < best
            best = torch.where(better, error, best)
            best_a, best_b = torch.where(better, a, best_a), torch.where(better, b, best_b)
    return Found(found.d, found.e, best_a, best_b)
