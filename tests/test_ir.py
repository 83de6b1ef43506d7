"""Expressions and plans: printable, comparable, and exactly the same after a trip through JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normconvert.ir.expression import (
    AddProduct,
    Divide,
    Expression,
    Fill,
    Plus,
    Scale,
    Spread,
    Tensor,
    from_json,
    positions,
    spread,
    tensors,
    to_json,
)
from normconvert.ir.graph import Node, Ref
from normconvert.ir.plan import Edit, Plan, Verdict

NAMES = st.text(min_size=1)
NUMBERS = st.floats(allow_nan=False)
AXES = st.integers(0, 3)
RUNS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1).map(tuple)
EXPRESSIONS: st.SearchStrategy[Expression] = st.recursive(
    st.builds(Tensor, NAMES) | st.builds(Fill, NUMBERS),
    lambda inner: (
        st.builds(Scale, inner, AXES, inner)
        | st.builds(Plus, inner, NUMBERS)
        | st.builds(Divide, inner, inner)
        | st.builds(AddProduct, inner, inner, AXES, inner)
        | st.builds(Spread, inner, RUNS)
    ),
    max_leaves=8,
)


@given(EXPRESSIONS)
def test_expressions_survive_json(expression: Expression) -> None:
    assert from_json(json.loads(json.dumps(to_json(expression)))) == expression


@given(EXPRESSIONS)
def test_an_expression_prints_every_tensor_that_it_reads(expression: Expression) -> None:
    assert all(name in str(expression) for name in tensors(expression))


@pytest.mark.parametrize(
    "data", [None, 3, [], ["scale"], ["scale", "w", "0", "g"], ["nothing", "w"], [["scale"]], {}]
)
def test_what_is_no_expression_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match=r".+"):
        from_json(data)


@given(st.lists(st.integers(-1, 12), min_size=1))
def test_spread_stands_for_its_index(index: list[int]) -> None:
    found = spread(Tensor("g"), index, 13)
    assert isinstance(found, Spread)
    assert positions(found.runs) == index


def test_spread_in_order_is_nothing() -> None:
    assert spread(Tensor("g"), range(5), 5) == Tensor("g")
    assert spread(Tensor("g"), range(4), 5) != Tensor("g")


PLAN = Plan(
    model="LlamaForCausalLM",
    rules=("flashnorm",),
    verdicts=(
        Verdict(
            rule="flashnorm",
            norm="model.norm",
            kind="rmsnorm",
            gain="model.norm.weight",
            bias=None,
            offset=0.0,
            eps=1e-6,
            readers=("lm_head.weight",),
            action="fold",
            reason="because",
        ),
    ),
    edits=(
        Edit(
            tensor="lm_head.weight",
            dtype="BF16",
            shape=(3, 4),
            expression=Scale(Tensor("lm_head.weight"), 1, Tensor("model.norm.weight")),
        ),
    ),
    config=(("tie_word_embeddings", False),),
    notes=("a note",),
)


def test_plans_survive_json() -> None:
    assert Plan.from_json(json.loads(json.dumps(PLAN.to_json()))) == PLAN


def test_a_damaged_plan_is_refused() -> None:
    data = PLAN.to_json()
    for key in ("model", "verdicts", "edits", "config"):
        with pytest.raises(ValueError, match="not a plan"):
            Plan.from_json({k: v for k, v in data.items() if k != key})
    with pytest.raises(ValueError, match="schema version 99"):
        Plan.from_json({**data, "schema_version": 99})


def test_plans_and_nodes_print() -> None:
    assert str(PLAN).splitlines() == [
        "plan for LlamaForCausalLM: flashnorm",
        "flashnorm: fold model.norm: because",
        "lm_head.weight = scale(lm_head.weight, axis=1, by=model.norm.weight) [BF16]",
        "config.tie_word_embeddings = False",
        "note: a note",
    ]
    node = Node(op="cat", arguments=(("tensors", (Ref(1), Ref(2))),), outputs=(3,), module="m")
    assert str(node) == "%3 = cat(tensors=[%1, %2])  # m"
    assert node.inputs == (1, 2)
