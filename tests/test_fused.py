"""The kernel: what it computes, and that it keeps out where its work would be missed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from normconvert.nn import CRMSNorm, PartialRMSNorm, RMSNorm, recenter
from normconvert.nn import modeling_normconvert as modeling

EPS = 1e-5
# Half a unit in the last place of each, relative, plus what float32 loses on the way.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11 + 2e-6}
KERNEL = modeling._kernel()
SIZES = (1, 2, 7, 31, 64, 100, 768)  # the kernel's rows have a head in lanes, and a tail


@pytest.fixture(autouse=True)
def kernel() -> None:
    """Without it these tests would show nothing."""
    assert KERNEL is not None


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


def norms(d: int) -> list[nn.Module]:
    """Every norm that has its own formula, with random gains and biases."""
    made: list[nn.Module] = [
        RMSNorm(d, EPS, gain=False),
        RMSNorm(d, EPS, gain=False, zero_mean=True),
        RMSNorm(d, EPS),
        RMSNorm(d, EPS, bias=True, offset=1.0),
        RMSNorm(d, EPS, gain=False, bias=True),
        PartialRMSNorm(d, EPS, 0.3, offset=1.0),
        CRMSNorm(d + 1, EPS),
        CRMSNorm(d + 1, EPS, expand=True),
        CRMSNorm(d + 1, EPS, gain=True, bias=True, expand=True),
    ]
    for parameter in (p for norm in made for p in norm.parameters()):
        nn.init.uniform_(parameter, 0.5, 1.5)
    return made


class Counting:
    """The kernel, and how often each of its functions did its work."""

    def __init__(self) -> None:
        self.calls = {"norm": 0, "norm_back": 0}

    def __getattr__(self, name: str) -> Any:
        def count(*arguments: Any) -> int:
            done: int = getattr(KERNEL, name)(*arguments)
            self.calls[name] += done
            return done

        return count


def counted(
    norm: Callable[[Any], Any], x: torch.Tensor, patch: pytest.MonkeyPatch
) -> tuple[Any, int]:
    """What the norm gives, and how often that came from the kernel."""
    counting = Counting()
    with patch.context() as context:
        context.setattr(modeling, "_kernel", lambda: counting)
        return norm(x), counting.calls["norm"]


@torch.no_grad()
def test_it_rounds_the_norm_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for d in SIZES:
        for norm in norms(d):
            zero_mean = getattr(norm, "zero_mean", False)
            x = (torch.randn(3, 5, d, dtype=torch.float64) + (0.0 if zero_mean else 0.3)).to(dtype)
            if zero_mean and d > 1:
                x = torch.cat((x[..., :-1], -x[..., :-1].sum(-1, keepdim=True)), -1)
            narrow = norm.to(dtype)
            exact = _exact(narrow, x)
            found, taken = counted(narrow, x, monkeypatch)
            assert taken == 1
            assert found.dtype is dtype
            assert found.shape == exact.shape
            bound = ROUNDING[dtype] * exact.abs() + 1e-6 * exact.abs().max()
            assert ((found.double() - exact).abs() <= bound).all(), (d, norm)


def _exact(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """The formula in float64, written out once more."""
    wide = x.double()
    if isinstance(norm, CRMSNorm):
        full = torch.cat((wide, -wide.sum(-1, keepdim=True)), -1)
        inverse = (full.square().sum(-1, keepdim=True) / norm.size + EPS).rsqrt()
        y = full * inverse if norm.expand else wide * inverse
    else:
        used = norm.used if isinstance(norm, PartialRMSNorm) else x.shape[-1]
        y = wide * (wide[..., : int(used)].square().mean(-1, keepdim=True) + EPS).rsqrt()
    if isinstance(norm.weight, nn.Parameter):
        y = y * (norm.weight.double() + norm.offset)
    found: torch.Tensor = y + norm.bias.double() if isinstance(norm.bias, nn.Parameter) else y
    return found


@torch.no_grad()
def test_many_rows_on_several_threads(dtype: torch.dtype) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    x = torch.randn(4, 300, 257).to(dtype)
    norm = RMSNorm(257, EPS).to(dtype)
    together = norm(x)
    torch.set_num_threads(threads)
    assert torch.equal(together, torch.stack([norm(one) for one in x]))


@torch.no_grad()
def test_a_gain_in_another_dtype() -> None:
    norm = RMSNorm(64, EPS)
    nn.init.uniform_(norm.weight)  # type: ignore[arg-type]
    x = torch.randn(3, 64).bfloat16()
    error = (norm(x).double() - _exact(norm, x)).abs()
    assert (error <= 2**-8 * _exact(norm, x).abs() + 1e-6).all()


@torch.no_grad()
def test_a_late_norm_is_two_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first call divides, the second expands, and gives gain and bias to the result."""
    norm = modeling._LateCRMSNorm(768, EPS, gain=True, bias=True, expand=True).to(dtype)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    x = torch.randn(3, 5, 767).to(dtype)
    first, taken = counted(norm, x, monkeypatch)
    assert taken == 1
    assert torch.equal(first, CRMSNorm(768, EPS)(x))
    late, taken = counted(partial(norm, late=True), first, monkeypatch)
    assert taken == 1
    full = torch.cat((first.double(), -first.double().sum(-1, keepdim=True)), -1)
    exact = full * norm.weight.double() + norm.bias.double()  # type: ignore[union-attr]
    bound = ROUNDING[dtype] * exact.abs() + 1e-6 * exact.abs().max()
    assert ((late.double() - exact).abs() <= bound).all()
    assert torch.equal(late, torch.stack([norm(one, late=True) for one in first]))


