"""transformers and torch without their own bars and messages, which would stand between ours."""

from __future__ import annotations

import logging as standard
from contextlib import contextmanager
from typing import TYPE_CHECKING

from transformers.utils import logging

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers shows errors only, and torch not those that a trace raises anyway."""
    fake_tensors = standard.getLogger("torch._subclasses.fake_tensor")
    disabled, fake_tensors.disabled = fake_tensors.disabled, True
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        fake_tensors.disabled = disabled
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
