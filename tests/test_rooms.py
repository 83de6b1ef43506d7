"""The layout of the package: who may import whom, and what costs nothing to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "normconvert"
SHARED = {"errors", "ir", "source"}
MODELS = {
    "images", "model_class", "model_inputs", "model_size", "precision", "quiet", "torch_dtypes",
    "torch_threads", "towers",
}  # fmt: skip
BENCHMARK = {"api", "benchmark", "nn", "planner", "settle", "trace", "train", "verify"}
COMMANDS = {"api", "benchmark", "publish", "recipe"}
ALLOWED = {
    "errors": set[str](),
    "ir": {"ir"},
    "source": {"errors", "ir", "source"},
    "rules": {"ir", "rules"},
    "planner": {*SHARED, "rules"},
    "cost": {"ir", "source"},
    "settle": {*SHARED, "models", "planner", "rewrite", "trace"},
    "stream": {*SHARED, "rewrite", "verify"},
    "retarget": {*SHARED, "retarget", "rewrite", "rules", "trace", *MODELS},
    "recipe": {"errors", "ir", "api"},
    "registration": {"models", "nn"},
    "models": {"models"},
    "publish": {*SHARED, "publish"},
    "nn": {"errors", "nn"},
    "trace": {*SHARED, "trace", *MODELS},
    "processes": {"errors", "ir"},
    "rewrite": {*SHARED, "processes", "rewrite", "torch_dtypes", "torch_threads"},
    "verify": {*SHARED, "processes", "verify", *MODELS},
    "train": {"errors", "ir", "model_class", "nn", "rules", "trace"},
    "inspection": {"cost", "ir", "planner", "settle", "source"},
    "benchmark": {
        *SHARED,
        "api",
        "benchmark",
        "planner",
        "settle",
        "trace",
        "nn",
        "train",
        "verify",
        *MODELS,
    },
    "model_class": {*SHARED, "nn"},
    "images": {"errors"},
    "model_inputs": {*SHARED, "images"},
    "towers": {"errors", "images", "model_inputs"},
    "model_size": SHARED,
    "precision": set[str](),
    "quiet": set[str](),
    "torch_dtypes": set[str](),
    "torch_threads": set[str](),
    "cli": {
        *SHARED,
        "cli",
        "api",
        "benchmark",
        "cost",
        "processes",
        "publish",
        "recipe",
        "__init__",
    },
}
TORCH = {
    "benchmark",
    "models",
    "nn",
    "trace",
    "train",
    "retarget",
    "rewrite",
    "verify",
    "images",
    "model_inputs",
    "model_size",
    "precision",
    "processes",
    "torch_dtypes",
    "torch_threads",
    "towers",
}
TRANSFORMERS = {
    "benchmark",
    "models",
    "nn",
    "trace",
    "train",
    "retarget",
    "verify",
    "images",
    "model_class",
    "model_inputs",
    "quiet",
    "towers",
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module that the file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_what_they_may(path: Path) -> None:
    if room(path) in ("api", "__init__", "__main__"):
        return
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "normconvert":
            assert (parts[1] if len(parts) > 1 else "__init__") in ALLOWED[room(path)], module
        assert parts[0] != "torch" or room(path) in TORCH, module
        assert parts[0] != "transformers" or room(path) in TRANSFORMERS, module


def test_every_room_is_listed() -> None:
    rooms = {room(path) for path in MODULES} - {"api", "__init__", "__main__"}
    assert rooms == set(ALLOWED)


def test_modules_stay_small() -> None:
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert lines.pop("modeling_normconvert.py") <= 1120  # it travels alone, so all must be in it
    assert max(lines.values()) <= 400


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("normconvert", {"torch", "transformers", "rich", "huggingface_hub"}),
        ("normconvert.cli.main", {"torch", "transformers", "huggingface_hub", "safetensors"}),
        ("normconvert.planner", {"torch", "transformers"}),
        ("normconvert.rewrite", {"transformers"}),
    ],
)
def test_imports_are_lazy(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not absent & set(loaded)
