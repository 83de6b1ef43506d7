"""How one axis of a tensor moves through operations that only rearrange elements.

A `Track` says: along `axis` of a value, position p belongs to coordinate ``index[p]`` of the
axis where the track began (a norm's features, a weight's columns), or to none (-1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

from normconvert.ir.graph import Argument, Node, Ref, Size

Shape: TypeAlias = "tuple[Size, ...]"

_LONGEST = 1 << 22  # elements that a reshape may mix before the track is given up


@dataclass(frozen=True, slots=True)
class Track:
    """See the module's docstring. `index` is a range wherever possible."""

    axis: int
    index: Sequence[int]

    def __hash__(self) -> int:
        """Without a look at the index, which may have one entry for every row of all experts."""
        return hash((self.axis, len(self.index)))


def move(
    node: Node, position: int, track: Track, before: Shape, after: tuple[Shape, ...]
) -> tuple[Track | None, ...] | None:
    """Where `track`, on the input at `position`, is on each output of `node`.

    `before` is the input's shape, `after` the outputs'. None as a whole if `node` does more
    than rearrange; None for an output on which the axis can no longer be told.
    """
    if position > 0:
        return None
    if node.op in _SAME:
        moved: tuple[Track | None, ...] = (track,)
    elif node.op in _RESHAPES:
        moved = (_reshape(track, before, after[0]),)
    elif node.op in _MOVERS:
        moved = _MOVERS[node.op](node, track, before, after)
    else:
        return None
    return tuple(
        found if found is not None and shape[found.axis] == len(found.index) else None
        for found, shape in zip(moved, after, strict=True)
    )


_Mover: TypeAlias = "Callable[[Node, Track, Shape, tuple[Shape, ...]], tuple[Track | None, ...]]"

_SAME = frozenset({"alias", "clone", "contiguous", "detach", "lift_fresh", "_to_copy"})
_RESHAPES = frozenset({"view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze"})


def _reshape(track: Track, before: Shape, after: Shape) -> Track | None:
    """Follow an axis through a reshape: within the smallest group of axes that mix."""
    group = _group(before, after, track.axis)
    if group is None:
        return None
    (first, last), (out_first, out_last) = group
    mixed, into = before[first:last], after[out_first:out_last]
    if not all(isinstance(size, int) for size in (*mixed, *into)):
        return None
    sizes = [size for size in mixed if isinstance(size, int)]
    if prod(sizes) > _LONGEST:
        return None
    inner = prod(sizes[track.axis - first + 1 :])
    outer = prod(sizes[: track.axis - first])
    flat: Sequence[int] = track.index
    if inner > 1:
        flat = tuple(coordinate for coordinate in flat for _ in range(inner))
    if outer > 1:
        flat = tuple(flat) * outer
    stride = 1
    for axis in reversed(range(out_first, out_last)):
        size = after[axis]
        assert isinstance(size, int)
        if size > 1 or len(flat) == 1:
            index = flat[: stride * size : stride]
            repeats = len(flat) // (stride * size)
            spread = index if stride == 1 else tuple(c for c in index for _ in range(stride))
            if (repeats == 1 and spread == flat) or tuple(spread) * repeats == tuple(flat):
                return Track(axis, index)
        stride *= size
    return None


