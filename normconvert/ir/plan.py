"""The plan: everything a conversion will do, as frozen data.

It is printed by `inspect`, saved beside the output as ``normconvert.json``, executed by
`rewrite` and checked by `verify`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

from normconvert.ir.expression import Expression, from_json, to_json
from normconvert.ir.graph import NormKind
from normconvert.ir.native import Native, native_config

SCHEMA_VERSION = 1

Tied: TypeAlias = Literal["keep", "untie"]
Dtype: TypeAlias = Literal["keep", "float32", "bfloat16", "float16"]
Format: TypeAlias = Literal["stock", "native"]
Action: TypeAlias = Literal["fold", "center", "compress", "approximate", "keep"]

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip
"""Bytes per element of the safetensors dtypes that are whole bytes."""

STORED_DTYPE = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
"""safetensors' name of each dtype that an option can name."""

IDENTITY = "its gain is the identity already"
"""The reason of a norm that stays because there is nothing left of it to fold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What `rule` does to one norm, and why.

    fold: its gain moves into the readers. center: what it reads has mean zero, and it becomes an
    RMSNorm. compress: it becomes a CRMSNorm. approximate: it becomes a pRMSNorm. keep: nothing.

    `gain` and `bias` are tensors of the checkpoint, `readers` the tensors that the norm's
    output is multiplied with, `offset` and `eps` as in `normconvert.ir.graph.Norm`. `unknown` says
    that the norm is kept for want of knowledge: an operation or a structure is new to the rule.
    """

    rule: str
    norm: str
    kind: NormKind
    gain: str | None
    bias: str | None
    offset: float
    eps: float
    readers: tuple[str, ...]
    action: Action
    reason: str
    unknown: bool = False


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
    byte for byte, unless it is `omitted`. `config` are the keys of config.json that change, and
    `native` what a checkpoint in the native format changes in its model (None: stock).
    """

    model: str
    rules: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    edits: tuple[Edit, ...]
    omitted: tuple[str, ...] = ()
    native: Native | None = None
    config: tuple[tuple[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def folded(self) -> tuple[Verdict, ...]:
        """The norms whose gains move into their readers."""
        return self.changed("flashnorm")

    def changed(self, rule: str) -> tuple[Verdict, ...]:
        """The norms that `rule` changes."""
        return tuple(v for v in self.verdicts if v.rule == rule and v.action != "keep")

    def kept(self, rule: str) -> tuple[Verdict, ...]:
        """The norms that `rule` leaves as they are."""
        return tuple(v for v in self.verdicts if v.rule == rule and v.action == "keep")

    @property
    def unknown(self) -> tuple[Verdict, ...]:
        """The norms that stay because an operation or a structure is not known."""
        return tuple(v for v in self.verdicts if v.unknown)

    def changed_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """config.json of the output, from that of the source: the plan's keys, where they stand."""
        config = dict(config)
        for key, value in self.config:
            config[key] = value
            for name, section in config.items():
                if isinstance(section, dict) and key in section:
                    config[name] = {**section, key: value}
        return config if self.native is None else native_config(config, self.native)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`; `from_json` is its exact inverse."""
        data = asdict(replace(self, edits=()))  # one by one: there may be very many
        data["edits"] = [
            {
                "tensor": edit.tensor,
                "dtype": edit.dtype,
                "shape": edit.shape,
                "expression": to_json(edit.expression),
            }
            for edit in self.edits
        ]
        data["config"] = dict(self.config)
        data["native"] = self.native and self.native.to_json()
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The plan that `to_json` turned into `data`.

        Raises:
            ValueError: `data` is not a plan of this schema version.
        """
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise ValueError(f"a plan of schema version {version!r}")
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
                omitted=tuple(data["omitted"]),
                native=data["native"] and Native.from_json(data["native"]),
                config=tuple(data["config"].items()),
                notes=tuple(data["notes"]),
            )
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"not a plan: {error}") from error

    def __str__(self) -> str:
        lines = [f"plan for {self.model}: {', '.join(self.rules)}"]
        lines += [f"{v.rule}: {v.action} {v.norm}: {v.reason}" for v in self.verdicts]
        lines += [f"{edit.tensor} = {edit.expression} [{edit.dtype}]" for edit in self.edits]
        lines += [f"{tensor} is omitted" for tensor in self.omitted]
        if self.native is not None:
            lines += [str(norm) for norm in self.native.norms]
            lines += [str(recentering) for recentering in self.native.recenterings]
        lines += [f"config.{key} = {value!r}" for key, value in self.config]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
