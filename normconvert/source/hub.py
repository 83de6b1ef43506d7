"""Fetching files of a checkpoint from the Hub, pinned to a commit, and only those it needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from normconvert.errors import NormconvertError, SourceError, first_line

Extent: TypeAlias = Literal["config", "code", "files"]
"""What is fetched of a repository at first, beside the headers of its weights: what a plan is made
of, that and the code that it brings, or every file of the checkpoint but the weights."""

_OTHER_WEIGHTS = (
    ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".ot",
    ".mlmodel", ".tflite", ".nemo", ".pkl", ".npz", ".bin.index.json", ".h5.index.json",
    ".msgpack.index.json",
)  # fmt: skip
_WEIGHTS = ".safetensors"
_OF_A_PLAN = (
    "config.json", "model.safetensors.index.json", "normconvert.json", "adapter_config.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A checkpoint's folder; of a Hub repository its commit, and the files that it has there.

    `place` names where the files are looked for, `remedy` what to do if one is missing.
    """

    folder: Path
    commit: str | None
    names: frozenset[str]
    place: str
    remedy: str


def fetch(model: str, revision: str | None, extent: Extent) -> Snapshot:
    """The folder `model`, or what `extent` says of the Hub repository of that name.

    Raises:
        SourceError: neither a folder nor a repository that can be read.
    """
    folder = local_path(model)
    if folder.is_dir():
        if revision is not None:
            raise SourceError(f"{model} is a local folder: --revision applies to Hub ids only.")
        return Snapshot(
            folder=folder,
            commit=None,
            names=_files_in(folder),
            place=str(folder),
            remedy="download it",
        )
    if folder.exists():
        raise SourceError(f"{model} is a file; give the folder of the checkpoint.")
    return _download(model, revision, extent)


def local_path(model: str | Path) -> Path:
    """The path `model`, with ~ for a home folder.

    Raises:
        SourceError: it is empty, it names the home of a user that does not exist, or links lead in
            a circle.
    """
    if not str(model):
        raise SourceError("MODEL is empty; give a local folder or a Hub id.")
    try:
        path = Path(model).expanduser()
        path.resolve()
    except RuntimeError as error:
        raise SourceError(f"{model} is not a path: {error}") from error
    return path


def fetch_weights(model: str, commit: str, names: Iterable[str]) -> None:
    """Have the files `names` of a repository in the Hub's cache.

    Raises:
        SourceError: they cannot be had.
    """
    from huggingface_hub import snapshot_download

    with refusals(model):
        snapshot_download(model, revision=commit, allow_patterns=list(names))


def _download(model: str, revision: str | None, extent: Extent) -> Snapshot:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    with refusals(model, revision):
        try:
            info = HfApi().model_info(model, revision=revision)
            names = [sibling.rfilename for sibling in info.siblings or ()]
            # By the revision's name, not by its commit: so that a later run finds it offline.
            folder = snapshot_download(
                model, revision=revision, allow_patterns=needed_files(names, extent)
            )
        except OfflineModeIsEnabled:
            return _cached(model, revision)
    return Snapshot(
        folder=Path(folder),
        commit=Path(folder).name,  # the cache names a snapshot after its commit
        names=frozenset(names),
        place=f"{model} on the Hub",
        remedy="give another --revision",
    )


def _cached(model: str, revision: str | None) -> Snapshot:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model, "config.json", revision=revision)
    if not isinstance(config, str):
        raise SourceError(
            f"{model} is not a folder here and not in the Hub's cache, and HF_HUB_OFFLINE is set; "
            "check the path, or unset it to download."
        )
    folder = Path(config).parent
    return Snapshot(
        folder=folder,
        commit=folder.name,
        names=_files_in(folder),
        place=f"the Hub's cache of {model}",
        remedy="unset HF_HUB_OFFLINE to download it",
    )


def _files_in(folder: Path) -> frozenset[str]:
    try:
        return frozenset(path.name for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise SourceError(f"{folder} cannot be read: {error.strerror or error}.") from error


@contextmanager
def refusals(model: str, revision: str | None = None) -> Iterator[None]:
    """What the Hub may answer when it is asked for files of `model`, as one sentence each."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except NormconvertError:
        raise
    except OfflineModeIsEnabled as error:
        raise SourceError(
            f"{model} is only in part in the Hub's cache, and HF_HUB_OFFLINE is set; unset it to "
            "download the rest."
        ) from error
    except HFValidationError as error:
        raise SourceError(
            f"{model} is neither a folder nor the name of a Hub repository; check the path."
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(
            f"{model} on the Hub has no branch, tag or commit {revision!r}; give another "
            "--revision."
        ) from error
    except GatedRepoError as error:
        raise SourceError(
            f"{model} is gated: accept its terms on its page on the Hub, then log in with "
            "`hf auth login` or set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"{model} is neither a folder here nor a repository that the Hub shows you; check the "
            "name, and if it is private log in with `hf auth login` or set HF_TOKEN."
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        said = _ANSWERS.get(status, "The Hub did not give {}: {}. Try again later.")
        raise SourceError(said.format(model, first_line(error))) from error
    except Exception as error:  # what its HTTP library raises is another class in every version
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        raise SourceError(
            f"{model} is not a folder here, and asking the Hub for it failed "
            f"({first_line(error)}); check the path or your connection."
        ) from error


_ANSWERS = {
    401: "The Hub does not take your token for {}; log in with `hf auth login`, or set another "
    "HF_TOKEN.",
    403: "Your token may not read {}; give one with the permission to read it.",
    429: "The Hub asks you to wait before you read {} again; try in a few minutes.",
}


def needed_files(names: Iterable[str], extent: Extent) -> list[str]:
    """Of a repository's files those of `extent`: no weights, in this format or another."""
    if extent == "files":
        return [name for name in names if not name.endswith((*_OTHER_WEIGHTS, _WEIGHTS))]
    return [
        name
        for name in names
        if name.rpartition("/")[2] in _OF_A_PLAN or (extent == "code" and name.endswith(".py"))
    ]
