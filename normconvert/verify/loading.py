"""Loading a checkpoint's model to run it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from normconvert.errors import VerificationError, first_line
from normconvert.model_class import resolve

if TYPE_CHECKING:
    from collections.abc import Mapping

    from normconvert.source import Checkpoint


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    trust_remote_code: bool,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> Any:
    """The model of `checkpoint` in `dtype`, of its own weights or of `tensors` in their place.

    In the implementations that take every dtype.

    Raises:
        VerificationError: it cannot be loaded, or not whole.
    """
    model_class, config = resolve(checkpoint, trust_remote_code)
    place: Any = checkpoint.folder if tensors is None else None
    try:
        model, info = model_class.from_pretrained(
            place,
            config=config,
            state_dict=None if tensors is None else dict(tensors),
            dtype=dtype,
            attn_implementation="eager",
            output_loading_info=True,
        )
    except Exception as error:  # transformers and model code may raise anything
        raise VerificationError(
            f"transformers cannot load {checkpoint.folder}: {first_line(error)}."
        ) from error
    incomplete = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if incomplete:
        raise VerificationError(
            f"{checkpoint.folder} does not load whole: {sorted(incomplete)[0]!r} is missing "
            f"or has another shape ({len(incomplete)} such tensors)."
        )
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    if dtype is torch.float64:
        model.double()  # what transformers keeps in float32, whatever it was asked for
    return model.eval()
