"""What the models are compared on: real text by the checkpoint's tokenizer, and random input."""

from __future__ import annotations

from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from normconvert.images import accepted
from normconvert.model_inputs import (
    longest,
    main_input,
    main_shape,
    optional_inputs,
    plain_inputs,
    reads_ids,
)
from normconvert.precision import computing_in
from normconvert.towers import images_beside
from normconvert.verify.placement import input_device, on_disk
from normconvert.verify.stored import Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from normconvert.source import Checkpoint

SEQUENCES, LENGTH, LENGTH_ON_DISK = 2, 128, 32


def input_sets(
    model: Any,
    checkpoint: Checkpoint,
    text: str | None,
    trust_remote_code: bool,
    *,
    other: Checkpoint | None = None,
) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """Named inputs for `model`, of `checkpoint`, and notes on what could not be had.

    If the checkpoint `other` embeds some tokens in another way, and not all, these are among them.

    Raises:
        TraceError: the model takes an input that is not known.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary, length = _limits(model) if reads_ids(model) else (0, LENGTH)
    # Images and spectra need no ids, except for a decoder.
    random = torch.randint(0, vocabulary or 1, (SEQUENCES, length), generator=generator)
    main = main_input(model)
    notes: tuple[str, ...] = ()
    if main != "input_ids":
        drawn = _drawn(model, length, generator)
        sets = {_name(main): plain_inputs(model, drawn, random)}
    else:
        tokens, notes = _token_sets(checkpoint, text, vocabulary, random, trust_remote_code)
        if other is not None:
            tokens |= _differing_tokens(model, checkpoint, other, length, generator)
        sets = {name: plain_inputs(model, ids, ids) for name, ids in tokens.items()}
        sets = _with_images(model, generator, sets)
    sets |= _optional_sets(model, length, generator, [*sets.values()][-1])
    return tree_map(moved_to(model), sets), notes


def _with_images(
    model: Any, generator: torch.Generator, sets: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The `sets` of text, with images if the model cannot do without: one that writes text can."""
    if model.can_generate() or "pixel_values" not in accepted(model.forward):
        return sets
    try:
        with torch.no_grad(), computing_in(model.dtype):
            model(**tree_map(moved_to(model), next(iter(sets.values()))))
    except Exception:  # whatever a model raises that has no images
        draw = partial(drawn_like, generator)
        return {
            name: inputs | tree_map(draw, images_beside(model, len(inputs["input_ids"])))
            for name, inputs in sets.items()
        }
    return sets


