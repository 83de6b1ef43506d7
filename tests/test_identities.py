"""The identities of docs/mathematics.md, in float64, against the plain formulas.

Each test also breaks a condition of its identity, and sees that it fails then.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from normconvert.nn import (
    CRMSNorm,
    DeferredRMSNormLinear,
    PartialRMSNorm,
    RMSNorm,
    compress,
    expand,
    recenter,
)

Array: TypeAlias = torch.Tensor
EPS = 1e-3  # large, so that an identity which needs it to be 0 fails


class Draw:
    """Random numbers of the sizes that an identity is about, in float64."""

    def __init__(self, seed: int, d: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.d, self.out, self.tokens = d, d + 3, 5
        self.x = self(self.tokens, d) + 0.7  # with a mean
        self.g, self.b = self(d) + 0.5, self(d)
        self.W, self.c = self(self.out, d), self(self.out)

    def __call__(self, *shape: int) -> Array:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)


drawn = st.builds(Draw, st.integers(0, 2**32), st.integers(2, 24))


def rms(x: Array) -> Array:
    """x̂ of an RMSNorm."""
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def layer(x: Array) -> Array:
    """x̂ of a LayerNorm."""
    return F.layer_norm(x, (x.shape[-1],), eps=EPS)


def centered(matrix: Array, axis: int = 0) -> Array:
    """P along the axis."""
    return matrix - matrix.mean(axis, keepdim=True)


def same(one: Array, other: Array, tolerance: float = 1e-11) -> bool:
    assert one.shape == other.shape
    return bool((one - other).abs().max() <= tolerance * (1 + other.abs().max()))


@given(drawn, st.sampled_from([rms, layer]), st.sampled_from([0.0, 1.0]))
def test_a_gain_moves_into_what_reads_it(draw: Draw, norm: Any, offset: float) -> None:
    stored = draw.g - offset
    before = F.linear(norm(draw.x) * (offset + stored), draw.W, draw.c)
    assert same(before, F.linear(norm(draw.x), draw.W * draw.g, draw.c))
    identity = RMSNorm(draw.d, EPS, offset=offset).double()
    assert identity.weight is not None
    assert (identity.weight == 1 - offset).all()
    assert same(identity(draw.x), rms(draw.x))
    # A use that keeps the old gain, such as an addition to the stream, is another function.
    assert not same(before, F.linear(norm(draw.x), draw.W, draw.c))


@given(drawn)
def test_a_bias_moves_into_the_biases_of_what_reads_it(draw: Draw) -> None:
    before = F.linear(layer(draw.x) * draw.g + draw.b, draw.W, draw.c)
    after = F.linear(layer(draw.x), draw.W * draw.g, draw.c + draw.W @ draw.b)
    assert same(before, after)
    # Summed over the tokens on the way, the constant counts as often as there are tokens.
    summed = F.linear((layer(draw.x) * draw.g + draw.b).sum(0), draw.W, draw.c)
    after = F.linear(layer(draw.x).sum(0), draw.W * draw.g, draw.c + draw.W @ draw.b)
    assert not same(summed, after)


@given(drawn)
def test_a_quotient_stays_in_the_norm(draw: Draw) -> None:
    gain = draw.g.where(draw.g.abs() > 1e-2, 1.0)
    gain[0], draw.b[0] = 0.0, 0.0
    quotient = torch.where(draw.b == 0, 0.0, draw.b / gain)
    before = F.linear(layer(draw.x) * gain + draw.b, draw.W, draw.c)
    assert same(before, F.linear(layer(draw.x) + quotient, draw.W * gain, draw.c), 1e-9)
    draw.b[0] = 1.0
    assert not (draw.b / gain).isfinite().all()


@given(drawn)
def test_the_root_may_come_after_the_product(draw: Draw) -> None:
    linear = torch.nn.Linear(draw.d, draw.out).double()
    with torch.no_grad():
        linear.weight.copy_(draw.W)
        linear.bias.copy_(draw.c)
        before = F.linear(rms(draw.x), draw.W, draw.c)
        assert same(DeferredRMSNormLinear(linear, EPS)(draw.x), before)
    root = (draw.x.square().mean(-1, keepdim=True) + EPS).sqrt()
    assert not same(F.linear(draw.x, draw.W, draw.c) / root, before)  # the bias is divided too


@given(drawn, st.floats(-9, 9))
def test_layernorm_is_rmsnorm_of_what_has_mean_zero(draw: Draw, shift: float) -> None:
    assert same(layer(draw.x), rms(recenter(draw.x)))
    assert same(layer(draw.x + shift), layer(draw.x), 1e-10)
    assert not same(rms(draw.x), rms(recenter(draw.x)))  # who reads it by an RMSNorm sees the mean


@given(drawn, st.integers(0, 4))
def test_a_writer_is_centered_in_its_weights(draw: Draw, token: int) -> None:
    y, d = draw.x, draw.out
    linear = F.linear(y, centered(draw.W), centered(draw.c))
    assert same(linear, recenter(F.linear(y, draw.W, draw.c)))
    table = draw(5, d)
    assert same(centered(table, 1)[token], recenter(table[token]))
    experts, router = draw(3, d, draw.d), draw(3)
    mixed = torch.einsum("e,eod,td->to", router, experts, y)
    assert same(torch.einsum("e,eod,td->to", router, centered(experts, 1), y), recenter(mixed))
    kernel, picture = draw(d, 2, 3, 3), draw(1, 2, 6, 6)
    patches = F.conv2d(picture, centered(kernel)).movedim(1, -1)
    assert same(patches, recenter(F.conv2d(picture, kernel).movedim(1, -1)))
    stream = linear + centered(table, 1)
    assert same(layer(stream), layer(F.linear(y, draw.W, draw.c) + table))
    # Behind an activation the mean comes back.
    assert not same(F.gelu(linear), recenter(F.gelu(F.linear(y, draw.W, draw.c))))


@given(drawn)
def test_a_layerscale_is_taken_into_the_weight(draw: Draw) -> None:
    scale = draw(draw.out)
    scale[0] = 0.0
    before = recenter(scale * F.linear(draw.x, draw.W, draw.c))
    weight, bias = scale[:, None] * draw.W, scale * draw.c
    assert same(F.linear(draw.x, centered(weight), centered(bias)), before)
    late = scale * F.linear(draw.x, centered(draw.W), centered(draw.c))
    assert not same(late, before)


@given(drawn)
def test_the_last_coordinate_is_known_by_the_others(draw: Draw) -> None:
    x = recenter(draw.x)
    norm = CRMSNorm(draw.d, EPS)
    assert same(norm(compress(draw.x)), rms(x)[:, :-1])
    assert same(expand(norm(compress(draw.x))), rms(x))
    reader = draw.W[:, :-1] - draw.W[:, -1:]
    assert same(F.linear(norm(compress(draw.x)), reader), F.linear(rms(x), draw.W))
    weight, bias = draw(draw.d, draw.out), draw(draw.d)
    y = draw(draw.tokens, draw.out)
    writer = F.linear(y, centered(weight)[:-1], centered(bias)[:-1])
    assert same(writer, compress(F.linear(y, weight, bias)))
    assert not same(norm(draw.x[:, :-1]), rms(draw.x)[:, :-1])  # of a stream with a mean
    # With a gain in between, the normalised vector has a mean, and the reader loses it.
    gained = rms(x) * draw.g
    assert not same(F.linear(gained[:, :-1], reader), F.linear(gained, draw.W))


@given(drawn)
def test_a_tied_table_serves_two_masters(draw: Draw) -> None:
    table = draw(7, draw.d)
    last = layer(draw.x) * draw.g
    assert same(F.linear(layer(draw.x), table * draw.g), F.linear(last, table))
    assert not same(table * draw.g, table)
    means = table.mean(1)
    logits = F.linear(last, table) - last.sum(-1, keepdim=True) * means
    assert same(F.linear(last, centered(table, 1)), logits)
    assert same(centered(table, 1), recenter(table))


@given(drawn)
def test_the_rewrites_compose(draw: Draw) -> None:
    assert same(centered(draw.W * draw.g), centered(draw.W) * draw.g)
    assert same(centered(draw.W * draw.g)[:-1], (centered(draw.W)[:-1]) * draw.g)
    # What is centered along the axis that is folded does not commute.
    assert not same(centered(draw.W * draw.g, 1), centered(draw.W, 1) * draw.g)


@given(drawn)
def test_a_partial_rms_is_an_estimate(draw: Draw) -> None:
    assert same(PartialRMSNorm(draw.d, EPS, 1.0, gain=False)(draw.x), rms(draw.x))
    half = PartialRMSNorm(draw.d, EPS, 0.5, gain=False)
    part = draw.x[:, : half.used].square().mean(-1, keepdim=True)
    assert same(half(draw.x), draw.x / (part + EPS).sqrt())
    assert not same(half(draw.x), rms(draw.x))