@torch.no_grad()
def test_gains_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a parameter can be, other than numbers that lie side by side."""
    norm, x, numbers = RMSNorm(8, EPS), torch.randn(3, 8), torch.rand(8) + 0.5
    inverse = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()

    def set_(gain: torch.Tensor) -> None:
        norm.weight = nn.Parameter(gain)

    set_(numbers)
    assert counted(norm, x, monkeypatch)[1] == 1
    negative, gaps = torch._neg_view(numbers), torch.stack((numbers, numbers), -1)[:, 0]
    for gain in (negative, gaps):
        set_(gain)
        found, taken = counted(norm, x, monkeypatch)
        assert taken == 0
        assert torch.allclose(found, x * inverse * gain)
    set_(numbers)
    norm.weight.data = numbers[:5]  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="must match the size"):
        norm(x)

    def made_within(gain: torch.Tensor) -> torch.Tensor:
        set_(gain)
        found: torch.Tensor = norm(x)
        return found

    both = torch.func.vmap(made_within)(torch.stack((numbers, -numbers)))
    assert torch.allclose(both[1], x * inverse * -numbers)


def test_it_is_called_without_ctypes() -> None:
    """Its call takes a fraction of the norm of a row; and it refuses what it does not know."""
    for name in ("norm", "norm_back"):
        assert isinstance(getattr(KERNEL, name), BuiltinFunctionType)
    norm, x = RMSNorm(8, EPS, gain=False), torch.randn(3, 8)
    y = torch.zeros_like(x)
    places = (x.data_ptr(), 0, 0, y.data_ptr(), x.numel())
    kernel: Any = KERNEL
    for n, *dtypes in ((7, 0, 0, 0), (8, -1, 0, 0), (8, 0, -1, 0), (8, 0, 0, -1)):
        assert kernel.norm(norm._shape, n, *dtypes, 1, *places) is False
    assert not y.any()
    assert kernel.norm(norm._shape, 8, 0, 0, 0, 1, *places) is True
    assert torch.equal(y, norm(x))


def test_it_keeps_out_where_it_would_be_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x = RMSNorm(8, EPS), torch.randn(3, 8)
    untrained = RMSNorm(8, EPS).requires_grad_(False)
    assert counted(untrained, x, monkeypatch)[1] == 1
    assert counted(norm, x, monkeypatch)[1] == 1  # test_fused_gradients.py
    assert counted(norm.double(), x, monkeypatch)[1] == 0
    norm.float()
    with torch.no_grad():
        assert counted(norm, torch.empty(0, 8), monkeypatch)[1] == 0
        assert counted(norm, x.double(), monkeypatch)[1] == 0  # in which conversions are proven
        assert counted(norm, x.t().contiguous().t(), monkeypatch)[1] == 0
        assert counted(norm.to("meta"), x.to("meta"), monkeypatch)[1] == 0


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage:UserWarning")
@torch.no_grad()
def test_what_only_stands_for_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU that have no numbers at their address, or no address."""
    x, numbers = torch.randn(3, 8), torch.rand(8) + 0.5
    wrap: Any = torch._to_functional_tensor
    strange = {
        "zero": torch._efficientzerotensor(3, 8),
        "functional": wrap(x),
        "negated": torch._neg_view(x),
        "sparse": x.to_sparse(),
        "compressed sparse": x.to_sparse_csr(),
        "blocked": x.to_mkldnn(),
        "nested": torch.nested.nested_tensor([x, x]),
        "of a subclass": x.as_subclass(type("Marked", (torch.Tensor,), {})),
    }
    with_gain = RMSNorm(8, EPS)
    for name, each in strange.items():
        assert modeling.address(each) == 0, name
        with suppress(RuntimeError, NotImplementedError):  # torch may not know the operations
            assert counted(with_gain, each, monkeypatch)[1] == 0, name
    for name in ("zero", "functional", "negated"):
        with_gain.weight = nn.Parameter(strange[name][0])
        assert counted(with_gain, x, monkeypatch)[1] == 0, name
    with_gain.weight = nn.Parameter(numbers)
    assert not with_gain(strange["zero"]).any()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@torch.no_grad()
