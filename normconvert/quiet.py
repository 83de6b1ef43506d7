"""transformers and torch without their own bars and messages, which would stand between ours."""

from __future__ import annotations

import logging as standard
from contextlib import contextmanager
from typing import TYPE_CHECKING

from transformers.utils import logging

if TYPE_CHECKING:
    from collections.abc import Iterator


_LOGGERS = ("torch._subclasses.fake_tensor", "accelerate.big_modeling")


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers shows errors only, and torch not those that a trace raises anyway.

    And accelerate does not tell that weights are on disk, where they were put.
    """
    loggers = [standard.getLogger(name) for name in _LOGGERS]
    disabled = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, before in zip(loggers, disabled, strict=True):
            logger.disabled = before
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
