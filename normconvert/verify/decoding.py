"""Token by token: with a cache, and on one token, a model runs other code than on a whole text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor

from normconvert.ir.report import Generation
from normconvert.precision import computing_in
from normconvert.verify.placement import on_disk
from normconvert.verify.tokens import as_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from normconvert.source import Checkpoint

PROMPT, PADDING = 12, 3
STEPS, GREEDY = 4, 16
STEPS_ON_DISK, GREEDY_ON_DISK = 2, 4
"""Where every token means that all weights are read."""


class _Forced(LogitsProcessor):  # type: ignore[misc]  # transformers imports it lazily
    """Leaves only the next token of `ids`, [sequences, length], to choose."""

    def __init__(self, ids: torch.Tensor) -> None:
        self._ids = ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, self._ids[:, input_ids.shape[1], None], 0.0)


def tokens_to_step(
    model: Any, sets: dict[str, dict[str, Any]]
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """What to generate from, [1, PROMPT], and the tokens to step on, [sequences, length].

    The first ones of the first of the inputs `sets`, and of the last; None if these are no tokens,
    or not enough, or the model takes no such steps.
    """
    first, last = (inputs.get("input_ids") for inputs in ([*sets.values()][i] for i in (0, -1)))
    if first is None or last is None or not model.can_generate():
        return None, None
    length = PROMPT + (STEPS_ON_DISK if on_disk(model) else STEPS)
    if min(first.shape[1], last.shape[1]) < length:
        return None, None
    return first[:1, :PROMPT], last[:, :length]


def stepwise_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The logits after the first tokens of `ids`, of one more at a time, [positions, vocabulary].

    As in generation, but for the choice of the tokens: two models are to be compared on the same.
    All sequences but the first begin with padding, if the model's code can do with it.
    """
    prompt, forced = ids[:, :PROMPT], [_Forced(ids)]
    steps = min(STEPS, ids.shape[1] - PROMPT)
    mask = torch.ones_like(prompt)
    mask[1:, :PADDING] = 0
    try:
        output = _generated(model, prompt, steps, forced, mask)
    except Exception:  # a model's own code may raise anything
        output = _generated(model, prompt, steps, forced)
    return torch.cat(output.logits)


def continuation(model: Any, prompt: torch.Tensor) -> tuple[int, ...] | None:
    """The tokens that `model` finds the likeliest after `prompt`, [1, length].

    None if it does not generate by itself.
    """
    count = GREEDY_ON_DISK if on_disk(model) else GREEDY
    try:
        with torch.no_grad(), computing_in(model.dtype):
            output = _generated(model, prompt, count, [])
    except Exception:  # a model's own code may raise anything
        return None
    return tuple(output.sequences[0, prompt.shape[1] :].tolist())


def side_by_side(
    checkpoint: Checkpoint,
    prompt: torch.Tensor | None,
    written: Sequence[tuple[int, ...] | None],
    trust_remote_code: bool,
) -> Generation | None:
    """What two models have `written` after `prompt`, [1, length], for a person to compare."""
    one, other = written
    if prompt is None or one is None or other is None:
        return None
    said = (prompt[0].tolist(), one, other)
    texts = (as_text(checkpoint, ids, trust_remote_code) for ids in said)
    before, original, converted = texts
    unlike = (i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    return Generation(
        prompt=before,
        original=original,
        converted=converted,
        tokens=len(one),
        same=next(unlike, len(one)),
    )


def _generated(
    model: Any,
    prompt: torch.Tensor,
    steps: int,
    processors: list[LogitsProcessor],
    mask: torch.Tensor | None = None,
) -> Any:
    config = GenerationConfig(
        max_new_tokens=steps,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
    )
    config.eos_token_id = None
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt) if mask is None else mask,
        generation_config=config,
        logits_processor=processors,
    )