def test_what_traces_operations_sees_them() -> None:
    norm, x, other = RMSNorm(8, EPS), torch.randn(3, 8), torch.randn(3, 8)
    exported = torch.export.export(norm, (x,)).module()
    assert torch.allclose(exported(other), norm(other), atol=1e-6)
    traced = torch.jit.trace(norm, (x,))  # type: ignore[no-untyped-call]
    assert torch.allclose(traced(other), norm(other), atol=1e-6)
    for before_dispatch in (False, True):
        made = make_fx(norm, pre_dispatch=before_dispatch)(x)
        assert torch.allclose(made(other), norm(other), atol=1e-6)
    rows = torch.func.vmap(norm)(other)
    assert torch.allclose(rows, norm(other), atol=1e-6)


COUNT = """
import torch
from normconvert.nn import RMSNorm, modeling_normconvert as modeling
x = torch.randn(3, 8)
with torch.no_grad():
    y = RMSNorm(8, 1e-5)(x)
assert torch.allclose(y, x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt())
print(modeling._kernel() is not None)
"""


def run(cache: Path, path: str | None = None, cwd: Path | None = None) -> bool:
    """Whether a new process has the kernel; it computes the norm either way."""
    environment = {"XDG_CACHE_HOME": str(cache), "PATH": path or os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", COUNT],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.strip() == "True"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_trace_is_the_same_with_and_without_gradients() -> None:
    class Reading(nn.Module):
        """A stream of mean zero that wants a gradient, as that of a model with parameters."""

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), RMSNorm(8, EPS, gain=False, zero_mean=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.norm(recenter(self.linear(x)))
            return found

    torch.jit.trace(Reading(), (torch.randn(3, 8),))  # type: ignore[no-untyped-call]


def test_it_is_compiled_once(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    assert not run(tmp_path, path=nowhere)
    assert run(tmp_path)
    (kept,) = (tmp_path / "normconvert").iterdir()
    assert run(tmp_path, path=nowhere)  # needs no compiler any more
    whole = kept.read_bytes()
    for damaged in (b"", b"damaged", whole[:5000], whole[:4096] + bytes(len(whole) - 4096)):
        kept.write_bytes(damaged)
        assert run(tmp_path)  # compiled again
        assert kept.read_bytes() != damaged


def test_it_is_not_kept_in_the_folder_one_is_in(tmp_path: Path) -> None:
    assert run(Path("relative"), cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_thread_with_a_small_stack() -> None:
    norm, x = RMSNorm(2**16, EPS).bfloat16().requires_grad_(False), torch.randn(2, 2**16).bfloat16()
    before, found = threading.stack_size(2**17), []
    try:
        thread = threading.Thread(target=lambda: found.append(norm(x)))
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert torch.equal(found[0], norm(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # in torch's own code
@pytest.mark.parametrize("rows", [2, 40])
def test_derivatives_forwards_are_those_backwards(rows: int) -> None:
    norm = RMSNorm(8, EPS, gain=False, zero_mean=True)
    x, tangent = recenter(torch.randn(rows, 8)), torch.randn(rows, 8)
    forwards = torch.func.jvp(norm, (x,), (tangent,))[1]
    backwards = torch.func.jacrev(norm)(x).flatten(2).flatten(0, 1) @ tangent.flatten()
    assert torch.allclose(forwards.flatten(), backwards, atol=1e-5)


def test_where_nothing_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "normconvert").touch()
    assert run(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["normconvert"]
