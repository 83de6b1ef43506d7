"""A checkpoint on disk: its configuration, its shards' headers, its other files."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from normconvert.errors import SourceError
from normconvert.source.header import Header, Shard, Tensor, read_header
from normconvert.source.hub import Extent, Snapshot, fetch
from normconvert.source.remote import remote_headers

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint. No weight has been read.

    `model` is what the user asked for; `commit` the Hub commit it was pinned to, None for a
    local folder. `model_class` is the class to run it in, if it is not for the config to say.
    """

    model: str
    folder: Path
    commit: str | None
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    model_class: type[Any] | None = None

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name on disk."""
        return {t.name: t for shard in self.shards for t in shard.header.tensors}

    @cached_property
    def paths(self) -> dict[str, Path]:
        """The file of every tensor."""
        return {t.name: shard.path for shard in self.shards for t in shard.header.tensors}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def has_index(self) -> bool:
        """Whether the shards are listed in an index file."""
        return self.shards[0].name != SINGLE_FILE


def open_checkpoint(
    model: str, *, revision: str | None = None, extent: Extent = "files"
) -> Checkpoint:
    """Open the local folder or the Hub repository `model`, reading headers only.

    `revision` is a branch, tag or commit of a Hub repository. Of its files `extent` says which are
    fetched. Its weights are not: their headers are read where they are, if the Hub's cache on this
    machine does not have them.

    Raises:
        SourceError: something is missing, damaged or unsupported; the message names it.
    """
    snapshot = fetch(model, revision, extent)
    folder = snapshot.folder
    config = read_json(folder / "config.json")
    _refuse_quantised(folder / "config.json", config)
    _refuse_other_weights(snapshot, config)
    names = _shard_names(snapshot)
    headers = _headers(model, snapshot, names)
    shards = tuple(Shard(name=name, path=folder / name, header=headers[name]) for name in names)
    checkpoint = Checkpoint(
        model=model, folder=folder, commit=snapshot.commit, config=config, shards=shards
    )
    if checkpoint.has_index:
        _check_index(folder, shards)
    _refuse_packed(checkpoint)
    return checkpoint


def opened(path: Path) -> int:
    """A descriptor to read the file `path`, which was there when the checkpoint was opened.

    Raises:
        SourceError: it is not there any more, or cannot be read.
    """
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises:
        SourceError: there is no such file, or it is not a JSON object.
    """
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise SourceError(f"{path} is no file; download it again.")
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise SourceError(
            f"{path.parent} has no {path.name}; give the folder of a Hugging Face checkpoint."
        ) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not JSON ({error}); download the file again.") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path} is not a JSON object; download the file again.")
    return content


def _headers(model: str, snapshot: Snapshot, names: list[str]) -> dict[str, Header]:
    here = [name for name in names if (snapshot.folder / name).is_file()]
    headers = {name: read_header(snapshot.folder / name) for name in here}
    there = [name for name in names if name not in headers]
    if there and snapshot.commit is not None:
        headers |= dict(zip(there, remote_headers(model, snapshot.commit, there), strict=True))
    return headers


def _shard_names(snapshot: Snapshot) -> list[str]:
    """The checkpoint's files, found as transformers finds them: one file, or an index."""
    if SINGLE_FILE in snapshot.names:
        return [SINGLE_FILE]
    if INDEX_FILE in snapshot.names:
        names = list(dict.fromkeys(_weight_map(snapshot.folder).values()))
        for name in names:
            _check_shard_name(snapshot, name)
        return names
    pickles = sorted(name for name in snapshot.names if name.endswith(".bin") and "/" not in name)
    if pickles:
        raise SourceError(
            f"{snapshot.place} holds its weights as a pickle ({pickles[0]}); save it as "
            "safetensors first: AutoModelForCausalLM.from_pretrained(FOLDER, dtype='auto')"
            ".save_pretrained(NEW_FOLDER)."
        )
    remedy = "give the folder of a checkpoint with safetensors weights"
    if snapshot.commit is not None:
        remedy += f", or {snapshot.remedy}"
    raise SourceError(f"{snapshot.place} has neither {SINGLE_FILE} nor {INDEX_FILE}; {remedy}.")


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX_FILE
    weight_map = read_json(path).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise SourceError(f"{path} has no weight_map; download the file again.")
    return weight_map


