"""Recipes: a conversion as a YAML file, checked before anything is done."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normconvert.errors import NormconvertError

if TYPE_CHECKING:
    from normconvert.api import Rewrite
    from normconvert.ir.plan import Dtype, Format, Tied


class RecipeError(NormconvertError):
    """A recipe cannot be read or does not make sense."""

    code = "recipe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a recipe may say; see `normconvert.convert` for what it means."""

    steps: tuple[Rewrite, ...]
    format: Format | None = None
    tied: Tied = "keep"
    dtype: Dtype = "keep"
    fraction: float = 0.0625
    verify: bool = True
    push: str | None = None


_WORDS: dict[str, tuple[object, ...]] = {
    "format": ("stock", "native"),
    "tied": ("keep", "untie"),
    "dtype": ("keep", "float32", "bfloat16", "float16"),
    "verify": (True, False),
}
_STEPS = ("flashnorm", "rmsnorm", "crmsnorm", "prmsnorm")


def read_recipe(path: Path) -> Recipe:
    """The recipe in the file `path`.

    Raises:
        RecipeError: it is missing, is not YAML, or says anything that is not understood.
    """
    import yaml

    if path.exists() and not path.is_file():
        raise RecipeError(f"{path} is no file; give a recipe in YAML.")
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        tree = yaml.compose(text, yaml.SafeLoader)
        pairs = tree.value if isinstance(tree, yaml.MappingNode) else ()
        keys = [str(key.value) for key, _ in pairs]
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # yaml itself, and whatever Python makes of a date or a number
        reason = reprlib.repr(" ".join(str(error).split())).strip("'\"")
        raise RecipeError(f"{path} is not YAML ({reason}); mend it.") from error
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise RecipeError(f"{path} has the key {twice[0]!r} twice; leave one of them out.")
    if not isinstance(content, dict):
        raise RecipeError(f"{path} is not a recipe; give it keys, such as 'steps: [flashnorm]'.")
    return _checked(path, content)


def _checked(path: Path, content: dict[Any, Any]) -> Recipe:
    known = [field.name for field in fields(Recipe)]
    for key, value in content.items():
        if key not in known:
            raise RecipeError(
                f"{path} has the key {_brief(key)}; a recipe may have {_listed(known)}."
            )
        if key in _WORDS and not any(value is word or value == word for word in _WORDS[key]):
            raise RecipeError(
                f"{key} in {path} is {_brief(value)}; it may be {_listed(_WORDS[key])}."
            )
    steps = content.get("steps")
    if not isinstance(steps, list) or not steps or not all(step in _STEPS for step in steps):
        raise RecipeError(f"steps in {path} is {_brief(steps)}; give a list of {_listed(_STEPS)}.")
    fraction = content.get("fraction", 1)
    if not isinstance(fraction, (int, float)) or isinstance(fraction, bool):
        raise RecipeError(
            f"fraction in {path} is {_brief(fraction)}; give a number between 0 and 1."
        )
    push = content.get("push")
    if push is not None and (not isinstance(push, str) or push.count("/") != 1):
        raise RecipeError(
            f"push in {path} is {_brief(push)}; give USER/NAME on the Hub, or leave it out."
        )
    return Recipe(**{**content, "steps": tuple(steps)})


def _brief(value: object) -> str:
    """An alias can stand for millions of values."""
    return reprlib.repr(value)


def _listed(words: object) -> str:
    assert isinstance(words, (list, tuple))
    return ", ".join(str(word) for word in words)
