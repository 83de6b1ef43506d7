"""The norms with gradients, forward and backward, against torch's LayerNorm with gain and bias.

python scripts/bench_norm_gradients.py [--rows N ...] [--dtype D] [--threads N] [--seconds S]

Times as fast as LayerNorm, the median and the quartiles of the rounds, hidden size 768.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn

from normconvert.benchmark.rounds import measured, stopwatch
from normconvert.nn import CRMSNorm, PartialRMSNorm, RMSNorm

D, EPS = 768, 1e-5
NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(D, EPS),
    "RMSNorm": lambda: RMSNorm(D, EPS, gain=False),
    "RMSNorm, gain": lambda: RMSNorm(D, EPS),
    "RMSNorm, gain and bias (as_rmsnorm)": lambda: RMSNorm(D, EPS, bias=True),
    "pRMSNorm, 1/16": lambda: PartialRMSNorm(D, EPS, 1 / 16, gain=False),
    "CRMSNorm": lambda: CRMSNorm(D, EPS),
    "CRMSNorm, d out, gain and bias (as_crmsnorm)": lambda: CRMSNorm(
        D, EPS, gain=True, bias=True, expand=True
    ),
}


def pass_of(norm: nn.Module, rows: int, dtype: torch.dtype) -> Callable[[], None]:
    """One pass forward and one back, with fresh gradients."""
    norm.to(dtype)
    width = D - isinstance(norm, CRMSNorm)
    x = torch.randn(rows, width).to(dtype).requires_grad_()
    above = torch.randn_like(norm(x))

    def run() -> None:
        norm(x).backward(above)
        x.grad = None
        norm.zero_grad()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 512, 4096])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for rows in options.rows:
        dtype, cpu = getattr(torch, options.dtype), torch.device("cpu")
        watches = {
            name: stopwatch(pass_of(make(), rows, dtype), cpu) for name, make in NORMS.items()
        }
        found = measured("norm", rows, watches, options.seconds)
        print(f"{rows} rows, {options.dtype}, {found.rounds} rounds")
        for each in found.timings:
            speed = each.speedup
            print(
                f"  {each.name:45} {each.seconds.median * 1e6:9.1f} µs"
                f"  {speed.median:.2f} ({speed.lower:.2f} to {speed.upper:.2f})"
            )


if __name__ == "__main__":
    main()
