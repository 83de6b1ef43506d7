"""The norms compute their formulas: in float64 exactly, in float32 and half precision rounded."""

from __future__ import annotations

import ast
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from normconvert.nn import (
    Compress,
    CRMSNorm,
    DeferredRMSNormLinear,
    PartialRMSNorm,
    Recenter,
    RMSNorm,
    compress,
    expand,
    modeling_normconvert,
    recenter,
)

if TYPE_CHECKING:
    from collections.abc import Callable

D = 12
EPS = 1e-5
MANY = (300, 1100)  # rows and width: above the size from which another kernel scales the rows
HALF = (torch.float16, torch.bfloat16)

# Each takes no argument and makes its module; the number is the size of the module's input.
MODULES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "rmsnorm": (partial(RMSNorm, D, EPS, bias=True), D),
    "rmsnorm-weightless": (partial(RMSNorm, D, EPS, gain=False), D),
    "rmsnorm-offset": (partial(RMSNorm, D, EPS, offset=1.0), D),
    "rmsnorm-zero-mean": (partial(RMSNorm, D, EPS, zero_mean=True), D),
    "prmsnorm": (partial(PartialRMSNorm, D, EPS, 0.3), D),
    "crmsnorm": (partial(CRMSNorm, D, EPS), D - 1),
    "crmsnorm-expand": (partial(CRMSNorm, D, EPS, gain=True, bias=True, expand=True), D - 1),
    "recenter": (Recenter, D),
    "compress": (Compress, D),
    "deferred": (lambda: DeferredRMSNormLinear(nn.Linear(D, 5, bias=False), EPS), D),
    "deferred-bias": (lambda: DeferredRMSNormLinear(nn.Linear(D, 5), EPS), D),
}
every_module = pytest.mark.parametrize(("make", "size"), MODULES.values(), ids=list(MODULES))


@pytest.fixture(autouse=True)
def operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the kernel, as where there is no compiler; test_fused.py is about the kernel."""
    monkeypatch.setattr(modeling_normconvert, "_kernel", lambda: None)


def made(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """The module with random parameters, signs included."""
    module = make().to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def rms_reference(x: torch.Tensor, eps: float, used: int | None = None) -> torch.Tensor:
    """RMSNorm row by row, in Python's own arithmetic."""
    rows = []
    for row in x.double().reshape(-1, x.shape[-1]).tolist():
        part = row[:used]
        rms = (sum(value * value for value in part) / len(part) + eps) ** 0.5
        rows.append([value / rms for value in row])
    return torch.tensor(rows, dtype=torch.float64).view(x.shape)


def zero_mean(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(shape, dtype=torch.float64)
    return (x - x.mean(-1, keepdim=True)).to(dtype)


def near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Equal to `tolerance`, relative to the largest number of each row."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().amax(-1)
    assert (error <= tolerance * expected.double().abs().amax(-1)).all(), float(error.max())


inputs = st.tuples(
    st.integers(1, 3),
    st.integers(2, 40),
    st.integers(-8, 8).map(lambda power: 10.0**power),
    st.sampled_from((0.0, 1e-12, 1e-6, 1e-2, 1.0)),
    st.integers(0, 2**32),
)


def drawn(case: tuple[int, int, float, float, int]) -> tuple[torch.Tensor, float]:
    rows, size, scale, eps, seed = case
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, size, generator=generator, dtype=torch.float64) * scale, eps


@given(inputs, st.sampled_from((0.0, 1.0)), st.booleans())
def test_rmsnorm_is_its_formula(
    case: tuple[int, int, float, float, int], offset: float, promised: bool
) -> None:
    x, eps = drawn(case)
    make = partial(RMSNorm, x.shape[-1], eps, bias=True, offset=offset, zero_mean=promised)
    norm = made(make)
    weight, bias = norm.parameters()
    near(norm(x), rms_reference(x, eps) * (offset + weight) + bias, 1e-13)


