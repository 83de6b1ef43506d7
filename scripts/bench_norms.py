"""How long the norms take on this CPU: median times, and ratios to the LayerNorm they replace.

python scripts/bench_norms.py [--threads N] [--dtype float32] [--json]

Runs alternate with the baseline's, so what else the machine does falls on both alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from normconvert.nn import (
    CRMSNorm,
    DeferredRMSNormLinear,
    PartialRMSNorm,
    RMSNorm,
    recenter,
)

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPES = ((1, 1, 768), (1, 512, 768), (1, 1, 2048), (4, 512, 2048))
SECONDS = 0.5  # per comparison
SAMPLE = 2e-4  # seconds; shorter calls are repeated until one sample takes about this long
EPS = 1e-5


def ratio(run: Callable[[], object], baseline: Callable[[], object]) -> tuple[float, float]:
    """The median time of `run` in seconds, and its median ratio to that of `baseline`."""
    calls = [max(1, int(SAMPLE / seconds(f, 5))) for f in (run, baseline)]
    times: list[float] = []
    ratios: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        one, other = seconds(run, calls[0]), seconds(baseline, calls[1])
        times.append(one)
        ratios.append(one / other)
    return statistics.median(times), statistics.median(ratios)


def seconds(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def norms(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Every norm on its own; the first is the baseline."""
    d = shape[-1]
    x = recenter(torch.randn(shape)).to(dtype)
    compressed = x[..., :-1].contiguous()
    modules: dict[str, nn.Module] = {
        "LayerNorm": nn.LayerNorm(d, EPS),
        "HF LlamaRMSNorm": LlamaRMSNorm(d, EPS),
        "RMSNorm": RMSNorm(d, EPS, gain=False),
        "RMSNorm, gain": RMSNorm(d, EPS),
        "RMSNorm, zero mean": RMSNorm(d, EPS, gain=False, zero_mean=True),
        "RMSNorm, zero mean, gain": RMSNorm(d, EPS, zero_mean=True),
        "pRMSNorm, 1/8": PartialRMSNorm(d, EPS, 1 / 8, gain=False),
        "CRMSNorm": CRMSNorm(d, EPS),
        "CRMSNorm, expand": CRMSNorm(d, EPS, expand=True),
    }
    return {
        name: partial(module.to(dtype), compressed if "CRMS" in name else x)
        for name, module in modules.items()
    }


def readers(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """A norm and its readers, 1/RMS before or after the product; the first is the baseline."""
    d = shape[-1]
    x = torch.randn(shape).to(dtype)
    norm = RMSNorm(d, EPS, gain=False)
    linears = [nn.Linear(d, out, bias=False, dtype=dtype) for out in (d, d // 4, d // 4)]
    deferred = [DeferredRMSNormLinear(linear, EPS) for linear in linears]

    def first(n: slice) -> list[torch.Tensor]:
        normed = norm(x)
        return [linear(normed) for linear in linears[n]]

    q, kv, all_three = slice(1), slice(1, 2), slice(3)
    return {
        "linear d to d": lambda: first(q),
        "linear d to d, deferred": lambda: deferred[0](x),
        "linear d to d/4": lambda: first(kv),
        "linear d to d/4, deferred": lambda: deferred[1](x),
        "q, k, v": lambda: first(all_three),
        "q, k, v, deferred": lambda: [module(x) for module in deferred],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for shape in SHAPES:
        cases = norms(shape, getattr(torch, options.dtype))
        pairs = [(name, next(iter(cases))) for name in cases]
        cases |= readers(shape, getattr(torch, options.dtype))
        pairs += [(name, name.removesuffix(", deferred")) for name in cases if "deferred" in name]
        for name, baseline in pairs:
            with torch.inference_mode():
                median, quotient = ratio(cases[name], cases[baseline])
            row = {"shape": shape, "norm": name, "baseline": baseline}
            rows.append({**row, "microseconds": median * 1e6, "ratio": quotient})
            if not options.json:
                print(f"{shape!s:16}{name:28}{median * 1e6:10.1f} µs {quotient:6.2f} × {baseline}")
    if options.json:
        head = {"torch": torch.__version__, "threads": options.threads, "dtype": options.dtype}
        print(json.dumps({**head, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
