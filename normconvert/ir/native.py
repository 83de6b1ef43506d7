"""What a checkpoint in the native format changes in its model: modules, shapes, biases.

It stands in config.json under ``normconvert``, where `normconvert.nn.modeling_normconvert`, the
file that such a checkpoint carries, reads it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeAlias

NormClass: TypeAlias = Literal["layernorm", "rmsnorm", "crmsnorm", "prmsnorm"]

MODEL_TYPE = "normconvert"
"""The model_type of every native checkpoint; what does not know it refuses to load one."""

MODELING_FILE = "modeling_normconvert.py"
CONFIG_CLASS = "NormconvertConfig"
PREFIX = "Normconvert"
"""Stands before the name of the stock class in `architectures`."""

NOT_FOR_STOCK_CLASSES = "load-it-with-AutoModelForCausalLM-and-trust_remote_code.safetensors"
"""Where a stock class that is given the checkpoint looks for the weights, and finds none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NormModule:
    """The norm that takes the place of the module `module`.

    `size` is the hidden size of the original, `gain` and `bias` tell whether it has them,
    `offset` and `eps` are as in `normconvert.ir.graph.Norm`. `zero_mean` promises that its input
    has mean zero. A crmsnorm with `expand` gives back all `size` coordinates: at once, or in front
    of `reader`, a module's path and input, if there is one. `fraction` is the
    share of the coordinates that a prmsnorm looks at.
    """

    module: str
    kind: NormClass
    size: int
    eps: float
    offset: float = 0.0
    gain: bool = False
    bias: bool = False
    zero_mean: bool = False
    expand: bool = False
    reader: str = ""
    fraction: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recentering:
    """The mean is taken out of the `output` of `module`, or of its `input KEY`.

    `compress` drops the last coordinate as well.
    """

    module: str
    at: str
    compress: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FullWidth:
    """`module` works on all coordinates of a compressed stream: its code knows their number.

    What it reads, if it reads it compressed, is expanded (`at`: input KEY), what it returns is
    compressed.
    """

    module: str
    at: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Native:
    """See the module's docstring.

    `rules` are those that were applied; `shapes` and `biases` are of parameters, by their names;
    `auto_classes` are those of transformers that load the model.
    """

    rules: tuple[str, ...] = ()
    auto_classes: tuple[str, ...] = ()
    norms: tuple[NormModule, ...] = ()
    recenterings: tuple[Recentering, ...] = ()
    full_width: tuple[FullWidth, ...] = ()
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    biases: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`, without what is at its default."""
        return {
            "rules": list(self.rules),
            "auto_classes": list(self.auto_classes),
            "norms": [_sparse(norm) for norm in self.norms],
            "recenterings": [_sparse(recentering) for recentering in self.recenterings],
            "full_width": [_sparse(each) for each in self.full_width],
            "shapes": {name: list(shape) for name, shape in self.shapes},
            "biases": list(self.biases),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Native:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError: `data` is nothing of the kind.
        """
        return cls(
            rules=tuple(data["rules"]),
            auto_classes=tuple(data["auto_classes"]),
            norms=tuple(NormModule(**norm) for norm in data["norms"]),
            recenterings=tuple(Recentering(**each) for each in data["recenterings"]),
            full_width=tuple(FullWidth(**each) for each in data["full_width"]),
            shapes=tuple((name, tuple(shape)) for name, shape in data["shapes"].items()),
            biases=tuple(data["biases"]),
        )


def native_of(config: dict[str, Any]) -> Native | None:
    """What the native checkpoint with this config.json changes; None if it is not native.

    Raises:
        ValueError: it says that it is native, but not in a way that is understood.
    """
    if config.get("model_type") != MODEL_TYPE:
        return None
    try:
        return Native.from_json(config[MODEL_TYPE])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"its {MODEL_TYPE!r} is not understood ({error})") from error


def merged(before: Native | None, after: Native) -> Native:
    """`after`, applied to a model that `before` changed already."""
    if before is None:
        return after
    norms = {norm.module: norm for norm in (*before.norms, *after.norms)}
    return replace(
        after,
        rules=tuple(dict.fromkeys((*before.rules, *after.rules))),
        auto_classes=before.auto_classes,
        norms=tuple(norms.values()),
        recenterings=(*before.recenterings, *after.recenterings),
        full_width=(*before.full_width, *after.full_width),
        shapes=tuple({**dict(before.shapes), **dict(after.shapes)}.items()),
        biases=tuple(dict.fromkeys((*before.biases, *after.biases))),
    )


def native_config(config: dict[str, Any], native: Native) -> dict[str, Any]:
    """config.json of a native checkpoint, from that of its source (which may be native too)."""
    known = config.get(MODEL_TYPE) if config.get("model_type") == MODEL_TYPE else None
    stock = known["stock"] if known else config["model_type"]
    names = [name.removeprefix(PREFIX) for name in config.get("architectures") or []]
    return {
        **config,
        "architectures": [PREFIX + name for name in names],
        "auto_map": {"AutoConfig": f"{MODELING_FILE.removesuffix('.py')}.{CONFIG_CLASS}"},
        "model_type": MODEL_TYPE,
        "transformers_weights": NOT_FOR_STOCK_CLASSES,
        MODEL_TYPE: {"stock": stock, **native.to_json()},
    }


def starred(path: str) -> str:
    """The path of a module with * for every number: the same for all layers."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _sparse(value: NormModule | Recentering | FullWidth) -> dict[str, Any]:
    defaults = {field.name: field.default for field in fields(value)}
    return {name: each for name, each in asdict(value).items() if each != defaults[name]}
