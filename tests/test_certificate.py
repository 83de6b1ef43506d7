"""The certificate: no exact conversion is refused, and nothing else gets one."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import normconvert
import zoo
from normconvert.ir.event import ignore
from normconvert.ir.expression import AddProduct, Center, Fill, walk
from normconvert.ir.plan import Edit, Plan
from normconvert.ir.report import Certificate
from normconvert.source import open_checkpoint
from normconvert.verify import certify
from normconvert.verify.recompute import Enclosure
from normconvert.verify.rounded import products_are_rounded, wrongly_rounded
from zoo_layernorm import LAYERNORM

DTYPES = ("float64", "float32", "bfloat16", "float16")
# Every kind of expression, tied and untied, stacked experts, fused and transposed weights.
NAMES = ("llama_tied", "gemma", "phi3", "gpt_oss", "gpt2", "stablelm", "phimoe", "whisper")
WEIGHTS = "model.safetensors"
MODELS = Path(__file__).parents[1] / "models"


def certificate(plan: Plan, source: Path, output: Path) -> Certificate:
    return certify(plan, open_checkpoint(str(source)), open_checkpoint(str(output)), ignore)


def flip(output: Path, tensor: str, index: int, bit: int = 0) -> None:
    """Change one bit of one element of a stored tensor; twice, and nothing has happened."""
    checkpoint = open_checkpoint(str(output))
    stored = checkpoint.tensors[tensor]
    itemsize = stored.nbytes // max(1, int(np.prod(stored.shape)))
    with checkpoint.paths[tensor].open("r+b") as file:
        file.seek(stored.start + index * itemsize + bit // 8)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def sums(edit: Edit) -> bool:
    """Whether the edit is a sum of many terms, of which float64 does not know the last bit."""
    kinds = (Center, AddProduct)
    chained = sum(not isinstance(each, Fill) for each in walk(edit.expression)) > 3
    return chained or any(isinstance(each, kinds) for each in walk(edit.expression))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_right_and_one_bit_off(name: str, dtype: str, tmp_path: Path) -> None:
    source, choose = tmp_path / "source", random.Random(name + dtype)
    zoo.save(name, source, dtype=dtype)
    for rewrite in ("flashnorm", "crmsnorm") if name in LAYERNORM else ("flashnorm",):
        output = tmp_path / rewrite
        conversion = normconvert.convert(source, output, rewrite, tied="untie", verify=False)
        plan = conversion.inspection.plan
        found = certificate(plan, source, output)
        assert found.valid, found.problems
        assert found.rewritten == len(plan.edits)
        if dtype != "float64":
            assert found.undecided == 0
        decidable = [edit for edit in plan.edits if dtype != "float64" or not sums(edit)]
        for edit in choose.sample(decidable, min(4, len(decidable))):
            index = choose.randrange(edit.nbytes // edit.itemsize)
            flip(output, edit.tensor, index)
            wrong = certificate(plan, source, output)
            assert [problem.place for problem in wrong.problems] == [edit.tensor]
            assert "1 element is not" in wrong.problems[0].what
            flip(output, edit.tensor, index)
        assert certificate(plan, source, output).valid


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    zoo.save("llama", folder / "source", dtype="bfloat16", max_shard_size="80KB")
    for place in ("tokenizer/vocabulary.txt", "chat_template.jinja"):
        (folder / "source" / place).parent.mkdir(exist_ok=True)
        (folder / "source" / place).write_text("a b c")
    normconvert.convert(folder / "source", folder / "output", verify=False)
    return folder / "source", folder / "output"


Change: TypeAlias = Callable[[Path], object]


def edit_json(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        change(document)
        (folder / name).write_text(json.dumps(document))

    return apply


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """A change to the first shard, with its header as the library writes it."""

    def apply(folder: Path) -> None:
        path = min(folder.glob("model-*"))
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        index = json.loads((folder / f"{WEIGHTS}.index.json").read_text())
        kept = {name: at for name, at in index["weight_map"].items() if at != path.name}
        index["weight_map"] = kept | dict.fromkeys(tensors, path.name)
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))

    return apply


HIDDEN = "model.layers.0.mlp.up_proj.weight"


def drop_edit(manifest: dict[str, Any]) -> None:
    edits = manifest["plan"]["edits"]
    manifest["plan"]["edits"] = [edit for edit in edits if edit["tensor"] != HIDDEN]


FIRST = "model.embed_tokens.weight"
CHANGES: Mapping[str, tuple[Change, str, str]] = {
    "a copied tensor": (lambda f: flip(f, FIRST, 17, 9), FIRST, "1 byte differs"),
    "a missing tensor": (
        edit_tensors(lambda tensors: tensors.pop(FIRST)),
        FIRST,
        "the tensor is missing",
    ),
    "an extra tensor": (
        edit_tensors(lambda tensors: tensors.update({"extra": torch.ones(1)})),
        "extra",
        "the plan has no such tensor",
    ),
    "another dtype": (
        edit_tensors(lambda tensors: tensors.update({FIRST: tensors[FIRST].float()})),
        FIRST,
        "differ from the original's",
    ),
    "another eps": (
        edit_json("config.json", lambda config: config.update(rms_norm_eps=1e-3)),
        "config.json",
        "'rms_norm_eps' is not what the plan says",
    ),
    "another rope base": (
        edit_json("config.json", lambda config: config["rope_parameters"].update(rope_theta=5.0)),
        "config.json",
        "'rope_parameters' is not",
    ),
    "another template": (
        lambda folder: (folder / "chat_template.jinja").write_text("a b d"),
        "chat_template.jinja",
        "the file differs",
    ),
    "a lost file": (
        lambda folder: (folder / "tokenizer/vocabulary.txt").unlink(),
        "tokenizer/vocabulary.txt",
        "the file is missing",
    ),
    "another file": (
        lambda folder: (folder / "modeling_x.py").write_text(""),
        "modeling_x.py",
        "the file is not the original's",
    ),
    "an edit that the plan hides": (
        edit_json("normconvert.json", drop_edit),
        HIDDEN,
        "the stored plan is another",
    ),
    "another verdict": (
        edit_json("normconvert.json", lambda m: m["plan"]["verdicts"][0].update(eps=1.0)),
        "normconvert.json",
        "the stored plan is another",
    ),
    "no plan": (
        edit_json("normconvert.json", lambda manifest: manifest.pop("plan")),
        "normconvert.json",
        "it holds no plan",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_changed_is_named(what: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """With the plan made anew: nothing in the output is believed."""
    change, place, word = CHANGES[what]
    source, output = pair[0], Path(shutil.copytree(pair[1], tmp_path / "output"))
    change(output)
    report = normconvert.verify_equivalence(source, output) if "tensor" not in what else None
    plan = normconvert.inspect(source).plan
    found = report.certificate if report is not None else certificate(plan, source, output)
    assert found is not None
    assert not found.valid
    assert report is None or not report.equivalent
    assert {problem.place for problem in found.problems} == {place}
    assert any(word in problem.what for problem in found.problems), found.problems


def test_documentation_may_change(pair: tuple[Path, Path], tmp_path: Path) -> None:
    output = Path(shutil.copytree(pair[1], tmp_path / "output"))
    (output / "README.md").write_text("# A model card")
    report = normconvert.verify_equivalence(pair[0], output)
    assert report.certificate is not None
    assert report.certificate.valid
    assert report.equivalent


def test_a_fine_tune_of_the_original(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """One perturbed weight of the original, which the logits would forgive."""
    source = Path(shutil.copytree(pair[0], tmp_path / "source"))
    flip(source, "model.layers.1.mlp.gate_proj.weight", 5)
    report = normconvert.verify_equivalence(source, pair[1])
    assert all(comparison.equivalent for comparison in report.comparisons)
    assert not report.equivalent
    assert report.certificate is not None
    places = {problem.place for problem in report.certificate.problems}
    assert places == {"model.layers.1.mlp.gate_proj.weight"}


def test_two_checkpoints_of_which_nothing_is_known(pair: tuple[Path, Path], tmp_path: Path) -> None:
    output = Path(shutil.copytree(pair[1], tmp_path / "output"))
    (output / "normconvert.json").unlink()
    report = normconvert.verify_equivalence(pair[0], output)
    assert report.certificate is None
    assert report.equivalent


def test_options_that_cannot_be(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for number, options in enumerate(({"rewrites": ["crmsnorm"]}, {"colour": "red"})):
        output = Path(shutil.copytree(pair[1], tmp_path / str(number)))
        manifest = json.loads((output / "normconvert.json").read_text())
        manifest["options"] |= options
        (output / "normconvert.json").write_text(json.dumps(manifest))
        report = normconvert.verify_equivalence(pair[0], output)
        assert report.certificate is not None
        assert "no plan can be made" in report.certificate.problems[0].what


def test_a_folder_that_links_to_itself(tmp_path: Path) -> None:
    """Twice, so that following the links would take for ever."""
    source = Path(shutil.copytree(MODELS / "tiny-llama", tmp_path / "source"))
    for name in ("latest", "best"):
        (source / name).symlink_to(".")
    report = normconvert.convert(source, tmp_path / "output").verification
    assert report is not None
    assert report.equivalent
    assert not (tmp_path / "output" / "latest").exists()


def test_the_conversion_of_another_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """One sentence says so, in place of one for each of its tensors."""
    zoo.save("gpt2", tmp_path / "gpt2")
    report = normconvert.verify_equivalence(tmp_path / "gpt2", pair[1])
    assert report.certificate is not None
    (problem,) = report.certificate.problems
    assert problem.what == f"it is a GPT2LMHeadModel, and {pair[1]} was made of a LlamaForCausalLM"
    assert not report.notes or "load whole" not in report.notes[0]


DEEP = "[" * 900 + "]" * 900
MANIFESTS = [
    "{",
    "[]",
    "{}",
    '{"options": 3}',
    '{"options": {"rewrites": 5}}',
    '{"options": {"rewrites": []}}',
    '{"options": {"rewrites": [["flashnorm"]]}}',
    '{"options": {"fraction": "half"}}',
    '{"options": {"returns": "logits"}}',
    '{"options": {"target": 5}}',
    '{"plan": 3}',
    '{"plan": {"schema_version": 99}}',
    '{"plan": {"edits": [{"tensor": 1, "dtype": [], "shape": 3, "expression": {}}]}}',
    '{"plan": {"edits": [{"tensor": "t", "dtype": "F32", "shape": [], "expression": DEEP}]}}',
    '{"plan": {"edits": [{"tensor": "t", "dtype": "F32", "shape": [1],'
    ' "expression": ["spread", "w", [[Infinity, 1]]]}]}}',
]


@pytest.mark.parametrize("text", MANIFESTS, ids=range(len(MANIFESTS)))
def test_a_manifest_of_a_stranger(text: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Whatever it says, there is an answer: no certificate, and one sentence why."""
    output = Path(shutil.copytree(pair[1], tmp_path / "output"))
    path = output / "normconvert.json"
    manifest, text = json.loads(path.read_text()), text.replace("DEEP", DEEP)
    try:
        changes = json.loads(text)
    except ValueError:
        path.write_text(text)
    else:
        if not isinstance(changes, dict) or not changes:
            path.write_text(text)
        else:
            for key, value in changes.items():
                both = isinstance(value, dict)
                manifest[key] = {**manifest[key], **value} if both else value
            path.write_text(json.dumps(manifest))
    report = normconvert.verify_equivalence(pair[0], output)
    assert not report.equivalent
    assert report.certificate is not None
    assert not report.certificate.valid
    assert all("\n" not in problem.what for problem in report.certificate.problems)


