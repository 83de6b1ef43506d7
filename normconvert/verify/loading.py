"""Loading a checkpoint's model to run it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from normconvert.errors import NormconvertError, VerificationError, first_line
from normconvert.model_class import resolve
from normconvert.model_size import of_the_size
from normconvert.precision import computing_in
from normconvert.verify.placement import IN_MEMORY, Placement, read_plainly

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from normconvert.source import Checkpoint


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    trust_remote_code: bool,
    tensors: Mapping[str, torch.Tensor] | None = None,
    placement: Placement = IN_MEMORY,
    offload_folder: str | None = None,
) -> Any:
    """The model of `checkpoint` in `dtype`, of its own weights or of `tensors` in their place.

    In the implementations that take every dtype. What `placement` leaves on disk is read from the
    checkpoint, or where it is not stored as the model has it, written to `offload_folder`.

    Raises:
        VerificationError: it cannot be loaded, or not whole.
    """
    model_class, config = resolve(checkpoint, trust_remote_code)
    place: Any = checkpoint.folder if tensors is None else None
    try:
        with of_the_size(checkpoint), _making(dtype, placement):
            model, info = model_class.from_pretrained(
                place,
                config=config,
                state_dict=None if tensors is None else dict(tensors),
                dtype=dtype,
                attn_implementation="eager",
                device_map=_plain(placement.device_map),
                max_memory=_plain(placement.max_memory),
                offload_folder=offload_folder,
                output_loading_info=True,
            )
    except NormconvertError:
        raise
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
    read_plainly(model)
    return model.eval()


def _making(dtype: torch.dtype, placement: Placement) -> AbstractContextManager[None]:
    """Where a class that makes weights float32, whatever it is asked for, makes them float64.

    Not where weights are offloaded: the files that these go to are read in their stored dtype.
    """
    return computing_in(dtype) if placement == IN_MEMORY else nullcontext()


def _plain(option: Any) -> Any:
    return dict(option) if isinstance(option, Mapping) else option
