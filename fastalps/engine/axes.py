"""Convolutions along one axis as bilinear algorithms: few products, sums before and after.

A 3-tap convolution of a row is ``results = A @ (sum of (B @ inputs) * (G @ taps))``: values are
small sums of inputs, products multiply values by filters (sums of taps), results are small sums of
products. The direct algorithm has a product for each result and the inputs as values; it leaves out
taps that fall on the zero border. Minimal algorithms (S. Winograd, Arithmetic Complexity of
Computations, 1980) need fewer multiplications: F(m, r) gives m results of r taps for m + r - 1
products. In two dimensions the algorithms of both axes nest, so the savings multiply.

B and A are small integers; G has halves to twenty-fourths, computed once in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

Terms = tuple[tuple[int, int], ...]  # (index, integer factor) or (value, filter)
Taps = tuple[Fraction, ...]

_ZERO, _ONE, _HALF = Fraction(0), Fraction(1), Fraction(1, 2)
FIRST, MIDDLE, LAST = (
    tuple(_ONE if tap == place else _ZERO for tap in range(3)) for place in range(3)
)


class Result(NamedTuple):
    """One output: its index, and its (product, factor) terms."""

    output: int
    terms: Terms


class Tile(NamedTuple):
    """Results that share an algorithm of `ALGORITHMS`, and where its parts stand in their band."""

    algorithm: str
    inputs: tuple[int | None, ...]  # None: zero
    first_value: int
    first_product: int
    first_result: int
    step: int  # from one of its results to the next


@dataclass
class Band:
    """A part of an axis that is computed at once: consecutive results and all that they need."""

    values: list[Terms] = field(default_factory=list)  # (input, factor)
    products: list[Terms] = field(default_factory=list)  # (value, filter)
    results: list[Result] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)

    def value(self, index: int) -> int:
        """The value that is one input as it is."""
        if ((index, 1),) not in self.values:
            self.values.append(((index, 1),))
        return self.values.index(((index, 1),))


@dataclass
class Axis:
    """An algorithm for a whole axis: `inputs` pixels to `outputs` pixels, in bands."""

    inputs: int
    outputs: int
    filters: list[Taps] = field(default_factory=list)
    bands: list[Band] = field(default_factory=list)

    def filter(self, taps: Taps) -> int:
        if taps not in self.filters:
            self.filters.append(taps)
        return self.filters.index(taps)

    def multiplications(self) -> int:
        """Products of one value and one filter."""
        return sum(len(terms) for band in self.bands for terms in band.products)

    def sizes(self) -> tuple[int, int, int, int]:
        """How many values there are, and inputs as they are among them; how many products, and
        results among them."""
        values = [terms for band in self.bands for terms in band.values]
        results = [result.terms for band in self.bands for result in band.results]
        return (
            len(values),
            sum(len(terms) == 1 and terms[0][1] == 1 for terms in values),
            sum(len(band.products) for band in self.bands),
            sum(len(terms) == 1 for terms in results),
        )


def sums(rows: Axis, columns: Axis) -> tuple[int, int]:
    """Of a layer: how many values are sums, and how many products are parts of one."""
    values, inputs, products, results = (
        row * column for row, column in zip(rows.sizes(), columns.sizes(), strict=True)
    )
    return values - inputs, products - results


class Algorithm(NamedTuple):
    """Matrices of F(m, r); csrc/cpu/engine_transforms.inl has the first and the last as code."""

    before: Sequence[Sequence[int]]  # B: values of m + r - 1 inputs
    filters: Sequence[Sequence[Fraction | int]]  # G: filters of r taps
    after: Sequence[Sequence[int]]  # A: m results of the products


_POINTS_0_1 = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, -1, 0, 1))
ALGORITHMS = {
    "F(2,2)": Algorithm(
        ((1, -1, 0), (0, 2, 0), (0, -1, 1)),
        ((1, 0), (_HALF, _HALF), (0, 1)),
        ((1, 1, 0), (0, 1, 1)),
    ),
    "F(3,2)": Algorithm(
        _POINTS_0_1,
        ((1, 0), (_HALF, _HALF), (_HALF, -_HALF), (0, 1)),
        ((1, 1, 1, 0), (0, 1, -1, 0), (0, 1, 1, 1)),
    ),
    "F(2,3)": Algorithm(
        _POINTS_0_1,
        ((1, 0, 0), (_HALF, _HALF, _HALF), (_HALF, -_HALF, _HALF), (0, 0, 1)),
        ((1, 1, 1, 0), (0, 1, -1, 1)),
    ),
    "F(4,3)": Algorithm(
        (
            (4, 0, -5, 0, 1, 0),
            (0, -4, -4, 1, 1, 0),
            (0, 4, -4, -1, 1, 0),
            (0, -2, -1, 2, 1, 0),
            (0, 2, -1, -2, 1, 0),
            (0, 4, 0, -5, 0, 1),
        ),
        (
            (Fraction(1, 4), 0, 0),
            (Fraction(-1, 6), Fraction(-1, 6), Fraction(-1, 6)),
            (Fraction(-1, 6), Fraction(1, 6), Fraction(-1, 6)),
            (Fraction(1, 24), Fraction(1, 12), Fraction(1, 6)),
            (Fraction(1, 24), Fraction(-1, 12), Fraction(1, 6)),
            (0, 0, 1),
        ),
        ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
    ),
}
# F(3, 2) with a product of its own for the middle result, which has no other to itself.
ALGORITHMS["F(3,2)+1"] = ALGORITHMS["F(3,2)"]._replace(
    after=((1, 1, 1, 0, 0), (0, 1, -1, 0, 1), (0, 1, 1, 1, 0))
)


def _mix(weights: Sequence[Fraction | int], taps: Sequence[Taps]) -> Taps:
    return tuple(
        sum((Fraction(w) * tap[i] for w, tap in zip(weights, taps, strict=True)), _ZERO)
        for i in range(3)
    )


def _filtered(
    axis: Axis,
    band: Band,
    inputs: Sequence[int | None],
    taps: Sequence[Taps],
    middle: Sequence[int] | None = None,
) -> list[Terms]:
    """Terms of the results ``y[j] = sum over r of taps[r] * x[inputs[j + r]]`` by F(m, r).

    An input that is None is zero. With `middle`, ``MIDDLE * x[middle[j]]`` is added to result j.
    The tile that is noted belongs to the next results of the band.
    """
    name = f"F({len(inputs) - len(taps) + 1},{len(taps)})"
    if middle is not None and name == "F(3,2)":
        name = "F(3,2)+1"
    before, filters, after = ALGORITHMS[name]
    first_value, first_product = len(band.values), len(band.products)
    for weights, mix in zip(before, filters, strict=True):
        pairs = zip(inputs, weights, strict=True)
        band.products.append(((len(band.values), axis.filter(_mix(mix, taps))),))
        band.values.append(tuple((index, w) for index, w in pairs if index is not None and w))
    if middle is not None:
        # Into a product that no other result has.
        own = {"F(2,2)": (0, 2), "F(3,2)+1": (0, None, 3)}[name]
        for index, place in zip(middle, own, strict=True):
            term = (band.value(index), axis.filter(MIDDLE))
            if place is None:
                band.products.append((term,))
            else:
                band.products[first_product + place] += (term,)
    step = 1 if len(taps) == 3 or middle is not None else 2
    first_result = len(band.results) + step - 1
    band.tiles.append(Tile(name, tuple(inputs), first_value, first_product, first_result, step))
    return [tuple((first_product + p, w) for p, w in enumerate(row) if w) for row in after]


def _single(axis: Axis, band: Band, terms: Iterable[tuple[int, Taps]]) -> Terms:
    """One product with a term for each (input, taps): the direct algorithm."""
    band.products.append(tuple((band.value(i), axis.filter(taps)) for i, taps in terms))
    return ((len(band.products) - 1, 1),)


def _tiles(count: int, sizes: Sequence[int]) -> list[int]:
    """Cuts `count` results into tiles of the largest sizes, without single ones where possible."""
    tiles = []
    while count > 0:
        fits = [size for size in sizes if size <= count]
        if not fits:
            tiles.append(1)
        elif count - fits[0] == 1 and len(sizes) > 1 and sizes[1] * 2 == count:
            tiles.append(sizes[1])
        else:
            tiles.append(fits[0])
        count -= tiles[-1]
    return tiles


def _bands(starts: Sequence[tuple[int, int]], limit: int) -> list[list[tuple[int, int]]]:
    """Groups tiles (start, count) into bands of at most `limit` results, evenly."""
    total = sum(count for _, count in starts)
    size = -(-total // -(-total // limit))
    groups: list[list[tuple[int, int]]] = [[]]
    for start, count in starts:
        if groups[-1] and sum(c for _, c in groups[-1]) + count > size:
            groups.append([])
        groups[-1].append((start, count))
    return groups


def _tiled(first: int, count: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    starts = []
    for size in _tiles(count, sizes):
        starts.append((first, size))
        first += size
    return starts


def point() -> Axis:
    """One pixel to one pixel: what a dense layer is along both axes."""
    axis, band = Axis(1, 1), Band()
    band.results.append(Result(0, _single(axis, band, [(0, (_ONE,))])))
    axis.bands.append(band)
    return axis


def strided(inputs: int, minimal: bool, limit: int) -> Axis:
    """Three taps, stride 2, padding 1: ``y[o] = sum over k of w[k] x[2 o + k - 1]``.

    The middle tap meets the even inputs, the outer two the odd ones, which makes a 2-tap filter.
    """
    outputs = (inputs + 1) // 2
    axis = Axis(inputs, outputs)
    whole = max(0, inputs // 2 - 1)  # results 1 to whole have all three taps
    tiles = [(0, 1), *_tiled(1, whole, (3, 2) if minimal else ())]
    if outputs > whole + 1:
        tiles.append((outputs - 1, 1))
    for group in _bands(tiles, limit):
        band = Band()
        for start, count in group:
            if count == 1:
                taps = [(2 * start + k - 1, tap) for k, tap in enumerate((FIRST, MIDDLE, LAST))]
                terms = _single(axis, band, [(i, tap) for i, tap in taps if 0 <= i < inputs])
                band.results.append(Result(start, terms))
                continue
            odd = [2 * o - 1 for o in range(start, start + count + 1)]
            even = [2 * o for o in range(start, start + count)]
            results = _filtered(axis, band, odd, (FIRST, LAST), even)
            band.results += [Result(start + j, terms) for j, terms in enumerate(results)]
        axis.bands.append(band)
    return axis


def transposed(inputs: int, outputs: int, minimal: bool, limit: int) -> Axis:
    """The transpose of `strided`: ``y[2 i + k - 1] += w[k] x[i]``, outputs cropped.

    Even results have the middle tap of one input, odd ones the last tap of it and the first of the
    next: two sub-pixel phases.
    """
    axis = Axis(inputs, outputs)
    whole = min(inputs - 1, outputs // 2)  # odd results with two taps
    tiles = _tiled(0, whole, (3, 2) if minimal else ())
    tiles += [(i, 1) for i in range(whole, inputs)]
    for group in _bands(tiles, max(1, limit // 2)):
        band = Band()
        for start, count in group:
            numbers = range(start, start + count)
            even = [_single(axis, band, [(i, MIDDLE)]) for i in numbers]
            if count == 1:
                near = [(start, LAST), (start + 1, FIRST)]
                odd = [_single(axis, band, [(i, tap) for i, tap in near if i < inputs])]
                if 2 * start + 1 >= outputs:
                    odd = []
                    band.products.pop()
            else:
                odd = _filtered(axis, band, range(start, start + count + 1), (LAST, FIRST))
            for j, i in enumerate(numbers):
                band.results.append(Result(2 * i, even[j]))
                if j < len(odd):
                    band.results.append(Result(2 * i + 1, odd[j]))
        axis.bands.append(band)
    return axis


def same(size: int, minimal: bool, limit: int) -> Axis:
    """Three taps, stride 1, transposed: ``y[o] = sum over k of w[k] x[o + 1 - k]``."""
    axis = Axis(size, size)
    tiles = _tiled(0, size, (4, 2) if minimal else ())
    for group in _bands(tiles, limit):
        band = Band()
        for start, count in group:
            inputs = [i if 0 <= i < size else None for i in range(start - 1, start + count + 1)]
            taps = (LAST, MIDDLE, FIRST)
            if count == 1:
                pairs = zip(inputs, taps, strict=True)
                results = [_single(axis, band, [(i, tap) for i, tap in pairs if i is not None])]
            else:
                results = _filtered(axis, band, inputs, taps)
            band.results += [Result(start + j, terms) for j, terms in enumerate(results)]
        axis.bands.append(band)
    return axis


def pooled(inputs: int) -> Axis:
    """`strided` and the sum of all its results in one: each tap meets the sum of what it met.

    Exact, as both are linear; the convolution's work falls by the number of its results.
    """
    axis, band = Axis(inputs, 1), Band()
    terms = []
    for k, tap in enumerate((FIRST, MIDDLE, LAST)):
        met = [2 * o + k - 1 for o in range((inputs + 1) // 2)]
        met = [i for i in met if 0 <= i < inputs]
        if met:
            terms.append((len(band.values), axis.filter(tap)))
            band.values.append(tuple((i, 1) for i in met))
    band.products.append(tuple(terms))
    band.results.append(Result(0, ((0, 1),)))
    axis.bands.append(band)
    return axis