def _group(
    before: Shape, after: Shape, axis: int
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The axes of `before` that mix with `axis`, and the axes of `after` that they become."""
    start = out_start = 0
    while start < len(before):
        end, out_end = start + 1, out_start
        while (taken := _product(before[start:end])) != (
            made := _product(after[out_start:out_end])
        ):
            if made[0] < taken[0] or len(made[1]) < len(taken[1]):
                out_end += 1
            else:
                end += 1
            if end > len(before) or out_end > len(after):
                return None
        if axis < end:
            return (start, end), (out_start, out_end)
        start, out_start = end, out_end
    return None


def _product(shape: Shape) -> tuple[int, tuple[str, ...]]:
    known = prod(size for size in shape if isinstance(size, int))
    return known, tuple(sorted(size for size in shape if isinstance(size, str)))


def _transpose(
    node: Node, track: Track, before: Shape, after: tuple[Shape, ...]
) -> tuple[Track | None, ...]:
    first, second = _axis(node.argument("dim0"), before), _axis(node.argument("dim1"), before)
    swapped = {first: second, second: first}
    return (Track(swapped.get(track.axis, track.axis), track.index),)


def _t(
    node: Node, track: Track, before: Shape, after: tuple[Shape, ...]
) -> tuple[Track | None, ...]:
    return (Track(len(before) - 1 - track.axis, track.index),)


def _permute(
    node: Node, track: Track, before: Shape, after: tuple[Shape, ...]
) -> tuple[Track | None, ...]:
    order = [_axis(dim, before) for dim in _tuple(node.argument("dims"))]
    return (Track(order.index(track.axis), track.index),)


def _expand(
    node: Node, track: Track, before: Shape, after: tuple[Shape, ...]
) -> tuple[Track | None, ...]:
    axis = track.axis + len(after[0]) - len(before)
    return (Track(axis, track.index) if after[0][axis] == before[track.axis] else None,)


def _repeat(
    node: Node, track: Track, before: Shape, after: tuple[Shape, ...]
) -> tuple[Track | None, ...]:
    times = _tuple(node.argument("repeats"))
    axis = track.axis + len(times) - len(before)
    count = times[axis]
    if not isinstance(count, int):
        return (None,)
    return (Track(axis, track.index if count == 1 else tuple(track.index) * count),)


def _slice(
    node: Node, track: Track, before: Shape, after: tuple[Shape, ...]
) -> tuple[Track | None, ...]:
    if _axis(node.argument("dim", 0), before) != track.axis:
        return (track,)
    arguments = [node.argument(name) for name in ("start", "end", "step")]
    bounds = [bound for bound in arguments if bound is None or isinstance(bound, int)]
    if len(bounds) < len(arguments):
        return (None,)
    return (Track(track.axis, track.index[slice(*bounds)]),)


def _narrowed(
    node: Node, track: Track, before: Shape, after: tuple[Shape, ...]
) -> tuple[Track | None, ...]:
    """Splits into neighbouring pieces: split, split_with_sizes, chunk."""
    axis = _axis(node.argument("dim", 0), before)
    if axis != track.axis:
        return tuple(track for _ in after)
    pieces: list[Track | None] = []
    start = 0
    for shape in after:
        size = shape[axis]
        if not isinstance(size, int):
            return tuple(None for _ in after)
        pieces.append(Track(axis, track.index[start : start + size]))
        start += size
    return tuple(pieces)


def _removed(
    node: Node, track: Track, before: Shape, after: tuple[Shape, ...]
) -> tuple[Track | None, ...]:
    """Take single positions along an axis, which disappears: select, unbind."""
    axis = _axis(node.argument("dim", 0), before)
    if axis == track.axis:
        return tuple(None for _ in after)
    return tuple(Track(track.axis - (axis < track.axis), track.index) for _ in after)


def _index(
    node: Node, track: Track, before: Shape, after: tuple[Shape, ...]
) -> tuple[Track | None, ...]:
    """Indexing by tensors: only in neighbouring axes, and not in the track's."""
    indices = _tuple(node.argument("indices"))
    places = [place for place, index in enumerate(indices) if isinstance(index, Ref)]
    if not places or places != list(range(places[0], places[-1] + 1)) or track.axis in places:
        return (None,)
    axis = track.axis
    if axis > places[-1]:
        axis += len(after[0]) - len(before)
    # A mask of several axes takes more of them than it has places.
    same_size = 0 <= axis < len(after[0]) and after[0][axis] == before[track.axis]
    return (Track(axis, track.index) if same_size else None,)


def _embedding(
    node: Node, track: Track, before: Shape, after: tuple[Shape, ...]
) -> tuple[Track | None, ...]:
    return (Track(len(after[0]) - 1, track.index) if track.axis == 1 else None,)


def _index_select(
    node: Node, track: Track, before: Shape, after: tuple[Shape, ...]
) -> tuple[Track | None, ...]:
    return (None if _axis(node.argument("dim", 0), before) == track.axis else track,)


def _gather(
    node: Node, track: Track, before: Shape, after: tuple[Shape, ...]
) -> tuple[Track | None, ...]:
    size = after[0][track.axis]
    if _axis(node.argument("dim", 0), before) == track.axis or not isinstance(size, int):
        return (None,)
    return (Track(track.axis, track.index[:size]),)


def _flip(
    node: Node, track: Track, before: Shape, after: tuple[Shape, ...]
) -> tuple[Track | None, ...]:
    flipped = {_axis(dim, before) for dim in _tuple(node.argument("dims"))}
    return (Track(track.axis, track.index[::-1]) if track.axis in flipped else track,)


def _windows(
    node: Node, track: Track, before: Shape, after: tuple[Shape, ...]
) -> tuple[Track | None, ...]:
    """im2col: the windows of an image, all pixels of a window side by side, channel by channel."""
    if track.axis != len(before) - 3 or any(_tuple(node.argument("padding"))):
        return (None,)
    sizes = [size for size in _tuple(node.argument("kernel_size")) if isinstance(size, int)]
    repeated = (coordinate for coordinate in track.index for _ in range(prod(sizes)))
    return (Track(track.axis, tuple(repeated)),)


_MOVERS: dict[str, _Mover] = {
    "transpose": _transpose,
    "t": _t,
    "permute": _permute,
    "expand": _expand,
    "repeat": _repeat,
    "slice": _slice,
    "split": _narrowed,
    "split_with_sizes": _narrowed,
    "chunk": _narrowed,
    "select": _removed,
    "unbind": _removed,
    "index": _index,
    "embedding": _embedding,
    "index_select": _index_select,
    "gather": _gather,
    "flip": _flip,
    "im2col": _windows,
}


def joined(node: Node, shapes: list[Shape], tracks: list[Track | None]) -> Track | None:
    """The track on the output of `cat`, given those on its inputs (None: not tracked).

    Along the joined axis, inputs that are not tracked have coordinate -1. Across it, the
    tracks of all inputs must be the same, which is the caller's to require.
    """
    known = next(track for track in tracks if track is not None)
    axis = _axis(node.argument("dim", 0), shapes[0])
    if any(track is not None and track.axis != known.axis for track in tracks):
        return None
    if axis != known.axis:
        return known
    index: list[int] = []
    for shape, track in zip(shapes, tracks, strict=True):
        size = shape[axis]
        if not isinstance(size, int):
            return None
        index += track.index if track is not None else [-1] * size
    return Track(axis, tuple(index))


def stacked(node: Node, shape: Shape, track: Track) -> Track:
    """The track on the output of `stack`."""
    dim = node.argument("dim", 0)
    assert isinstance(dim, int)
    axis = dim % (len(shape) + 1)
    return Track(track.axis + (axis <= track.axis), track.index)


def _axis(dim: Argument, shape: Shape) -> int:
    assert isinstance(dim, int)
    return dim % len(shape)


def _tuple(argument: Argument) -> tuple[Argument, ...]:
    assert isinstance(argument, tuple)
    return argument
