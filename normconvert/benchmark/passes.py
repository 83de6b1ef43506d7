"""Forward passes of a model: a prompt at once, and token by token after it."""

from __future__ import annotations

import copy
import inspect
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from normconvert.benchmark.rounds import Stopwatch, stopwatch, synchronize
from normconvert.model_inputs import main_input, main_shape, plain_inputs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from normconvert.ir.bench import Task

PROMPT = 512
STEPS = 8
"""Tokens to decode for one sample, so that the clock and the copied cache do not count."""

_POSITIONS = ("max_position_embeddings", "max_target_positions")


def writes_text(model: Any) -> bool:
    """Whether `model` is a decoder alone, which reads a prompt and then writes token by token."""
    cached = _takes(model, _cache_name(model))
    alone = _takes(model, "input_ids") and not _takes(model, "decoder_input_ids")
    return alone and cached and _takes(model, "use_cache") and bool(model.can_generate())


def tasks(model: Any) -> tuple[Task, ...]:
    """What is measured of `model`."""
    return ("prefill", "decode") if writes_text(model) else ("forward",)


def reads_text(model: Any) -> bool:
    """Whether what `model` reads is tokens."""
    return main_input(model) == "input_ids"


def passing(task: Task, model: Any, length: int, *, compiled: bool) -> Stopwatch:
    """A stopwatch of the `task` on a prompt of `length` tokens; it has run once, compiled too."""
    if task == "forward":
        return _forward(model, inputs_of(model, length), compiled=compiled)
    ids = random_ids(model, length + STEPS)
    if task == "prefill":
        return _prefill(model, ids[:, :-STEPS], compiled=compiled)
    return _decode(model, ids, compiled=compiled)


def prompt_length(model: Any) -> int:
    """As many tokens as `PROMPT`, or as the model has positions for."""
    text = model.config.get_text_config()
    known: list[int | None] = [getattr(text, name, None) for name in _POSITIONS]
    return max(1, min([PROMPT, *(size - STEPS for size in known if size)]))


def random_ids(model: Any, length: int) -> torch.Tensor:
    """Token ids, [1, length], the same for every model of a vocabulary."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (1, length), generator=generator).to(model.device)


def inputs_of(model: Any, length: int) -> dict[str, Any]:
    """What a model takes that writes no text, or not alone: tokens, an image, a spectrum."""
    if main_input(model) == "input_ids":
        main = ids = random_ids(model, length)
    else:
        generator = torch.Generator().manual_seed(0)
        main = torch.randn(main_shape(model, 1, length), generator=generator)
        main = main.to(model.device, model.dtype)
        ids = random_ids(model, length) if _takes(model, "decoder_input_ids") else main
    return plain_inputs(model, main, ids)


def _forward(model: Any, inputs: Mapping[str, Any], *, compiled: bool) -> Stopwatch:
    """One forward pass on `inputs`."""
    return stopwatch(partial(_compiled(model) if compiled else model, **inputs), model.device)


def _prefill(model: Any, ids: torch.Tensor, *, compiled: bool) -> Stopwatch:
    """A forward pass on the prompt `ids`, [1, length], with the logits of its last token alone.

    It fills a new cache, but for a compiled one: transformers does not compile a prefill that does.
    """
    last = {"logits_to_keep": 1} if _takes(model, "logits_to_keep") else {}
    return _forward(model, {"input_ids": ids, "use_cache": not compiled, **last}, compiled=compiled)


def _decode(model: Any, ids: torch.Tensor, *, compiled: bool) -> Stopwatch:
    """Token by token after the prompt `ids`, [1, length + STEPS] with the tokens that follow.

    Every sample begins with a copy of the cache as it is after the prompt. A compiled model has a
    cache of a fixed size, as in `generate(cache_implementation="static")`.
    """
    from transformers import Cache, StaticCache

    prompt, tokens = ids[:, :-STEPS], torch.split(ids[:, -STEPS:], 1, dim=1)
    name = _cache_name(model)
    empty = StaticCache(config=model.config, max_cache_len=ids.shape[1]) if compiled else None
    output = model(input_ids=prompt, use_cache=True, **{name: empty})
    filled = next((value for value in output.values() if isinstance(value, Cache)), None)
    if filled is None:
        raise ValueError("it returns no cache")
    run = _compiled(model) if compiled else model

    def seconds() -> float:
        cache = copy.deepcopy(filled)
        synchronize(model.device)
        start = time.perf_counter()
        for token in tokens:
            run(input_ids=token, use_cache=True, **{name: cache})
        synchronize(model.device)
        return (time.perf_counter() - start) / STEPS

    seconds()
    return seconds


def _compiled(model: Any) -> Any:
    """`model` through `torch.compile`, as if no other were compiled in this process.

    torch keeps what it has compiled with the code object, which models of a class share: each call
    would look through what belongs to the others first, which takes longer than a small norm.
    """

    def run(**inputs: Any) -> Any:
        return model(**inputs)

    run.__code__ = run.__code__.replace()  # a copy
    return torch.compile(run, dynamic=False)


def _cache_name(model: Any) -> str:
    return "cache" if _takes(model, "cache") else "past_key_values"  # before transformers 5.24


def _takes(model: Any, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters
