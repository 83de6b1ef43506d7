"""Tracks against torch itself: a tensor whose elements *are* the coordinates of one axis."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import unfold

from normconvert.rules.axes import Track, move
from normconvert.trace.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPES = (
    st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=4)
    .map(tuple)
    .filter(lambda shape: max(shape) > 1)
)


def axes(shape: tuple[int, ...]) -> st.SearchStrategy[int]:
    """An axis worth following: one of a single coordinate says nothing."""
    return st.sampled_from([axis for axis, size in enumerate(shape) if size > 1])


def coordinates(shape: tuple[int, ...], axis: int) -> torch.Tensor:
    """A tensor of `shape` whose elements are their coordinates along `axis`."""
    line = torch.arange(shape[axis], dtype=torch.float64)
    view = [shape[axis] if i == axis else 1 for i in range(len(shape))]
    return line.view(view).expand(shape).contiguous()


def tracked(
    function: Callable[[torch.Tensor], Any], shape: tuple[int, ...], axis: int
) -> list[tuple[torch.Tensor, Track | None]]:
    """The outputs of `function` on coordinates, each with the track that `move` predicts."""
    x = coordinates(shape, axis)
    recorder = Recorder()
    tracks: dict[int, Track | None] = {recorder.new_value(x): Track(axis, range(shape[axis]))}
    with recorder:
        result = function(x)
    for node in recorder.nodes:
        value = node.inputs[0]
        track = tracks.get(value)
        after = tuple(recorder.values[out].shape for out in node.outputs)
        moved = track and move(node, 0, track, recorder.values[value].shape, after)
        tracks.update(zip(node.outputs, moved or [None] * len(after), strict=True))
    outputs = list(result) if isinstance(result, (tuple, list)) else [result]
    return [(out, tracks.get(recorder.value(out))) for out in outputs]


def agrees(out: torch.Tensor, track: Track) -> bool:
    """Whether every slice of `out` along the track's axis holds nothing but its coordinate."""
    assert out.shape[track.axis] == len(track.index)
    return all(
        bool((out.select(track.axis, position) == coordinate).all())
        for position, coordinate in enumerate(track.index)
    )


def check(
    function: Callable[[torch.Tensor], Any],
    shape: tuple[int, ...],
    axis: int,
    *,
    followed: bool = True,
) -> None:
    """What is predicted must be so; and it must be predicted at all where `followed`."""
    for out, track in tracked(function, shape, axis):
        assert track is not None or not followed
        assert track is None or agrees(out, track)


@given(shape=SHAPES, data=st.data())
def test_rearrangements_are_followed(shape: tuple[int, ...], data: st.DataObject) -> None:
    axis = data.draw(axes(shape))
    one, two = (data.draw(st.integers(-len(shape), len(shape) - 1)) for _ in range(2))
    order = data.draw(st.permutations(range(len(shape))))
    check(lambda x: x.transpose(one, two), shape, axis)
    check(lambda x: x.permute(*order), shape, axis)
    check(lambda x: x.unsqueeze(one), shape, axis)
    check(lambda x: x.flip(one), shape, axis)
    check(lambda x: x.unsqueeze(0).expand(5, *shape), shape, axis)
    check(lambda x: x.repeat(2, *(1 for _ in shape)), shape, axis)
    check(lambda x: x.clone().contiguous().to(torch.float32), shape, axis)


@given(shape=SHAPES, data=st.data())
def test_pieces_are_followed(shape: tuple[int, ...], data: st.DataObject) -> None:
    axis, dim = data.draw(axes(shape)), data.draw(st.integers(0, len(shape) - 1))
    size = data.draw(st.integers(1, shape[dim]))
    start = data.draw(st.integers(-shape[dim], shape[dim] - 1))
    step = data.draw(st.integers(1, 3))
    check(lambda x: torch.split(x, size, dim), shape, axis)
    check(lambda x: x.chunk(2, dim), shape, axis)
    pick = tuple(slice(start, None, step) if i == dim else slice(None) for i in range(len(shape)))
    check(lambda x: x[pick], shape, axis)
    check(lambda x: x.select(dim, start), shape, axis, followed=dim != axis)
    check(lambda x: x.unbind(dim), shape, axis, followed=dim != axis)


@given(shape=SHAPES, data=st.data())
def test_reshapes_are_followed_or_given_up(shape: tuple[int, ...], data: st.DataObject) -> None:
    axis = data.draw(axes(shape))
    left, after = prod(shape), []
    while left > 1:
        after.append(data.draw(st.sampled_from([n for n in range(2, left + 1) if left % n == 0])))
        left //= after[-1]
    for position in range(data.draw(st.integers(0, 2))):
        after.insert(min(position, len(after)), 1)
    check(lambda x: x.reshape(after or (1,)), shape, axis, followed=False)


@given(shape=SHAPES, heads=st.sampled_from([2, 3]), data=st.data())
def test_reshapes_of_heads_are_followed(
    shape: tuple[int, ...], heads: int, data: st.DataObject
) -> None:
    """The last axis splits into and merges from heads: a tiled index, never a lost one."""
    shape = (*shape[:-1], heads, max(2, shape[-1]))
    merged = (*shape[:-2], heads * shape[-1])
    check(lambda x: x.reshape(merged), shape, len(shape) - 1)
    check(lambda x: x.reshape(merged), shape, len(shape) - 2)
    check(lambda x: x.reshape(merged).reshape(shape), shape, len(shape) - 1)
    check(lambda x: x.reshape(-1, shape[-1]), shape, len(shape) - 1)


@given(shape=SHAPES, data=st.data())
def test_indexing_is_followed_across_other_axes(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    axis = data.draw(axes(shape))
    rows = torch.tensor(data.draw(st.lists(st.integers(0, shape[0] - 1), min_size=1)))
    check(lambda x: x[rows], shape, axis, followed=axis > 0)
    check(lambda x: x[rows.view(-1, 1)], shape, axis, followed=axis > 0)
    check(lambda x: x.index_select(0, rows), shape, axis, followed=axis > 0)
    check(lambda x: x[None, rows], shape, axis, followed=axis > 0)
    first = torch.zeros(3, dtype=torch.int64)
    if len(shape) > 1:
        check(lambda x: x[:, first], shape, axis, followed=axis != 1)
        check(lambda x: x[rows.view(-1, 1), first], shape, axis, followed=axis > 1)
        mask = torch.ones(shape[:2], dtype=torch.bool)
        check(lambda x: x[mask], shape, axis, followed=False)
    if len(shape) > 2:
        check(lambda x: x[first, :, first], shape, axis, followed=False)


@given(channels=st.integers(2, 5), window=st.sampled_from([1, 2, (1, 3), (3, 2)]))
def test_windows_are_followed(channels: int, window: int | tuple[int, int]) -> None:
    shape = (2, channels, 6, 6)
    check(lambda x: unfold(x, window), shape, 1)
    check(lambda x: unfold(x, window, dilation=2, stride=3), shape, 1)
    check(lambda x: unfold(x[0], window), shape, 1)
    check(lambda x: unfold(x, window), shape, 2, followed=False)
    check(lambda x: unfold(x, window, padding=1), shape, 1, followed=False)


def test_the_check_can_fail() -> None:
    out = coordinates((2, 3), 1)
    assert agrees(out, Track(1, range(3)))
    assert not agrees(out, Track(1, (0, 2, 1)))
    with pytest.raises(AssertionError):
        agrees(out, Track(0, range(3)))
