"""Weights less their means by one kernel: the formula, rounded once, and its derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from normconvert.nn import centering, modeling_normconvert
from normconvert.nn.centering import centered

# Half a unit in the last place, and what float32 loses on the way.
ROUNDING = {torch.float32: 2e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SHAPES = [(768,), (3, 300), (300, 3), (5, 257), (40, 600), (4, 6, 7), (700, 600), (2, 1)]


@pytest.fixture(params=["kernel", "operations"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    found = centering._kernel()
    assert found is not None
    if request.param == "operations":
        monkeypatch.setattr(centering, "_kernel", lambda: None)
    return bool(request.param == "kernel")


def exact(x: torch.Tensor, axis: int, drop_last: bool) -> torch.Tensor:
    wide = x.double() - x.double().mean(axis, keepdim=True)
    return wide.narrow(axis, 0, wide.shape[axis] - drop_last)


def near(found: torch.Tensor, expected: torch.Tensor, given: torch.Tensor) -> None:
    """Rounded once, where most of what was `given` may cancel."""
    assert found.dtype is given.dtype
    assert found.shape == expected.shape
    bound = ROUNDING[given.dtype] * 1.01 * expected.abs() + 2e-7 * given.double().abs().amax()
    assert ((found.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_the_formula_and_its_gradient(kernel: bool, dtype: torch.dtype, drop_last: bool) -> None:
    for shape in SHAPES:
        for axis in range(-1, len(shape)):
            if drop_last and shape[axis] == 1:
                continue  # nothing is left
            x = (torch.randn(shape) + 0.5).to(dtype).requires_grad_()
            y = centered(x, axis, drop_last=drop_last)
            near(y, exact(x, axis, drop_last), x)
            with torch.no_grad():
                assert torch.equal(centered(x, axis, drop_last=drop_last), y)
            assert ("_Centered" in str(y.grad_fn)) is kernel
            g = torch.randn(y.shape[::-1]).to(dtype).permute(*range(y.ndim)[::-1])
            (found,) = torch.autograd.grad(y, x, g)
            wide = x.detach().double().requires_grad_()
            (expected,) = torch.autograd.grad(exact(wide, axis, drop_last), wide, g.double())
            near(found, expected, g)


@pytest.mark.parametrize("drop_last", [False, True])
def test_derivatives_in_float64(drop_last: bool) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for axis in (0, 1):
        assert torch.autograd.gradcheck(lambda x, a=axis: centered(x, a, drop_last=drop_last), x)
        assert torch.autograd.gradgradcheck(
            lambda x, a=axis: centered(x, a, drop_last=drop_last).pow(3), x
        )


def test_second_derivatives() -> None:
    x = torch.randn(3, 4, requires_grad=True)

    def second(x: torch.Tensor) -> torch.Tensor:
        y = centered(x, 1, drop_last=True).pow(3).sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    wide = x.detach().double().requires_grad_()
    assert torch.allclose(second(x).double(), second(wide), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # in torch's own code
def test_it_keeps_out_where_it_would_be_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("the kernel ran")

    monkeypatch.setattr(centering, "_by_kernel", never)
    x = torch.randn(3, 4)
    expected = exact(x, 1, False).float()
    assert torch.allclose(centered(x.t().contiguous().t(), 1), expected, atol=1e-6)
    assert torch.allclose(torch.func.vmap(lambda row: centered(row, 0))(x), expected, atol=1e-6)
    assert centered(x.to("meta"), 1).shape == x.shape
    x.requires_grad_()
    gradient = torch.func.grad(lambda s: (centered(x, 1) * s).square().sum())
    assert torch.allclose(gradient(torch.ones(())), 2 * expected.square().sum())
    with pytest.raises(AssertionError, match="the kernel ran"):
        centered(x, 1)


def test_both_kernels_are_kept() -> None:
    """One is no other under the same name."""
    one, other = modeling_normconvert._kernel(), centering._kernel()
    assert one is not None
    assert other is not None
    assert one._name != other._name
