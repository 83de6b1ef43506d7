"""Gradients by the kernel: those of the formula, whatever torch does with gradients around it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeAlias

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from normconvert.nn import CRMSNorm, PartialRMSNorm, RMSNorm
from normconvert.nn import modeling_normconvert as modeling
from test_fused import Counting

EPS = 1e-5
D = 100
# One unit in the last place, relative to the largest number of a row, and what float32 loses.
ROUNDING = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}

Make: TypeAlias = "Callable[[int], nn.Module]"


class Late(nn.Module):
    """The second call of such a norm, which is not its own, as in a model."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = modeling._LateCRMSNorm(size, EPS, gain=True, bias=True, expand=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.norm(x, late=True)
        return found


FORMS: dict[str, Make] = {
    "weightless": lambda n: RMSNorm(n, EPS, gain=False),
    "zero mean": lambda n: RMSNorm(n, EPS, gain=False, zero_mean=True),
    "gain": lambda n: RMSNorm(n, EPS),
    "offset and bias": lambda n: RMSNorm(n, EPS, bias=True, offset=1.0),
    "bias": lambda n: RMSNorm(n, EPS, gain=False, bias=True),
    "partial": lambda n: PartialRMSNorm(n, EPS, 0.3, bias=True, offset=1.0),
    "compressed": lambda n: CRMSNorm(n + 1, EPS),
    "expanded": lambda n: CRMSNorm(n + 1, EPS, expand=True),
    "expanded, gain and bias": lambda n: CRMSNorm(n + 1, EPS, gain=True, bias=True, expand=True),
    "late": lambda n: Late(n + 1),
}
every_form = pytest.mark.parametrize("make", FORMS.values(), ids=list(FORMS))


@pytest.fixture(autouse=True)
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    counter = Counting()
    monkeypatch.setattr(modeling, "_kernel", lambda: counter)
    return counter


def drawn(make: Make, dtype: torch.dtype, *rows: int, n: int = D) -> tuple[nn.Module, torch.Tensor]:
    """A norm with random factors, and an input that is far from the mean 0."""
    norm = make(n).to(dtype)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return norm, (torch.randn(*rows, n) + 0.5).to(dtype).requires_grad_()


def gradients(norm: nn.Module, x: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(norm(x), [x, *norm.parameters()], g.to(x.dtype)))


