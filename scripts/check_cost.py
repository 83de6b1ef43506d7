"""What `inspect` foretells of a conversion, beside what it takes.

    python scripts/check_cost.py [--gb 0.3 1 2.2] [--folder FOLDER]

For each size it makes a random bfloat16 Llama, measures what the disk of the folder writes and
reads (4 MiB at a time, not from the page cache, until all is on the disk), asks `inspect` at that
speed, and converts in a process of its own, with the source not in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_convert import make_llama

BLOCK = 4 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gb", type=float, nargs="+", default=[0.3, 1, 2.2])
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    options = parser.parse_args()
    print(f"{'GB':>5}{'MB/s':>7}{'':14}{'read MB':>10}{'written MB':>12}{'peak MB':>9}{'s':>7}")
    for size in options.gb:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            source, output = Path(name, "source"), Path(name, "output")
            make_llama(source, round(size * 1e9))
            speed = disk_speed(source)
            foretold = inspect(source, speed)
            found = convert(source, output)
        for what, row in (("foretold", foretold), ("found", found)):
            read, written, peak, seconds = row
            print(
                f"{size:5}{speed / 1e6:7.0f}{what:>14}{read / 1e6:10.0f}{written / 1e6:12.0f}"
                f"{peak / 1e6:9.0f}{seconds:7.1f}"
            )


def disk_speed(source: Path) -> int:
    """Bytes per second at which the largest file of `source` is copied, read and written added."""
    file = max(source.iterdir(), key=lambda path: path.stat().st_size)
    copy = source.with_name("copy")
    forget(source)
    start = time.perf_counter()
    with file.open("rb", buffering=0) as reading, copy.open("wb", buffering=0) as writing:
        while block := reading.read(BLOCK):
            writing.write(block)
        os.fsync(writing.fileno())
    seconds = time.perf_counter() - start
    size = copy.stat().st_size
    copy.unlink()
    return round(2 * size / seconds)


def inspect(source: Path, speed: int) -> tuple[float, float, float, float]:
    command = ["inspect", str(source), "--json", "--disk-speed", str(speed)]
    printed = subprocess.run([sys.executable, "-m", "normconvert", *command], stdout=-1, check=True)
    cost = json.loads(printed.stdout)["cost"]
    return cost["read_bytes"], cost["written_bytes"], cost["peak_bytes"], cost["seconds"]


def convert(source: Path, output: Path) -> tuple[float, float, float, float]:
    """Bytes are those of the process beyond those of one that only plans."""
    plain = run(source, output, "--dry-run")
    forget(source)
    start = time.perf_counter()
    whole = run(source, output)
    seconds = time.perf_counter() - start
    shutil.rmtree(output)
    return whole[0] - plain[0], whole[1] - plain[1], whole[2], seconds


def run(source: Path, output: Path, *options: str) -> tuple[int, int, int]:
    """Bytes read, bytes written, and the largest resident set of a process that converts."""
    code = (
        "import atexit, sys\n"
        "from normconvert.cli.main import main\n"
        "atexit.register(lambda: sys.stderr.write(open('/proc/self/io').read()))\n"
        "main()"
    )
    command = ["flashnorm", str(source), "--output", str(output), "--no-verify", *options]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed: {said}")
    counts = dict(line.split(": ") for line in said.splitlines() if ": " in line)
    return int(counts["rchar"]), int(counts["wchar"]), usage.ru_maxrss * 1024


def forget(folder: Path) -> None:
    """Have the files of `folder` on the disk and not in the page cache."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