def _differing_tokens(
    model: Any, one: Checkpoint, other: Checkpoint, length: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Tokens of the rows, not all of them, in which the input embeddings differ on disk."""
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # transformers does not find them in a class of one's own
        return {}
    names = (name for name, part in model.named_modules() if part is embeddings)
    name = f"{next(names, None)}.weight"
    known, found = one.tensors.get(name), other.tensors.get(name)
    if known is None or found is None or (known.shape, known.dtype) != (found.shape, found.dtype):
        return {}
    rows = known.shape[0]
    width = known.nbytes // rows
    different = torch.zeros(rows, dtype=torch.bool)
    with Stored(one) as before, Stored(other) as after:
        for start in range(0, rows, _ROWS):
            stop = min(start + _ROWS, rows)
            a, b = (
                np.frombuffer(each.bytes(name, start * width, stop * width), np.uint8)
                for each in (before, after)
            )
            unlike = (a != b).reshape(stop - start, width).any(1)
            different[start:stop] = torch.from_numpy(unlike)
    ids = different.nonzero().flatten()
    if len(ids) in (0, rows):
        return {}
    chosen = ids[torch.randperm(len(ids), generator=generator)][: SEQUENCES * length]
    filled = chosen.repeat(SEQUENCES * length)[: SEQUENCES * length]
    return {"differing tokens": filled.reshape(SEQUENCES, length)}


_ROWS = 4096  # of an embedding, read at once


def _optional_sets(
    model: Any, length: int, generator: torch.Generator, plain: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """The inputs `plain` with those that the model can do without, if it can do with them."""
    zeros = optional_inputs(model, SEQUENCES, length)
    if not zeros:
        return {}
    inputs = {**plain, **tree_map(partial(random_like, generator), zeros)}
    try:
        with torch.no_grad(), computing_in(model.dtype):
            model(**tree_map(moved_to(model), inputs))
    except Exception:  # whatever a model raises that has no use for them
        return {}
    return {f"with {', '.join(zeros)}": inputs}


def drawn_like(generator: torch.Generator, given: Any) -> Any:
    """Random numbers for zeros, but not for sizes and tokens."""
    if not isinstance(given, torch.Tensor) or not given.is_floating_point():
        return given
    return random_like(generator, given)


def random_like(generator: torch.Generator, zeros: torch.Tensor) -> torch.Tensor:
    drawn = torch.randn(zeros.shape, generator=generator, dtype=torch.float64)
    return drawn > 0 if zeros.dtype is torch.bool else drawn.to(zeros.dtype)


def moved_to(model: Any) -> Callable[[Any], Any]:
    """What moves a tensor to where `model` wants its inputs."""
    device = input_device(model)
    return lambda each: each.to(device) if isinstance(each, torch.Tensor) else each


def _drawn(model: Any, length: int, generator: torch.Generator) -> torch.Tensor:
    shape = main_shape(model, SEQUENCES, length)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(model.dtype)


def _name(main: str) -> str:
    return "spectra" if main == "input_features" else "images"


def _limits(model: Any) -> tuple[int, int]:
    """The vocabulary of the model, and how many tokens of it are read at once."""
    most = LENGTH_ON_DISK if on_disk(model) else LENGTH
    return model.config.get_text_config().vocab_size, min(most, longest(model) or most)


def _token_sets(
    checkpoint: Checkpoint,
    text: str | None,
    vocabulary: int,
    random: torch.Tensor,
    trust_remote_code: bool,
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Token ids of shape [sequences, length], and notes on what could not be had."""
    length = random.shape[1]
    tokenizer = _tokenizer(checkpoint, trust_remote_code)
    if tokenizer is None:
        return {"random": random}, ("No tokenizer could be loaded: only random tokens were read.",)
    ids = tokenizer(text or _shipped_text(), return_tensors="pt", truncation=False)["input_ids"][0]
    if int(ids.max()) >= vocabulary or len(ids) < 2:
        return {"random": random}, ("The tokenizer does not fit the model: no text was read.",)
    whole = len(ids) // length
    if whole == 0:
        return {"text": ids.unsqueeze(0), "random": random}, ()
    count = min(SEQUENCES, whole)
    return {"text": ids[: count * length].reshape(count, length), "random": random}, ()


def unlike_tokenizers(
    one: Checkpoint, other: Checkpoint, text: str | None, trust_remote_code: bool
) -> tuple[str, ...]:
    """The files that may be why the tokenizers of two checkpoints have unlike tokens.

    Or make other ones of `text`, or else the shipped one. None of a checkpoint without one.
    """
    tokenizers = [_tokenizer(each, trust_remote_code) for each in (one, other)]
    if None in tokenizers:
        return ()
    said = text or _shipped_text()
    first, second = ((each(said)["input_ids"], each.get_vocab()) for each in tokenizers)
    if first == second:
        return ()
    places = ([each.folder / name for each in (one, other)] for name in _TOKENIZER_FILES)
    return tuple(a.name for a, b in places if _content(a) != _content(b))


def lacking_tokenizer(
    one: Checkpoint, other: Checkpoint, trust_remote_code: bool
) -> tuple[str, ...]:
    """A note on which of two checkpoints has no tokenizer that loads, if the other one has."""
    lacking = [each for each in (one, other) if _tokenizer(each, trust_remote_code) is None]
    if len(lacking) != 1:
        return ()
    return (f"{lacking[0].model} has no tokenizer that loads; the other one has.",)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _shipped_text() -> str:
    return files("normconvert.verify").joinpath("text.txt").read_text(encoding="utf-8")


def as_text(checkpoint: Checkpoint, ids: Sequence[int], trust_remote_code: bool) -> str:
    """The text of `ids`; themselves where there is no tokenizer."""
    tokenizer = _tokenizer(checkpoint, trust_remote_code)
    return " ".join(map(str, ids)) if tokenizer is None else str(tokenizer.decode(ids))


def _tokenizer(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    if not any((checkpoint.folder / name).is_file() for name in _TOKENIZER_FILES[:5]):
        return None
    try:
        # Said outright: left open, transformers would ask on the terminal.
        return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    except Exception:  # a tokenizer may need packages that are not there; text is not all we have
        return None


_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json",
)  # fmt: skip  # one of the first five holds the tokens
