"""Fetching a checkpoint from the Hub, pinned to a commit, only the files it needs."""

from __future__ import annotations

from pathlib import Path

from normconvert.errors import SourceError, first_line

_OTHER_WEIGHTS = (
    ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".ot",
    ".mlmodel", ".tflite", ".nemo", ".pkl", ".npz", ".bin.index.json", ".h5.index.json",
    ".msgpack.index.json",
)  # fmt: skip


def fetch(model: str, revision: str | None) -> tuple[Path, str | None]:
    """The folder that holds `model`, and the commit if it came from the Hub.

    Raises:
        SourceError: neither a folder nor a repository that can be read.
    """
    folder = local_path(model)
    if folder.is_dir():
        if revision is not None:
            raise SourceError(f"{model} is a local folder: --revision applies to Hub ids only.")
        return folder, None
    if folder.exists():
        raise SourceError(f"{model} is a file; give the folder of the checkpoint.")
    return _download(model, revision)


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


def _download(model: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().model_info(model, revision=revision)
        wanted = needed_files([sibling.rfilename for sibling in info.siblings or ()])
        # By the revision's name, not by its commit: so that a later run finds it offline.
        folder = snapshot_download(model, revision=revision, allow_patterns=wanted)
    except OfflineModeIsEnabled:
        return _cached(model, revision)
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
    except Exception as error:  # what its HTTP library raises is another class in every version
        raise SourceError(
            f"{model} is not a folder here, and asking the Hub for it failed "
            f"({first_line(error)}); check the path or your connection."
        ) from error
    return Path(folder), Path(folder).name  # the cache names a snapshot after its commit


def _cached(model: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model, "config.json", revision=revision)
    if not isinstance(config, str):
        raise SourceError(
            f"{model} is not a folder here and not in the Hub's cache, and HF_HUB_OFFLINE is set; "
            "check the path, or unset it to download."
        )
    return Path(config).parent, Path(config).parent.name


def needed_files(names: list[str]) -> list[str]:
    """Of a repository's files, those of a transformers checkpoint: no weights in other formats."""
    return [
        name
        for name in names
        if not name.endswith(_OTHER_WEIGHTS)
        and not (name.endswith(".safetensors") and not _is_shard(name))
    ]


def _is_shard(name: str) -> bool:
    return name == "model.safetensors" or (name.startswith("model-") and "/" not in name)
