"""Compare the logits of models several times as large as the memory that there is.

    python scripts/verify_within_limit.py [--limit-mib 1024] [--times 3]      (root; 8 GB of disk)

makes a random bfloat16 Llama of that many times the limit, folds its norms, and runs
`normconvert verify-equivalence` in a control group that has no more memory than the limit. Prints
how that ended, and the most that was used beside what is kept of files, which is given up when
memory is short. Whatever needs more is killed by the kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench_convert import make_llama

TREE = Path("/sys/fs/cgroup")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit-mib", type=int, default=1024)
    parser.add_argument("--times", type=float, default=3.0)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    options = parser.parse_args()
    limit = options.limit_mib << 20
    command = [sys.executable, "-m", "normconvert"]
    with tempfile.TemporaryDirectory(dir=options.folder) as name, control_group(limit) as group:
        source, output = Path(name, "source"), Path(name, "output")
        report = Path(name, "report.json")
        make_llama(source, round(options.times * limit))
        subprocess.run([*command, "flashnorm", source, "-o", output, "--no-verify"], check=True)
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command, "verify-equivalence", source, output, "--json", report],
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None,
        )
        taken = 0
        while process.poll() is None:
            taken = max(taken, used(group))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        nbytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        print(f"limit {options.limit_mib} MiB, each model {nbytes / 2**20:.0f} MiB: ", end="")
        print(f"status {process.returncode}, {seconds:.0f} s, ", end="")
        print(f"at most {taken / 2**20:.0f} MiB beside files")
        if process.returncode == 0:
            found = json.loads(report.read_text())
            print(f"equivalent, computed in {found['dtype']}: {found['notes']}")
    return process.returncode


def used(group: Path) -> int:
    """The bytes that the processes of `group` have now, without what is only kept of files."""
    lines = (group / "memory.stat").read_text().splitlines()
    found = dict(line.split() for line in lines)
    return int(found["anon"] if "anon" in found else found["rss"])


@contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """A control group that has `limit` bytes of memory, of either version."""
    first = (TREE / "memory").is_dir()
    place = TREE / ("memory" if first else "") / f"normconvert-{os.getpid()}"
    place.mkdir()
    try:
        name = "memory.limit_in_bytes" if first else "memory.max"
        (place / name).write_text(str(limit))
        yield place
    finally:
        place.rmdir()


if __name__ == "__main__":
    sys.exit(main())