# --- rounding, against fractions


KINDS: Mapping[str, tuple[torch.dtype, torch.dtype, Any]] = {
    "BF16": (torch.bfloat16, torch.int16, np.uint16),
    "F16": (torch.float16, torch.int16, np.float16),
    "F32": (torch.float32, torch.int32, np.float32),
}


def number(bits: int, dtype: str) -> float:
    kind, integer, _ = KINDS[dtype]
    return float(torch.tensor(bits, dtype=integer).view(kind))


def bits_near(value: float, dtype: str) -> int:
    kind, integer, _ = KINDS[dtype]
    return int(torch.tensor(value, dtype=torch.float64).to(kind).view(integer))


def raw_bits(bits: int, dtype: str) -> Any:
    _, integer, raw = KINDS[dtype]
    return torch.tensor([bits], dtype=integer).numpy().view(raw)


def is_nearest(bits: int, exact: float, dtype: str) -> bool:
    """By definition: no other number of the dtype is nearer, and at a tie the last bit is 0."""
    distances = [
        abs(Fraction(each) - Fraction(exact))
        for step in (0, 1, -1)
        if math.isfinite(each := number(bits + step, dtype))
    ]
    tie = distances.count(distances[0]) > 1
    return distances[0] == min(distances) and (not tie or bits & 1 == 0)