@given(inputs, st.integers(1, 100))
def test_partial_rmsnorm_is_its_formula(
    case: tuple[int, int, float, float, int], percent: int
) -> None:
    x, eps = drawn(case)
    norm = made(partial(PartialRMSNorm, x.shape[-1], eps, percent / 100, bias=True))
    weight, bias = norm.parameters()
    used = -(-x.shape[-1] * percent // 100)
    near(norm(x), rms_reference(x, eps, used) * weight + bias, 1e-13)


def test_a_fraction_is_taken_as_written() -> None:
    assert 100 * 0.07 > 7
    assert PartialRMSNorm(100, EPS, 0.07).used == 7
    assert PartialRMSNorm(100, EPS, 0.071).used == 8


@given(inputs, st.sampled_from((0.0, 1.0)))
def test_crmsnorm_is_rmsnorm_of_the_expanded_vector(
    case: tuple[int, int, float, float, int], offset: float
) -> None:
    x, eps = drawn(case)
    size = x.shape[-1] + 1
    full = torch.cat((x, -x.sum(-1, keepdim=True)), dim=-1)
    near(CRMSNorm(size, eps)(x), rms_reference(full, eps)[..., :-1], 1e-12)
    norm = made(partial(CRMSNorm, size, eps, gain=True, bias=True, offset=offset, expand=True))
    weight, bias = norm.parameters()
    near(norm(x), rms_reference(full, eps) * (offset + weight) + bias, 1e-12)


@given(inputs)
def test_crmsnorm_after_compress_is_layernorm(case: tuple[int, int, float, float, int]) -> None:
    x, eps = drawn(case)
    size = x.shape[-1]
    near(CRMSNorm(size, eps)(compress(x)), F.layer_norm(x, (size,), eps=eps)[..., :-1], 1e-11)
    norm = made(partial(CRMSNorm, size, eps, gain=True, bias=True, expand=True))
    weight, bias = norm.parameters()
    near(norm(compress(x)), F.layer_norm(x, (size,), weight, bias, eps), 1e-11)


@given(inputs)
def test_expand_undoes_compress(case: tuple[int, int, float, float, int]) -> None:
    x, _ = drawn(case)
    centered = x - x.sum(-1, keepdim=True) / x.shape[-1]
    near(Recenter()(x), centered, 1e-14)
    near(expand(Compress()(x)), centered, 1e-13)
    assert expand(x).shape[-1] == x.shape[-1] + 1
    near(compress(expand(x)), x, 1e-13)


@given(inputs, st.booleans())
def test_deferred_is_the_norm_before_the_linear(
    case: tuple[int, int, float, float, int], bias: bool
) -> None:
    x, eps = drawn(case)
    linear = nn.Linear(x.shape[-1], 7, bias=bias, dtype=torch.float64)
    near(DeferredRMSNormLinear(linear, eps)(x), linear(rms_reference(x, eps)), 1e-12)


@every_module
def test_gradients(make: Callable[[], nn.Module], size: int) -> None:
    module = made(make)
    x = torch.randn(2, 3, size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *module.parameters()))


