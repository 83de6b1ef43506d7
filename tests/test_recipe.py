"""Recipes: what a YAML file may say, and what is said about one that makes no sense."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from command_line import nothing_written, run, run_here
from normconvert.recipe import Recipe, RecipeError, read_recipe

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = Path(__file__).parents[1] / "models"


def read(text: str, folder: Path) -> Recipe:
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return read_recipe(folder / "recipe.yaml")


def test_a_recipe(tmp_path: Path) -> None:
    text = "steps: [rmsnorm, flashnorm]\nformat: stock\ntied: untie\ndtype: bfloat16\nverify: false"
    assert read(text, tmp_path) == Recipe(
        steps=("rmsnorm", "flashnorm"), format="stock", tied="untie", dtype="bfloat16", verify=False
    )
    assert read("steps: [flashnorm]", tmp_path) == Recipe(steps=("flashnorm",))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: flashnorm", "steps in .* is 'flashnorm'; give a list of flashnorm, rmsnorm"),
        ("steps: []", "steps in"),
        ("steps: [flashnorm, quarot]", "quarot"),
        ("format: stock", "steps in .* is None"),
        ("steps: [flashnorm]\nformat: gguf", "format in .* is 'gguf'; it may be stock, native"),
        ("steps: [flashnorm]\ntide: untie", "the key 'tide'; a recipe may have steps, format"),
        ("steps: [flashnorm]\nverify: maybe", "verify in .* is 'maybe'; it may be True, False"),
        ("steps: [flashnorm]\npush: model", "push in"),
        ("steps: [prmsnorm]\nfraction: half", "fraction in .* is 'half'; give a number"),
        ("steps: [prmsnorm]\nfraction: true", "fraction in"),
        ("- flashnorm", "is not a recipe"),
        ("", "is not a recipe"),
        ("steps: [", "is not YAML"),
        ("steps: [flashnorm]\nfraction: 2024-13-45", "is not YAML"),
        ("steps: [flashnorm]\nsteps: [rmsnorm]", "the key 'steps' twice"),
        ("steps: [flashnorm]\n? [a, b]\n: c", "is not YAML|the key"),
        ("steps: [flashnorm]\n12: 3", "the key 12"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_a_recipe_that_makes_no_sense(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        read(text, tmp_path)


def test_a_recipe_that_is_missing(tmp_path: Path) -> None:
    with nothing_written(tmp_path):
        result = run_here("run", "no.yaml", "--model", "llama", cwd=tmp_path)
    result.assert_refused("no.yaml", "cannot be read")


def test_a_recipe_of_a_format_that_there_is_not(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("steps: [crmsnorm]\nformat: stock\n")
    result = run_here("run", "r.yaml", "--model", MODELS / "tiny-gpt2", cwd=tmp_path)
    result.assert_refused("No stock model has the norms of crmsnorm", "has to be native")
    assert "--format" not in result.err  # the command has no such option


def test_a_pipe_is_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(RecipeError, match="is no file"):
        read_recipe(tmp_path / "pipe.yaml")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_recipes(path: Path, tmp_path: Path) -> None:
    model = "tiny-llama" if path.stem.startswith("flashnorm") else "tiny-gpt2"
    result = run("run", str(path), "--model", str(MODELS / model), "--dry-run", cwd=tmp_path)
    assert result.status == 0, result.err
    assert "of 9" in result.out
    assert not list(tmp_path.iterdir())


def test_what_is_rotated_next_may_have_any_norms(tmp_path: Path) -> None:
    """RMSNorms are folded; LayerNorms are centered as well, and what is left of them is told."""
    for model, said in (
        ("tiny-llama", "Planned: folded 9 of 9 norms: "),
        ("tiny-gpt2", "\ntransformer.ln_f is left with a bias "),
    ):
        recipe = str(CONFIGS / "rotation-ready.yaml")
        result = run("run", recipe, "--model", str(MODELS / model), "--dry-run", cwd=tmp_path)
        assert result.status == 0, result.err
        assert said in result.out
