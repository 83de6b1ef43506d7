"""Time and memory of the certificate, beside `cat` of both checkpoints to /dev/null.

    python scripts/bench_certificate.py [--gb 2.2] [--runs 5]

makes a random bfloat16 Llama of that size, folds its norms, and in turn reads both with `cat` and
certifies the output; everything is in the page cache. Of the certificate's process, which traces
the model and plans first, only the certificate is timed. `cpu` is what all threads took together:
other work on the machine slows it less.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from bench_convert import make_llama

from normconvert.ir.event import ignore
from normconvert.planner import make_plan
from normconvert.rewrite import write
from normconvert.source import open_checkpoint
from normconvert.trace import trace
from normconvert.verify import certify

Times = tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gb", type=float, default=2.2, help="size of each checkpoint")
    parser.add_argument("--runs", type=int, default=5, help="rounds")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--certify", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.certify:
        print(json.dumps(certified(*options.certify)))
        return
    cats: list[Times] = []
    certificates: list[Times] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source, output = Path(name, "source"), Path(name, "output")
        make_llama(source, round(options.gb * 1e9))
        convert(source, output)
        again = [sys.executable, __file__, "--certify", str(source), str(output)]
        for turn in range(options.runs + 1):  # the first does not count
            cats.append(cat(source, output))
            done = subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True)
            seconds, cpu, peak = json.loads(done.stdout)
            certificates.append((seconds, cpu))
            print(f"round {turn}: {cats[-1][0]:.2f} s, {seconds:.2f} s", file=sys.stderr)
    for what, column in (("seconds", 0), ("cpu", 1)):
        one, other = ([each[column] for each in runs[1:]] for runs in (cats, certificates))
        ratio = median(b / a for a, b in zip(one, other, strict=True))
        print(f"{what:8} cat {median(one):.2f}  certificate {median(other):.2f}  x cat {ratio:.2f}")
    print(f"peak     {peak:.0f} MiB")


def convert(source: Path, output: Path) -> None:
    checkpoint = open_checkpoint(str(source))
    plan = make_plan(trace(checkpoint), checkpoint, ("flashnorm",))
    output.mkdir()
    write(plan, checkpoint, output, {"plan": plan.to_json()}, ignore)


def cat(*folders: Path) -> Times:
    """The seconds, and those of the processor."""
    files = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cpu


def certified(source: Path, output: Path) -> tuple[float, float, float]:
    """The seconds that the certificate takes, those of the processor, and the peak in MiB."""
    original, converted = open_checkpoint(str(source)), open_checkpoint(str(output))
    plan = make_plan(trace(original), original, ("flashnorm",))
    start, cpu = time.perf_counter(), time.process_time()
    certificate = certify(plan, original, converted, ignore)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    assert certificate.valid, certificate
    return seconds, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
