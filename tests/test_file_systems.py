"""What disks and network shares do: one sentence, status 2, and nothing lost."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import normconvert
import zoo
from command_line import Run, assert_sentence, listing, nothing_written, run, run_here
from normconvert.ir.event import Event
from normconvert.rewrite import writer

WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    zoo.save("llama", tmp_path / "model", dtype="float32")
    return tmp_path / "model"


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@contextmanager
def mounted(kind: str, place: Path, options: str) -> Iterator[None]:
    """A file system at `place`; the test is skipped where the kernel does not allow one."""
    place.mkdir(exist_ok=True)
    mount = ["mount", "-t", kind, "-o", options, kind, str(place)]
    try:
        allowed = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_file_system_that_renames_no_folder(model: Path, tmp_path: Path) -> None:
    """An overlay renames no folder of its lower layer: an older output in a container's image."""
    lower, disk, place = (tmp_path / name for name in ("lower", "disk", "place"))
    lower.mkdir()
    normconvert.convert(model, lower / "output", verify=False)
    with mounted("tmpfs", disk, "size=8m"):
        for name in ("upper", "work"):
            (disk / name).mkdir()
        layers = f"lowerdir={lower},upperdir={disk}/upper,workdir={disk}/work"
        with mounted("overlay", place, layers):
            before = content(place)
            assert before
            result = run_here(
                "flashnorm", model, "-o", place / "output", "--force", "--no-verify", cwd=tmp_path
            )
            result.assert_refused(str(place / "output"), "renamed", "Invalid cross-device link")
            assert content(place) == before


@pytest.mark.parametrize(
    ("failing", "force", "number"),
    [(1, False, errno.EXDEV), (1, True, errno.EPERM), (2, True, errno.ENOTEMPTY)],
)
def test_a_rename_that_fails(
    failing: int,
    force: bool,
    number: int,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The older output's, or the new one's after it: what had the name has it still."""
    if force:
        normconvert.convert(model, tmp_path / "output", verify=False)
    rename, renamed = Path.rename, 0

    def refusing(path: Path, target: Path) -> Path:
        nonlocal renamed
        renamed += path.is_dir()
        if path.is_dir() and renamed == failing:
            raise OSError(number, os.strerror(number))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refusing)
    with nothing_written(tmp_path), pytest.raises(normconvert.NormconvertError) as caught:
        normconvert.convert(model, tmp_path / "output", verify=False, force=force)
    assert renamed >= failing
    assert_sentence(str(caught.value), "output", os.strerror(number), "another file system")


def test_an_older_output_that_cannot_be_put_back(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The share goes away between the two renames: the sentence says where it is; it comes back."""
    normconvert.convert(model, tmp_path / "output", verify=False)
    before = content(tmp_path / "output")
    rename, renamed = Path.rename, 0

    def breaking(path: Path, target: Path) -> Path:
        nonlocal renamed
        renamed += path.is_dir()
        if renamed > 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", breaking)
        with pytest.raises(normconvert.NormconvertError) as caught:
            normconvert.convert(model, tmp_path / "output", verify=False, force=True)
    (kept,) = tmp_path.glob(".output.normconvert-*-old")
    assert_sentence(str(caught.value), str(kept))
    assert content(kept) == before
    assert not (tmp_path / "output").exists()
    with pytest.raises(normconvert.NormconvertError, match="exists"):
        normconvert.convert(model, tmp_path / "output", verify=False)
    assert content(tmp_path / "output") == before
    assert not kept.exists()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EIO])
def test_fsync(number: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems cannot do it to a folder, which is no failure; a disk's error is one."""
    failed = []

    def refusing(_: int) -> None:
        failed.append(number)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refusing)
    before = listing(tmp_path)
    if number == errno.EIO:
        with nothing_written(tmp_path), pytest.raises(normconvert.NormconvertError) as caught:
            normconvert.convert(model, tmp_path / "output", verify=False)
        assert_sentence(str(caught.value), "output", "Input/output error")
    else:
        normconvert.convert(model, tmp_path / "output", verify=False)
        assert (tmp_path / "output" / WEIGHTS).is_file()
        assert {name for name in listing(tmp_path) if not name.startswith("output")} == {*before}
    assert failed


