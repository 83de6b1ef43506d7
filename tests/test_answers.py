"""What the trace remembers of the fake mode's answers is what the fake mode would answer again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from normconvert.source import open_checkpoint
from normconvert.trace import trace
from normconvert.trace.answers import Answers
from normconvert.trace.tracer import fake_tensors

aten = torch.ops.aten


def _unremembered(_: Answers, func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gpt2", "qwen3_next"])
def test_a_graph_is_the_same_without_remembering(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.save(name, tmp_path)
    remembered = trace(open_checkpoint(str(tmp_path)))
    monkeypatch.setattr(Answers, "of", _unremembered)
    assert trace(open_checkpoint(str(tmp_path))) == remembered


REMEMBERED: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "add": lambda x, y: (aten.add.Tensor, x, y),
    "integer": lambda x, _: (aten.add.Scalar, x, 1),
    "real": lambda x, _: (aten.add.Scalar, x, 1.0),
    "broadcast": lambda x, y: (aten.mul.Tensor, x, y[:, :1]),
    "transpose": lambda x, _: (aten.transpose.int, x, 0, 1),
    "strides": lambda x, y: (aten.add.Tensor, x.t(), y.t()),
    "slice": lambda x, _: (aten.slice.Tensor, x[:5], 0, 1, 3),
    "slice of a slice": lambda x, _: (aten.slice.Tensor, x[1:], 0, 1, 3),
    "split": lambda x, _: (aten.split.Tensor, x, 2, 1),
    "topk": lambda x, _: (aten.topk.default, x, 2),
    "cast": lambda x, _: (aten._to_copy.default, x),
    "product": lambda x, y: (aten.mm.default, x.t(), y),
}


class _Asked(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what the fake mode is asked."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("operation", REMEMBERED)
def test_a_remembered_answer_is_the_one_that_would_be_given(operation: str) -> None:
    with fake_tensors(), torch.no_grad():
        answers, asked = Answers(), _Asked()
        for dtype in (torch.float32, torch.int64, torch.bfloat16):
            first, second = ([torch.ones(6, 6).to(dtype) for _ in "xy"] for _ in range(2))
            func, *args = REMEMBERED[operation](*first)
            with asked:
                answers.of(func, tuple(args), {})
            assert asked.count.pop(func) == 1
            func, *args = REMEMBERED[operation](*second)
            with asked:
                remembered = answers.of(func, tuple(args), {})
            assert func not in asked.count
            assert _kinds(remembered, args) == _kinds(func(*args), args)


def test_answers_are_not_mixed_up() -> None:
    with fake_tensors(), torch.no_grad():
        answers = Answers()
        for _ in range(2):
            for dtype in (torch.float32, torch.int64, torch.bfloat16):
                for operation in REMEMBERED.values():
                    func, *args = operation(*(torch.ones(6, 6).to(dtype) for _ in "xy"))
                    remembered = answers.of(func, tuple(args), {})
                    assert _kinds(remembered, args) == _kinds(func(*args), args)


NOT_REMEMBERED: dict[str, Callable[[torch.Tensor], Any]] = {
    "it writes": lambda x: (aten.add_.Scalar, x, 1.0),
    "what it finds depends on data": lambda x: (aten.nonzero.default, x),
    "sizes that are not known": lambda x: (aten.add.Scalar, x[x.nonzero()[:, 0]], 1.0),
    "a number that is known": lambda _: (aten.add.Scalar, torch.tensor(1.0), 1.0),
    "it asks about nothing": lambda _: (aten.zeros.default, [2, 3]),
}


@pytest.mark.parametrize("reason", NOT_REMEMBERED)
def test_what_is_asked_again(reason: str) -> None:
    with fake_tensors(), torch.no_grad():
        answers, asked = Answers(), _Asked()
        func, *args = NOT_REMEMBERED[reason](torch.ones(5, 6))
        for _ in range(3):
            with asked:
                answers.of(func, tuple(args), {})
        assert asked.count[func] == 3


def _kinds(result: Any, args: list[Any]) -> list[object]:
    """All that can be told of a fake tensor, and whether it is on the memory of an argument."""
    given = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
    parts = result if isinstance(result, (list, tuple)) else [result]
    return [
        (
            *(type(t), t.shape, t.stride(), t.storage_offset(), t.dtype, t.device),
            t.untyped_storage()._cdata in given,
        )
        for t in parts
    ]