def _check_shard_name(snapshot: Snapshot, name: str) -> None:
    simple = (
        os.path.basename(name) == name and len(name.encode("utf-8", "replace")) <= _LONGEST_NAME
    )
    if name in ("", ".", "..") or not simple or "\\" in name or not name.isprintable():
        shown = name if len(name) <= _LONGEST_NAME else f"{name[:40]}..."
        raise SourceError(
            f"{snapshot.folder / INDEX_FILE} names {shown!r}, which is not a file beside it; "
            "normconvert reads nothing outside the checkpoint's folder."
        )
    if name not in snapshot.names:
        raise SourceError(
            f"The shard {name} is missing from {snapshot.place}, although {INDEX_FILE} names it; "
            f"{snapshot.remedy}."
        )


_LONGEST_NAME = 255  # bytes, on every common file system


def _check_index(folder: Path, shards: tuple[Shard, ...]) -> None:
    """The index and the headers must agree, or a tensor would be lost without a word."""
    placed: dict[str, str] = {}
    for file, header in ((shard.name, shard.header) for shard in shards):
        for name in (entry.name for entry in header.tensors):
            if placed.setdefault(name, file) != file:
                raise SourceError(
                    f"{file} in {folder} stores {name!r}, which another shard stores too "
                    f"({placed[name]}); download them again."
                )
    weight_map = _weight_map(folder)
    for tensor, shard in weight_map.items():
        if placed.get(tensor) != shard:
            raise SourceError(
                f"{INDEX_FILE} in {folder} says that {shard} holds {tensor!r}, but it does not; "
                "download both again."
            )
    for tensor, shard in placed.items():
        if tensor not in weight_map:
            raise SourceError(
                f"{shard} in {folder} holds {tensor!r}, which {INDEX_FILE} does not name; "
                "download both again."
            )


def _refuse_quantised(path: Path, config: dict[str, Any]) -> None:
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    keys = ("quantization_config", "compression_config")
    if found := next((part[key] for part in parts for key in keys if part.get(key)), None):
        method = found.get("quant_method", "unknown") if isinstance(found, dict) else found
        raise SourceError(
            f"{path} says that the weights are quantised (quant_method {method!r}); a gain "
            "cannot be folded into them exactly. Convert the unquantised checkpoint, then quantise."
        )


def _refuse_other_weights(snapshot: Snapshot, config: dict[str, Any]) -> None:
    """Transformers would load something else than the weights in the usual files."""
    named = config.get("transformers_weights")  # in the native format no file has that name
    if named in snapshot.names and named not in (SINGLE_FILE, INDEX_FILE):
        raise SourceError(
            f"{snapshot.folder / 'config.json'} says that the weights are in {named!r} "
            f"(transformers_weights); rename that file to {SINGLE_FILE} and remove the key."
        )
    if "adapter_config.json" in snapshot.names:
        raise SourceError(
            f"{snapshot.place} has an adapter beside the weights (adapter_config.json), which "
            "transformers applies where peft is installed; merge it (merge_and_unload), or take it "
            "out of the folder."
        )


def _refuse_packed(checkpoint: Checkpoint) -> None:
    for tensor in checkpoint.tensors.values():
        quantised = tensor.dtype.startswith("F8") or tensor.name.endswith((".qweight", ".qzeros"))
        packed = tensor.dtype in ("I8", "U8", "I32") and tensor.name.endswith("weight")
        if quantised or packed:
            raise SourceError(
                f"{checkpoint.paths[tensor.name]} stores {tensor.name!r} as {tensor.dtype}: the "
                "weights are quantised. Convert the unquantised checkpoint, then quantise."
            )