def exact(norm: nn.Module, x: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    """By operations, in float64."""
    wide = x.detach().double().requires_grad_()
    return gradients(copy.deepcopy(norm).double(), wide, g)


def near(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        bound = tolerance * other.abs().amax(-1, keepdim=True)
        assert ((one.double() - other.double()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@every_form
def test_they_are_those_of_the_formula(make: Make, dtype: torch.dtype, counting: Counting) -> None:
    for n in (31, 64, 100):  # the kernel's rows have a head in lanes, and a tail
        for rows in ((1,), (2, 3)):
            norm, x = drawn(make, dtype, *rows, n=n)
            g = torch.randn_like(norm(x))
            before = counting.calls["norm_back"]
            found = gradients(norm, x, g)
            assert counting.calls["norm_back"] == before + 1
            assert all(each.dtype is dtype for each in found)
            near(found, exact(norm, x, g), ROUNDING[dtype])


@every_form
def test_with_and_without_the_norm_has_the_same_bits(make: Make) -> None:
    for dtype in ROUNDING:
        norm, x = drawn(make, dtype, 5)
        with torch.no_grad():
            expected = norm(x)
        assert norm(x).requires_grad
        assert torch.equal(norm(x), expected)


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_many_rows_on_several_threads(dtype: torch.dtype) -> None:
    """The sums over the rows do not lose what a sum in float32 would."""
    norm, x = drawn(FORMS["expanded, gain and bias"], dtype, 6000)
    g = (torch.rand_like(norm(x)) + 1) / 16  # or the sums overflow float16
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found, again = gradients(norm, x, g), gradients(norm, x, g)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, found, again))
    near(found, exact(norm, x, g), ROUNDING[dtype])
    near(found[2:], exact(norm, x, g)[2:], {torch.float32: 2e-7}.get(dtype, ROUNDING[dtype]))


@every_form
def test_only_some_are_wanted(make: Make, counting: Counting) -> None:
    norm, x = drawn(make, torch.float32, 3)
    g = torch.randn_like(norm(x))
    names = dict(norm.named_parameters())
    full = dict(zip(["x", *names], gradients(norm, x, g), strict=True))
    for wanted in full:
        for name, each in {"x": x, **names}.items():
            each.requires_grad_(name == wanted)
        before = counting.calls["norm_back"]
        (found,) = torch.autograd.grad(norm(x), {"x": x, **names}[wanted], g)
        assert counting.calls["norm_back"] == before + 1
        assert torch.equal(found, full[wanted])


@every_form
def test_second_derivatives(make: Make) -> None:
    norm, x = drawn(make, torch.float32, 3, n=10)
    wide = x.detach().double().requires_grad_()
    twin = copy.deepcopy(norm).double()
    assert torch.autograd.gradgradcheck(lambda x, *_: twin(x), (wide, *twin.parameters()))

    def penalty(norm: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        sources = [x, *norm.parameters()]
        # What the input was made of must be reached once, not twice.
        y = norm(x + sources[-1].mean())
        first = torch.autograd.grad(y.pow(3).sum(), sources, create_graph=True)
        found = torch.autograd.grad([each.square().sum() for each in first], sources)
        return list(found)

    near(penalty(norm, x), penalty(twin, wide), 1e-4)


@contextmanager
def nothing_saved_is_contiguous() -> Iterator[None]:
    def strided(x: torch.Tensor) -> torch.Tensor:
        return torch.stack((x, x), -1)

    with saved_tensors_hooks(strided, lambda x: x[..., 0]):
        yield


SAVING: dict[str, tuple[Callable[[], AbstractContextManager[None]], bool]] = {
    "on the CPU": (save_on_cpu, True),
    "in float64": (
        lambda: saved_tensors_hooks(lambda x: x.double(), lambda x: x.float()),
        True,
    ),
    "to be read with gaps": (nothing_saved_is_contiguous, False),
    "as another dtype": (lambda: saved_tensors_hooks(lambda x: x, lambda x: x.double()), False),
}


@every_form
@pytest.mark.parametrize(("saving", "kernel"), SAVING.values(), ids=list(SAVING))
def test_hooks_on_what_is_saved(
    make: Make,
    saving: Callable[[], AbstractContextManager[None]],
    kernel: bool,
    counting: Counting,
) -> None:
    norm, x = drawn(make, torch.float32, 3)
    g = torch.randn_like(norm(x))
    with saving():
        y = norm(x)
    found = torch.autograd.grad(y, [x, *norm.parameters()], g)
    assert counting.calls["norm_back"] == kernel
    near(list(found), exact(norm, x, g), ROUNDING[torch.float32])


@every_form
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(make: Make, reentrant: bool, counting: Counting) -> None:
    norm, x = drawn(make, torch.float32, 3)
    g = torch.randn_like(norm(x))
    expected = gradients(norm, x, g)
    before = counting.calls["norm_back"]
    y: Any = checkpoint(norm, x, use_reentrant=reentrant)
    y.backward(g)
    assert counting.calls["norm_back"] == before + 1
    for each, gradient in zip([x, *norm.parameters()], expected, strict=True):
        assert each.grad is not None
        assert torch.equal(each.grad, gradient)


def test_the_graph_is_kept_or_not() -> None:
    norm, x = drawn(FORMS["gain"], torch.float32, 3)
    y = norm(x).square().sum()
    first = torch.autograd.grad(y, x, retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(y, x))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x)


def test_what_was_changed_in_place_is_noticed() -> None:
    norm, x = drawn(FORMS["gain"], torch.float32, 3)
    for changed in (x, norm.weight):
        y = norm(x)
        with torch.no_grad():
            changed.add_(1)  # type: ignore[operator]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@every_form
def test_no_rows(make: Make, counting: Counting) -> None:
    norm, x = drawn(make, torch.float32, 0)
    found = gradients(norm, x, torch.empty_like(norm(x)))
    assert not any(counting.calls.values())  # what has no numbers has no address
    assert found[0].shape == x.shape
    assert all(not each.any() for each in found[1:])


@every_form
def test_gradients_from_above_of_any_layout(make: Make) -> None:
    """Expanded, transposed, and zero."""
    norm, x = drawn(make, torch.float32, 3)
    y = norm(x)
    for g in (
        torch.randn(y.shape[-1]).expand_as(y),
        torch.randn(*y.shape[::-1]).t(),
        torch.zeros_like(y),
    ):
        near(gradients(norm, x, g), exact(norm, x, g), ROUNDING[torch.float32])


class Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # in torch's own code
@every_form
def test_it_keeps_out_where_it_would_be_missed(make: Make, counting: Counting) -> None:
    norm, x = drawn(make, torch.float32, 3)
    g = torch.randn_like(norm(x))
    expected = exact(norm, x, g)
    close = partial(near, expected=expected, tolerance=ROUNDING[torch.float32])
    made = dict(norm.named_parameters())
    counting.calls.update(norm=0, norm_back=0)

    def loss(x: torch.Tensor, made: dict[str, Any]) -> torch.Tensor:
        y: torch.Tensor = functional_call(norm, made, (x,))
        return (y * g).sum()

    by_x, by_factors = torch.func.grad(loss, (0, 1))(x, made)
    close([by_x, *by_factors.values()])
    # A transformation that x has no part in.
    by_scale = torch.func.grad(lambda scale: (norm(x) * scale * g).sum())(torch.ones(()))
    terms = norm(x.detach()).detach() * g  # which may cancel
    assert (by_scale - terms.sum()).abs() <= 1e-6 * terms.abs().sum()
    assert counting.calls["norm_back"] == 0
    y = norm(x)
    with Watching():  # type: ignore[no-untyped-call]
        close(list(torch.autograd.grad(y, [x, *norm.parameters()], g)))
    y = norm(x)
    batch = torch.stack((g, 2 * g))
    (rows,) = torch.autograd.grad(y, x, batch, is_grads_batched=True)
    near([rows[0], rows[1] / 2], [expected[0]] * 2, ROUNDING[torch.float32])
    assert counting.calls["norm_back"] == 0
    tangent = torch.func.jvp(norm, (x.detach(),), (torch.ones_like(x),))[1]
    assert torch.allclose((tangent * g).sum().double(), expected[0].sum(), rtol=1e-3, atol=1e-4)


def test_traces_of_a_backward_pass_see_it() -> None:
    norm, x = drawn(FORMS["expanded, gain and bias"], torch.float32, 3)

    def by_x(x: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(norm(x).square().sum(), x)[0]

    other = torch.randn_like(x).requires_grad_()
    made = make_fx(by_x)(x)
    assert torch.allclose(made(other), by_x(other), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    norm, x = drawn(FORMS["offset and bias"], torch.float32, 3)
    linear = nn.Linear(D, D)
    with torch.autocast("cpu", dtype):
        y = norm(linear(x))
        assert y.dtype is dtype
        y.sum().backward()
    assert x.grad is not None
    assert all(each.grad.dtype is torch.float32 for each in norm.parameters())  # type: ignore[union-attr]


def test_factors_of_another_dtype(counting: Counting) -> None:
    for make in (FORMS["offset and bias"], FORMS["expanded, gain and bias"]):
        for dtype, wide, kernel in (
            (torch.bfloat16, torch.float32, 1),
            (torch.float32, torch.float64, 0),
            (torch.bfloat16, torch.float64, 0),
        ):
            norm, x = drawn(make, dtype, 3)
            norm.to(wide)
            for context in (torch.no_grad(), nullcontext()):
                with context:
                    assert norm(x).dtype is dtype
            counting.calls["norm_back"] = 0
            found = gradients(norm, x, g := torch.randn_like(norm(x)))
            assert counting.calls["norm_back"] == kernel
            assert [each.dtype for each in found] == [dtype, wide, wide]
            near(found, exact(norm, x, g), ROUNDING[dtype])


def test_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel did not do, operations do."""
    norm, x = drawn(FORMS["gain"], torch.float32, 3)
    g = torch.randn_like(norm(x))

    class Full:
        norm = norm_back = staticmethod(lambda *_: 0)

    monkeypatch.setattr(modeling, "_kernel", Full)
    near(gradients(norm, x, g), exact(norm, x, g), ROUNDING[torch.float32])
    with torch.no_grad():
        assert torch.allclose(norm(x).double(), copy.deepcopy(norm).double()(x.double()), 1e-5)


def test_numbers_stay_as_the_kernel_was_told() -> None:
    for norm in (
        RMSNorm(D, torch.tensor(EPS)),  # type: ignore[arg-type]
        PartialRMSNorm(D, EPS, 0.3),
        CRMSNorm(D, EPS, expand=True),
    ):
        assert type(norm.eps) is float
        for name in ("size", "eps", "offset", "used", "expand"):
            if hasattr(norm, name):
                with pytest.raises(AttributeError, match=f"{name} of a .*Norm cannot be changed"):
                    setattr(norm, name, getattr(norm, name))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # in torch's own code
@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # Python 3.13.0
def test_compiled_it_is_operations(counting: Counting) -> None:
    norm, x = drawn(FORMS["expanded, gain and bias"], torch.float32, 3)
    g = torch.randn_like(norm(x))
    compiled: Any = torch.compile(norm, backend="aot_eager", fullgraph=True)
    counting.calls.update(norm=0, norm_back=0)
    near(gradients(compiled, x, g), exact(norm, x, g), ROUNDING[torch.float32])
    assert not any(counting.calls.values())
