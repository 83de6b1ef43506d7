"""Fetching a checkpoint from the Hub, pinned to a commit, only the files it needs."""

from __future__ import annotations

from pathlib import Path

from normconvert.errors import SourceError, first_line

_OTHER_WEIGHTS = (
    ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".ot",
    ".mlmodel", ".tflite", ".nemo", ".pkl", ".npz",
)  # fmt: skip


def fetch(model: str, revision: str | None) -> tuple[Path, str | None]:
    """The folder that holds `model`, and the commit if it came from the Hub.

    Raises:
        SourceError: neither a folder nor a repository that can be read.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise SourceError(f"{model} is a local folder: --revision applies to Hub ids only.")
        return folder, None
    if folder.exists():
        raise SourceError(f"{model} is a file; give the folder of the checkpoint.")
    return _download(model, revision)


def _download(model: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    try:
        info = HfApi().model_info(model, revision=revision)
        wanted = needed_files([sibling.rfilename for sibling in info.siblings or ()])
        folder = snapshot_download(model, revision=info.sha, allow_patterns=wanted)
    except HFValidationError as error:
        raise SourceError(
            f"{model} is neither a folder nor the name of a Hub repository."
        ) from error
    except OfflineModeIsEnabled:
        return _cached(model, revision)
    except OSError as error:  # every HTTP and connection error of huggingface_hub is one
        raise SourceError(
            f"{model} is not a local folder, and the Hub did not give it: {first_line(error)}. "
            "Check the name, your connection and, for a gated model, HF_TOKEN."
        ) from error
    return Path(folder), str(info.sha)


def _cached(model: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise SourceError(
            f"{model} is not in the local cache and HF_HUB_OFFLINE is set; unset it to download."
        ) from error
    return folder, folder.name  # the cache names a snapshot's folder after its commit


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