@given(
    dtype=st.sampled_from(sorted(KINDS)),
    exact=st.floats(1e-9, 6e4) | st.floats(-6e4, -1e-9),
    cut=st.integers(0, 48),
    step=st.integers(-1, 1),
)
def test_a_stored_number_is_right_if_it_is_the_nearest(
    dtype: str, exact: float, cut: int, step: int
) -> None:
    mantissa = np.float64(exact).view(np.uint64) & ~np.uint64((1 << cut) - 1)
    value = float(mantissa.view(np.float64))  # with few bits: ties become frequent
    bits = bits_near(value, dtype) + step
    if not 0 < abs(number(bits, dtype)) < math.inf or bits & 0x7FFF == 0:
        return
    enclosure = Enclosure(np.array([value]), 0.0, 53)
    wrong, undecided = wrongly_rounded(raw_bits(bits, dtype), dtype, enclosure)
    assert bool(wrong[0]) != is_nearest(bits, value, dtype)
    assert undecided == 0


@given(weight=st.integers(0, 0x7F7F), factor=st.integers(0x3C00, 0x4100), step=st.integers(-2, 2))
@example(weight=0x3F81, factor=0x3FC0, step=0)  # ties, to both sides
@example(weight=0x3F83, factor=0x3FC0, step=0)
def test_short_products(weight: int, factor: int, step: int) -> None:
    """The check on bits says what the one by neighbours says."""
    value = number(weight, "BF16") * number(factor, "BF16")
    bits = bits_near(value, "BF16") + step
    if not 1e-30 < value < 1e38 or bits < 0:
        return
    wrong, _ = wrongly_rounded(
        raw_bits(bits, "BF16"), "BF16", Enclosure(np.array([value]), 0.0, 16)
    )
    single = np.array([number(factor, "BF16")], np.float32)
    right = products_are_rounded(raw_bits(bits, "BF16"), raw_bits(weight, "BF16"), single)
    assert right == (not wrong[0])
    assert step == 0 or not right or is_nearest(bits, value, "BF16")


def test_what_float64_does_not_tell() -> None:
    """Within the slack of a tie both neighbours are right, and counted."""
    one, above = (np.array([number], np.float32) for number in (1.0, 1.0 + 2.0**-23))
    tie = np.array([1.0 + 2.0**-24])
    for stored in (one, above):
        wrong, undecided = wrongly_rounded(stored, "F32", Enclosure(tie, np.array([1e-15]), 53))
        assert (bool(wrong[0]), undecided) == (False, 1)
    wrong, undecided = wrongly_rounded(above, "F32", Enclosure(tie, 0.0, 53))
    assert (bool(wrong[0]), undecided) == (True, 0)
