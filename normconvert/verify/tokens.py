"""What the models are compared on: real text by the checkpoint's tokenizer, and random tokens."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from normconvert.source import Checkpoint

SEQUENCES, LENGTH = 2, 128


def token_sets(
    checkpoint: Checkpoint,
    text: str | None,
    vocabulary: int,
    longest: int,
    trust_remote_code: bool,
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Named token ids of shape [sequences, length], and notes on what could not be had."""
    length = min(LENGTH, longest)
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(0, vocabulary, (SEQUENCES, length), generator=generator)
    tokenizer = _tokenizer(checkpoint, trust_remote_code)
    if tokenizer is None:
        return {"random": random}, ("No tokenizer could be loaded: only random tokens were read.",)
    shipped = files("normconvert.verify").joinpath("text.txt").read_text(encoding="utf-8")
    ids = tokenizer(text or shipped, return_tensors="pt", truncation=False)["input_ids"][0]
    if int(ids.max()) >= vocabulary or len(ids) < 2:
        return {"random": random}, ("The tokenizer does not fit the model: no text was read.",)
    whole = len(ids) // length
    if whole == 0:
        return {"text": ids.unsqueeze(0), "random": random}, ()
    count = min(SEQUENCES, whole)
    return {"text": ids[: count * length].reshape(count, length), "random": random}, ()


def _tokenizer(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    if not any((checkpoint.folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        # Said outright: left open, transformers would ask on the terminal.
        return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    except Exception:  # a tokenizer may need packages that are not there; text is not all we have
        return None


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
