"""The plan: everything a conversion will do, as frozen data.

It is printed by `inspect`, saved beside the output as ``normconvert.json``, executed by
`rewrite` and checked by `verify`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from normconvert.ir.expression import Expression, from_json, to_json
from normconvert.ir.graph import NormKind

SCHEMA_VERSION = 1

Tied: TypeAlias = Literal["keep", "untie"]
Dtype: TypeAlias = Literal["keep", "float32", "bfloat16", "float16"]
Action: TypeAlias = Literal["fold", "keep"]

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip
"""Bytes per element of the safetensors dtypes that are whole bytes."""

STORED_DTYPE = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
"""safetensors' name of each dtype that an option can name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What happens to one norm, and why.

    `gain` and `bias` are tensors of the checkpoint, `readers` the tensors that the norm's
    output is multiplied with, `offset` and `eps` as in `normconvert.ir.graph.Norm`.
    """

    norm: str
    kind: NormKind
    gain: str | None
    bias: str | None
    offset: float
    eps: float
    readers: tuple[str, ...]
    action: Action
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """One tensor of the output that differs from the source's, or is not in it."""

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    expression: Expression

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """See the module's docstring.

    `edits` are in the source's order, then new tensors; every tensor without an edit is copied
    byte for byte. `config` are the keys of config.json that change.
    """

    model: str
    rules: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    edits: tuple[Edit, ...]
    config: tuple[tuple[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def folded(self) -> tuple[Verdict, ...]:
        """The norms that are folded."""
        return tuple(verdict for verdict in self.verdicts if verdict.action == "fold")

    @property
    def kept(self) -> tuple[Verdict, ...]:
        """The norms that stay as they are."""
        return tuple(verdict for verdict in self.verdicts if verdict.action == "keep")

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`; `from_json` is its exact inverse."""
        data = asdict(self)
        data["edits"] = [
            {**asdict(edit), "expression": to_json(edit.expression)} for edit in self.edits
        ]
        data["config"] = dict(self.config)
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The plan that `to_json` turned into `data`.

        Raises:
            ValueError: `data` is not a plan of this schema version.
        """
        if data.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"a plan of schema version {data.get('schema_version')!r}")
        try:
            return cls(
                model=data["model"],
                rules=tuple(data["rules"]),
                verdicts=tuple(
                    Verdict(**{**verdict, "readers": tuple(verdict["readers"])})
                    for verdict in data["verdicts"]
                ),
                edits=tuple(
                    Edit(
                        tensor=edit["tensor"],
                        dtype=edit["dtype"],
                        shape=tuple(edit["shape"]),
                        expression=from_json(edit["expression"]),
                    )
                    for edit in data["edits"]
                ),
                config=tuple(data["config"].items()),
                notes=tuple(data["notes"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a plan: {error}") from error

    def __str__(self) -> str:
        lines = [f"plan for {self.model}: {', '.join(self.rules)}"]
        lines += [f"{v.action} {v.norm}: {v.reason}" for v in self.verdicts]
        lines += [f"{edit.tensor} = {edit.expression} [{edit.dtype}]" for edit in self.edits]
        lines += [f"config.{key} = {value!r}" for key, value in self.config]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