@every_module
def test_zero_has_a_norm_and_a_gradient(make: Callable[[], nn.Module], size: int) -> None:
    for dtype in (torch.float64, torch.float32, *HALF):
        module = made(make, dtype)
        bias = getattr(getattr(module, "linear", module), "bias", None)
        x = torch.zeros(2, size, dtype=dtype, requires_grad=True)
        y = module(x)
        assert torch.equal(y, (torch.zeros_like(y) if bias is None else bias.expand_as(y)))
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [(3, 40), MANY], ids=["few", "many"])
def test_half_precision_is_rounded_once(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Squares that overflow float16, sums that bfloat16 cannot hold; one rounding, at the end."""
    size = shape[-1]
    x = (torch.randn(shape) * 500 + 400).to(dtype)
    wide = x.double()
    centered = wide - wide.mean(-1, keepdim=True)
    partly = wide / (wide[:, :9].square().mean(-1, keepdim=True) + EPS).sqrt()
    full = torch.cat((wide, -wide.sum(-1, keepdim=True)), dim=-1)
    over = full / (full.square().mean(-1, keepdim=True) + EPS).sqrt()
    rms = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    gained = made(partial(RMSNorm, size, EPS, bias=True), dtype)
    weight, bias = gained.parameters()
    cases = [
        (RMSNorm(size, EPS, gain=False)(x), rms),
        (gained(x), rms * weight.double() + bias.double()),
        (PartialRMSNorm(size, EPS, 9 / size, gain=False)(x), partly),
        (CRMSNorm(size + 1, EPS)(x), over[:, :-1]),
        (CRMSNorm(size + 1, EPS, expand=True)(x), over),
        (recenter(x), centered),
        (compress(x), centered[:, :-1]),
    ]
    for actual, expected in cases:
        assert actual.dtype is dtype
        # Half a unit in the last place, and what the arithmetic in float32 adds to it.
        unit = torch.finfo(dtype).eps / 2 * expected.abs() * 1.01 + 2e-6 * expected.abs().amax()
        assert ((actual.double() - expected).abs() <= unit).all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_many_rows_in_half_precision_have_the_same_gradient(dtype: torch.dtype) -> None:
    x = torch.randn(MANY).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    out = torch.randn(MANY).to(dtype)
    for norm in (RMSNorm(MANY[1], EPS, gain=False), CRMSNorm(MANY[1] + 1, EPS)):
        (actual,) = torch.autograd.grad(norm(x), x, out)
        (expected,) = torch.autograd.grad(norm(wide), wide, out.double())
        # Half a unit in the last place of the largest number: the sum is rounded, not its parts.
        unit = torch.finfo(dtype).eps / 2 * expected.abs() + 1e-6 * expected.abs().amax()
        assert ((actual.double() - expected).abs() <= unit).all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("promised", [False, True])
def test_half_precision_gains_count_in_full(
    dtype: torch.dtype, offset: float, promised: bool
) -> None:
    """On top of one, 0.001 is less than half precision can tell."""
    x = zero_mean(4, D)
    norm = RMSNorm(D, EPS, offset=offset, zero_mean=promised).to(dtype)
    assert norm.weight is not None
    nn.init.constant_(norm.weight, 1e-3)
    near(norm(x), rms_reference(x, EPS) * (offset + norm.weight.double()), 1e-6)
    half = x.to(dtype)
    near(norm(half), norm(half.float()), torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("rows", [1, 3, 50])
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_zero_mean_changes_nothing_but_the_rounding(rows: int, gain: bool, bias: bool) -> None:
    x = zero_mean(rows, 96)
    plain = made(partial(RMSNorm, 96, EPS, gain=gain, bias=bias), torch.float32)
    fast = RMSNorm(96, EPS, gain=gain, bias=bias, zero_mean=True)
    fast.load_state_dict(plain.state_dict())
    near(fast(x), plain(x), 1e-6)
    # It is LayerNorm that runs, so a mean would be removed.
    near(fast(x + 1), plain(x), 2e-6)


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_torch_s_own_fused_norm(
    dtype: torch.dtype, gain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on a GPU, here on the CPU: the same formula, one call."""
    monkeypatch.setattr(modeling_normconvert, "_has_fused_rms_norm", lambda norm, x: True)
    norm = made(partial(RMSNorm, D, EPS, gain=gain), dtype)
    x = torch.randn(7, D).to(dtype)
    exact = norm.double()(x.double())
    near(norm.to(dtype)(x), exact, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_zero_mean_in_half_precision(dtype: torch.dtype) -> None:
    x = zero_mean(50, 96, dtype=dtype)
    plain = RMSNorm(96, EPS, gain=False)(x.double())
    near(RMSNorm(96, EPS, gain=False, zero_mean=True)(x), plain, torch.finfo(dtype).eps)


def test_in_float64_a_promise_of_zero_mean_hides_nothing() -> None:
    x = torch.randn(4, D, dtype=torch.float64) + 3
    near(RMSNorm(D, EPS, gain=False, zero_mean=True)(x), rms_reference(x, EPS), 1e-13)
    near(CRMSNorm(D + 1, EPS, expand=True)(x)[..., :-1], CRMSNorm(D + 1, EPS)(x), 1e-13)


@every_module
def test_on_meta_and_fake_tensors(make: Callable[[], nn.Module], size: int) -> None:
    for dtype in (torch.float64, torch.float32, *HALF):
        module = make().to(dtype)
        expected = module(torch.randn(2, 7, size).to(dtype))
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = module(torch.empty(2, 7, size, dtype=dtype))
        meta = module.to("meta")(torch.empty(2, 7, size, dtype=dtype, device="meta"))
        for other in (meta, fake):
            assert (other.shape, other.dtype) == (expected.shape, expected.dtype)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # Python 3.13.0
def test_compiled_modules_compute_the_same() -> None:
    modules = [
        RMSNorm(96, EPS, gain=False),
        RMSNorm(96, EPS, zero_mean=True),
        CRMSNorm(97, EPS),
        DeferredRMSNormLinear(nn.Linear(96, 96), EPS),
    ]
    stack = nn.Sequential(*modules)
    x = torch.randn(3, 96)
    compiled = torch.compile(stack, fullgraph=True)
    with torch.no_grad():
        near(compiled(x), stack(x), 1e-5)


def test_a_new_norm_is_the_identity_but_for_the_norm() -> None:
    x = torch.randn(4, D, dtype=torch.float64)
    for offset in (0.0, 1.0):
        norm = RMSNorm(D, EPS, bias=True, offset=offset, dtype=torch.float64)
        near(norm(x), rms_reference(x, EPS), 1e-13)
        assert [name for name, _ in norm.named_parameters()] == ["weight", "bias"]
    assert not list(RMSNorm(D, EPS, gain=False).parameters())


@pytest.mark.parametrize("name", ["rmsnorm-weightless", "prmsnorm", "crmsnorm"])
def test_a_width_that_is_not_the_norms_is_refused(name: str) -> None:
    """Without a gain nothing else would notice."""
    make, size = MODULES[name]
    for other in (size - 1, size + 1):
        with pytest.raises(
            ValueError, match=rf"takes \[\.\.\., {size}\], and was given \[3, {other}\]"
        ):
            make()(torch.randn(3, other))


def test_what_makes_no_sense_is_refused() -> None:
    for gain, bias in ((True, False), (False, True)):
        with pytest.raises(ValueError, match="expand"):
            CRMSNorm(D, EPS, gain=gain, bias=bias)
    for fraction in (0.0, -0.1, 1.1):
        with pytest.raises(ValueError, match="fraction"):
            PartialRMSNorm(D, EPS, fraction)


def test_the_printed_module_tells_what_it_is() -> None:
    assert repr(RMSNorm(D, EPS)) == "RMSNorm(12, eps=1e-05)"
    norm = RMSNorm(D, EPS, bias=True, offset=1.0, zero_mean=True)
    assert repr(norm) == "RMSNorm(12, eps=1e-05, bias=True, offset=1.0, zero_mean=True)"
    assert repr(CRMSNorm(D, EPS)) == "CRMSNorm(12, eps=1e-05, gain=False)"
    assert "fraction=0.5" in repr(PartialRMSNorm(D, EPS, 0.5))
    assert "eps=1e-05" in repr(DeferredRMSNormLinear(nn.Linear(D, 2), EPS))


def test_the_modeling_file_stands_alone() -> None:
    """It is copied into checkpoints, where there is no normconvert."""
    path = Path(modeling_normconvert.__file__)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module or ""]
        for name in names:
            root = name.split(".")[0]
            assert root in {"torch", "transformers"} or root in sys.stdlib_module_names, name