def test_a_read_only_file_system(model: Path, tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "disk", "ro"):
        result = run_here("flashnorm", model, "-o", "disk/output", cwd=tmp_path)
    result.assert_refused("disk", "--output")


def vanish(path: Path) -> None:
    path.unlink(missing_ok=True)


def shrink(path: Path) -> None:
    os.truncate(path, 1000)


@pytest.mark.parametrize(
    ("change", "moment", "words"),
    [
        (vanish, "when it was traced", "No such file"),
        (vanish, "when it is written", "No such file"),
        (shrink, "when it was traced", "shorter"),
        (shrink, "when it is written", "shorter"),
    ],
)
def test_a_source_that_does_not_stay(
    change: Callable[[Path], None],
    moment: str,
    words: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its header was read, and its weights are not there: the older output stays."""
    normconvert.convert(model, tmp_path / "output", verify=False)
    before = content(tmp_path / "output")
    changed: list[Path] = []

    def listen(event: Event) -> None:
        if moment == "when it was traced" and event.stage == "tracing" and event.done:
            change(model / WEIGHTS)
            changed.append(model / WEIGHTS)

    spans = writer._write_spans

    def write_spans(*given: Any) -> int:
        if moment == "when it is written":
            change(model / WEIGHTS)
            changed.append(model / WEIGHTS)
        return spans(*given)

    monkeypatch.setattr(writer, "_write_spans", write_spans)
    with pytest.raises(normconvert.NormconvertError) as caught:
        normconvert.convert(model, tmp_path / "output", verify=False, force=True, listen=listen)
    assert changed
    assert_sentence(str(caught.value), str(model / WEIGHTS), words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "output"]
    assert content(tmp_path / "output") == before


def test_a_source_that_changes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size stays, its bytes do not: the output would be of both."""
    spans = writer._write_spans

    def write_spans(*given: Any) -> int:
        data = (model / WEIGHTS).read_bytes()
        (model / WEIGHTS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return spans(*given)

    monkeypatch.setattr(writer, "_write_spans", write_spans)
    with pytest.raises(normconvert.RewriteError) as caught:
        normconvert.convert(model, tmp_path / "output", verify=False)
    assert_sentence(str(caught.value), str(model), "changed while it was read")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_source_that_links_into_the_output(model: Path, tmp_path: Path) -> None:
    """To replace the output would be to replace the source."""
    normconvert.convert(model, tmp_path / "output", verify=False)
    before = content(tmp_path / "output")
    (model / WEIGHTS).unlink()
    (model / WEIGHTS).symlink_to(tmp_path / "output" / WEIGHTS)
    with pytest.raises(normconvert.RewriteError) as caught:
        normconvert.convert(model, tmp_path / "output", verify=False, force=True)
    assert_sentence(str(caught.value), str(model / WEIGHTS), "links into the output")
    assert content(tmp_path / "output") == before


@pytest.mark.parametrize("force", [False, True], ids=["first", "force"])
def test_two_conversions_into_one_output(force: bool, model: Path, tmp_path: Path) -> None:
    """Another process begins and ends while this one writes: each output is whole, or refused."""
    forced = ["--force"] * force
    others: list[Run] = []

    def listen(event: Event) -> None:
        if event.stage == "writing" and not others:
            others.append(
                run("flashnorm", model, "-o", "output", "--no-verify", *forced, cwd=tmp_path)
            )

    if force:
        normconvert.convert(model, tmp_path / "output", verify=False, force=True, listen=listen)
    else:
        with pytest.raises(normconvert.NormconvertError) as caught:
            normconvert.convert(model, tmp_path / "output", verify=False, listen=listen)
        assert_sentence(str(caught.value), "exists", "--force")
    assert others[0].status == 0, others[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "output"]
    normconvert.convert(model, tmp_path / "alone", verify=False)
    assert content(tmp_path / "output") == content(tmp_path / "alone")
