"""Whatever is wrong with the input: one clear sentence, exit status 2, and nothing written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

import normconvert
import zoo
from command_line import assert_sentence, nothing_written, run, run_here
from normconvert.ir.event import Event

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
Break = Callable[[Path], object]
Case = tuple[Break, tuple[str, ...]]


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in one file, in shards, and in float16; a test breaks a copy."""
    folder = tmp_path_factory.mktemp("originals")
    zoo.save("llama", folder / "single", dtype="float32")
    zoo.save("llama", folder / "shards", dtype="float32", max_shard_size="150KB")
    zoo.save("llama", folder / "half", dtype="float16")
    return folder


@pytest.fixture
def single(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "single", tmp_path / "llama"))


@pytest.fixture
def shards(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "shards", tmp_path / "llama"))


def assert_refused(folder: Path, *words: str, **options: Any) -> None:
    """`convert` refuses `folder` in a sentence with `words` and leaves nothing beside it."""
    with (
        nothing_written(folder.parent),
        pytest.raises(normconvert.NormconvertError) as caught,
    ):
        normconvert.convert(folder, folder.parent / "output", "flashnorm", **options)
    assert_sentence(str(caught.value), *words)


# --- the header of a safetensors file


def edit_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Replace the header by what `change` makes of it; the tensors' bytes stay."""
    header, data = split(folder / SINGLE)
    changed = change(header)
    join(folder / SINGLE, json.dumps(header if changed is None else changed).encode(), data)


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return header, content[8 + length :]


def join(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def header(change: Callable[[dict[str, Any]], object]) -> Break:
    return lambda folder: edit_header(folder, change)


def raw(change: Callable[[bytes], bytes]) -> Break:
    def apply(folder: Path) -> None:
        (folder / SINGLE).write_bytes(change((folder / SINGLE).read_bytes()))

    return apply


def set_in(name: str, key: str, value: object) -> Break:
    return header(lambda entries: entries[name].__setitem__(key, value))


def duplicate_key(folder: Path) -> None:
    entries, data = split(folder / SINGLE)
    text = json.dumps(entries)
    again = json.dumps({"model.norm.weight": entries["model.norm.weight"]})
    join(folder / SINGLE, f"{text[:-1]}, {again[1:]}".encode(), data)


def overlap(entries: dict[str, Any]) -> None:
    """Two tensors of one size at the same place, and as many bytes left over."""
    entries[Q]["data_offsets"] = entries[OTHER_Q]["data_offsets"]


def gap(entries: dict[str, Any]) -> None:
    for name, entry in entries.items():
        if name != "__metadata__":
            entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]


NORM, Q, OTHER_Q = (
    f"model.{name}.weight"
    for name in ("norm", "layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj")
)
BAD_FILES: dict[str, Case] = {
    "empty": (raw(lambda _: b""), (SINGLE, "first 8 bytes")),
    "four bytes": (raw(lambda content: content[:4]), (SINGLE, "first 8 bytes")),
    "ends in the header": (raw(lambda content: content[:100]), (SINGLE, "header")),
    "ends in the data": (raw(lambda content: content[:-100]), (SINGLE, "truncated")),
    "trailing bytes": (raw(lambda content: content + b"more"), (SINGLE, "belong to no tensor")),
    "garbage": (raw(lambda content: bytes(range(256)) * 99), (SINGLE, "header")),
    "header of zeros": (raw(lambda content: bytes(len(content))), (SINGLE, "header")),
    "pointer": (
        raw(lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        (SINGLE, "Git LFS", "git lfs pull"),
    ),
    "header of 2^63 bytes": (
        raw(lambda content: (2**63).to_bytes(8, "little") + content[8:]),
        (SINGLE, "header"),
    ),
    "header of 2^64 - 1 bytes": (raw(lambda content: b"\xff" * 8 + content[8:]), (SINGLE,)),
    "not JSON": (raw(lambda content: content[:8] + b"[" + content[9:]), (SINGLE, "JSON")),
    "header is a list": (header(lambda entries: [entries]), (SINGLE, "JSON object")),
    "deep header": (lambda folder: join(folder / SINGLE, b"[" * 99999, b""), (SINGLE, "JSON")),
    "not UTF-8": (raw(lambda content: content.replace(b"model.norm", b"model.n\xffrm")), (SINGLE,)),
    "half a character": (
        header(lambda entries: entries.update({"\ud800": entries.pop(NORM)})),
        (SINGLE, "header"),
    ),
    "a name twice": (duplicate_key, (SINGLE, "twice")),
    "overlap": (header(overlap), (SINGLE, "overlap")),
    "gap": (header(gap), (SINGLE, "gap")),
    "shape too large": (set_in(Q, "shape", [90, 55]), (SINGLE, Q, "shape")),
    "shape of 2^62": (set_in(Q, "shape", [2**62, 2**62]), (SINGLE, Q)),
    "negative shape": (set_in(Q, "shape", [-90, -54]), (SINGLE, Q, "natural")),
    "boolean shape": (set_in(NORM, "shape", [True, 54]), (SINGLE, NORM, "natural")),
    "fractional shape": (set_in(NORM, "shape", [54.0]), (SINGLE, NORM, "natural")),
    "shape is text": (set_in(NORM, "shape", "54"), (SINGLE, NORM, "natural")),
    "dtype of another size": (set_in(Q, "dtype", "F16"), (SINGLE, Q, "bytes")),
    "dtype unknown": (set_in(Q, "dtype", "F6_E3M2"), (SINGLE, Q, "F6_E3M2")),
    "dtype no text": (set_in(Q, "dtype", ["F32"]), (SINGLE, Q)),
    "offsets backwards": (
        header(lambda entries: entries[Q]["data_offsets"].reverse()),
        (SINGLE, Q),
    ),
    "three offsets": (set_in(Q, "data_offsets", [0, 1, 2]), (SINGLE, Q, "offsets")),
    "offsets of 2^64": (set_in(Q, "data_offsets", [2**64, 2**64 + 19440]), (SINGLE, Q)),
    "shape not a number": (set_in(NORM, "shape", [float("nan")]), (SINGLE, NORM, "natural")),
    "entry no object": (header(lambda entries: entries.update({Q: 1})), (SINGLE, Q)),
    "metadata no map": (header(lambda entries: {**entries, "__metadata__": 1}), ("__metadata__",)),
    "metadata not text": (
        header(lambda entries: {**entries, "__metadata__": {"a": 1}}),
        ("__metadata__",),
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_damaged_file(case: str, single: Path) -> None:
    damage, words = BAD_FILES[case]
    damage(single)
    assert_refused(single, *words)


# --- the index and its shards


def edit_json(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def make_pipe(path: Path) -> None:
    """A pipe in place of a file: whoever opens it for reading waits for ever."""
    path.unlink()
    os.mkfifo(path)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def index(change: Callable[[dict[str, str]], object]) -> Break:
    return lambda folder: edit_json(folder, INDEX, lambda content: change(content["weight_map"]))


def entry(target: str) -> Case:
    return index(lambda weight_map: weight_map.update({NORM: target})), (INDEX, repr(target))


def store_twice(folder: Path) -> None:
    save_file({**load_file(folder / SECOND), "lm_head.weight": torch.zeros(3)}, folder / SECOND)


SECOND, THIRD = "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"
BAD_SHARDS: dict[str, Case] = {
    "missing shard": (lambda folder: (folder / SECOND).unlink(), (SECOND, "missing", "download")),
    "shard is a folder": (
        lambda folder: make_folder(folder / SECOND),
        (SECOND, "missing"),
    ),
    "truncated shard": (lambda folder: os.truncate(folder / SECOND, 1000), (SECOND, "safetensors")),
    "tensor only in the index": (
        index(lambda weight_map: weight_map.update({"model.extra": SECOND})),
        (INDEX, "model.extra", SECOND),
    ),
    "endless shard": (
        index(lambda weight_map: weight_map.update({NORM: "x" * 5000})),
        (INDEX, "'xxxxx", "not a file beside it"),
    ),
    "tensor only in the file": (index(lambda weight_map: weight_map.pop(NORM)), (INDEX, NORM)),
    "tensor in another shard": (
        index(lambda weight_map: weight_map.update({NORM: "model-00001-of-00003.safetensors"})),
        (INDEX, NORM),
    ),
    "tensor in two shards": (store_twice, (THIRD, "'lm_head.weight'", "another shard")),
    "index not JSON": (lambda folder: (folder / INDEX).write_text("{"), (INDEX, "JSON")),
    "index a list": (lambda folder: (folder / INDEX).write_text("[]"), (INDEX, "JSON object")),
    "no weight_map": (lambda folder: (folder / INDEX).write_text("{}"), (INDEX, "weight_map")),
    "weight_map empty": (index(lambda weight_map: weight_map.clear()), (INDEX, "weight_map")),
    "weight_map of numbers": (index(lambda weight_map: weight_map.update({NORM: 1})), (INDEX,)),  # type: ignore[dict-item]
    "above": entry("../model.safetensors"),
    "absolute": entry("/etc/passwd"),
    "backslash": entry("..\\model.safetensors"),
    "below": entry("sub/model.safetensors"),
    "dots": entry(".."),
    "nothing": entry(""),
    "null character": entry("a\0b"),
    "line break": entry("model\n.safetensors"),
    "escape": entry("\x1b[2Jmodel.safetensors"),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_a_bad_index_or_shard(case: str, shards: Path) -> None:
    (shards.parent / SINGLE).write_bytes(b"outside")  # there, so that only its place is wrong
    damage, words = BAD_SHARDS[case]
    damage(shards)
    assert_refused(shards, *words)


# --- config.json


def config(**values: object) -> Break:
    return lambda folder: edit_json(folder, CONFIG, lambda content: content.update(values))


def only_pickles(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def other_weights(folder: Path) -> None:
    shutil.copyfile(folder / SINGLE, folder / "other.safetensors")
    config(transformers_weights="other.safetensors")(folder)


BAD_FOLDERS: dict[str, Case] = {
    "ten million layers": (
        config(num_hidden_layers=10**7),
        (CONFIG, "more than 10,", "parameters", "do the two belong together"),
    ),
    "eps not a number": (config(rms_norm_eps=float("nan")), ("none that is known",)),
    "no config": (lambda folder: (folder / CONFIG).unlink(), (CONFIG, "give the folder")),
    "config a folder": (
        lambda folder: make_folder(folder / CONFIG),
        (CONFIG,),
    ),
    "config a pipe": (lambda folder: make_pipe(folder / CONFIG), (CONFIG, "is no file")),
    "a link to nothing": (
        lambda folder: (folder / "tokenizer.json").symlink_to("nowhere"),
        ("tokenizer.json", "links to a file that is not there"),
    ),
    "config not JSON": (lambda folder: (folder / CONFIG).write_text("no"), (CONFIG, "JSON")),
    "config binary": (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe\xfd"), (CONFIG,)),
    "config a list": (lambda folder: (folder / CONFIG).write_text("[]"), (CONFIG, "JSON object")),
    "config empty": (lambda folder: (folder / CONFIG).write_text("{}"), (CONFIG, "model_type")),
    "model_type unknown": (config(model_type="llamma"), (CONFIG, "'llamma'", "transformers")),
    "model_type a number": (config(model_type=5), (CONFIG, "model_type")),
    "model_type a list": (config(model_type=["llama"]), (CONFIG, "model_type")),
    "hidden_size text": (config(hidden_size="wide"), (CONFIG, "hidden_size")),
    "hidden_size zero": (config(hidden_size=0), ()),
    "hidden_size negative": (config(hidden_size=-54), ()),
    "hidden_size other": (config(hidden_size=63), ("shape", "config.json")),
    "no heads": (config(num_attention_heads=0), ()),
    "one layer more": (config(num_hidden_layers=4), ("model.layers.3.", "missing")),
    "activation unknown": (config(hidden_act="sillu"), ("sillu",)),
    "architectures a number": (config(architectures=5), (CONFIG, "architectures")),
    "architecture unknown, type not causal": (
        config(model_type="clip", architectures=[]),
        (CONFIG, "architectures"),
    ),
    "only .bin": (only_pickles, ("pytorch_model.bin", "safetensors")),
    "no weights": (lambda folder: (folder / SINGLE).unlink(), (SINGLE, INDEX)),
    "bitsandbytes": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        (CONFIG, "quantised", "'bitsandbytes'"),
    ),
    "old bitsandbytes": (
        config(quantization_config={"load_in_8bit": True}),
        (CONFIG, "quantised"),
    ),
    "fp8": (
        config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}),
        (CONFIG, "quantised", "'fp8'"),
    ),
    "quantization_config text": (config(quantization_config="int4"), (CONFIG, "quantised")),
    "compressed-tensors": (
        config(compression_config={"quant_method": "compressed-tensors"}),
        (CONFIG, "quantised", "'compressed-tensors'"),
    ),
    "weights named by the config": (
        other_weights,
        (CONFIG, "'other.safetensors'", "transformers_weights", SINGLE),
    ),
    "an adapter beside the weights": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        ("adapter_config.json", "merge"),
    ),
    "quantised text model": (
        config(text_config={"quantization_config": {"quant_method": "gptq"}}),
        (CONFIG, "quantised", "'gptq'"),
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder(case: str, single: Path) -> None:
    damage, words = BAD_FOLDERS[case]
    damage(single)
    assert_refused(single, *words)


def test_two_checkpoints_of_ten_million_layers(single: Path) -> None:
    """Which nothing traces: they are loaded at once."""
    config(num_hidden_layers=10**7)(single)
    with pytest.raises(normconvert.NormconvertError) as caught:
        normconvert.verify_equivalence(single, single)
    assert_sentence(str(caught.value), CONFIG, "more than 10,", "parameters")


def test_a_name_is_no_path(single: Path) -> None:
    """Of a tensor that nothing reads: it is copied, and nothing is made under its name."""
    name = "../../evil\x1b[2J\n.weight"
    tensors(lambda stored: stored.update({name: torch.ones(3)}))(single)
    normconvert.convert(single, single.parent / "output", verify=False)
    assert sorted(path.name for path in single.parent.iterdir()) == ["llama", "output"]
    assert set((single.parent / "output").iterdir()) == {
        single.parent / "output" / each.name for each in single.iterdir()
    } | {single.parent / "output" / "normconvert.json"}
    assert torch.equal(load_file(single.parent / "output" / SINGLE)[name], torch.ones(3))
    tensors(lambda stored: stored.update({name: torch.ones(3, dtype=torch.int8)}))(single)
    shown = run_here("inspect", "llama", cwd=single.parent)
    assert "\x1b" not in shown.out + shown.err


class _Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("evil",)


def test_a_pickle_is_not_opened(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither alone nor beside the weights."""
    monkeypatch.chdir(single.parent)
    torch.save({NORM: _Malicious()}, single / "pytorch_model.bin")
    normconvert.convert(single, single.parent / "output")
    normconvert.verify_equivalence(single, single.parent / "output")
    shutil.rmtree(single.parent / "output")
    (single / SINGLE).unlink()
    assert_refused(single, "pytorch_model.bin", "safetensors")
    assert not (single.parent / "evil").exists()
    torch.load(single / "pytorch_model.bin", weights_only=False)
    assert (single.parent / "evil").is_dir()  # it is malicious


def test_a_config_without_architectures_falls_back_on_its_type(single: Path) -> None:
    for architectures in ([], None, ["NoSuchModel"]):
        config(architectures=architectures)(single)
        report = normconvert.convert(single, dry_run=True)
        assert report.inspection.plan.model == "LlamaForCausalLM"


# --- tensors


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    def apply(folder: Path) -> None:
        stored = load_file(folder / SINGLE)
        change(stored)
        save_file(stored, folder / SINGLE, metadata={"format": "pt"})

    return apply


def store_as(dtype: torch.dtype, scale: str) -> Break:
    def change(stored: dict[str, torch.Tensor]) -> None:
        stored[Q] = stored[Q].to(dtype)
        stored[Q + scale] = torch.ones(1)

    return tensors(change)


def pack(kind: str) -> Break:
    """q_proj as GPTQ and AWQ store it."""

    def change(stored: dict[str, torch.Tensor]) -> None:
        base = Q.removesuffix("weight")
        del stored[Q]
        stored[base + "qweight"] = torch.zeros(7, 90, dtype=torch.int32)
        stored[base + "qzeros"] = torch.zeros(1, 12, dtype=torch.int32)
        stored[base + "scales"] = torch.ones(1, 90, dtype=torch.float16)
        if kind == "gptq":
            stored[base + "g_idx"] = torch.zeros(54, dtype=torch.int32)

    return tensors(change)


BAD_TENSORS: dict[str, Case] = {
    "missing": (tensors(lambda stored: stored.pop(NORM)), (NORM, "LlamaForCausalLM")),
    "another shape": (
        tensors(lambda stored: stored.update({NORM: torch.ones(55)})),
        (NORM, "[55]", "[54]"),
    ),
    "transposed": (
        tensors(lambda stored: stored.update({Q: stored[Q].T.contiguous()})),
        (Q, "[54, 90]", "[90, 54]"),
    ),
    "fp8": (store_as(torch.float8_e4m3fn, "_scale_inv"), (Q, "F8_E4M3", "quantised")),
    "int8": (store_as(torch.int8, "_scale"), (Q, "I8", "quantised")),
    "gptq": (pack("gptq"), ("qweight", "quantised", "unquantised")),
    "awq": (pack("awq"), ("qweight", "quantised", "unquantised")),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_bad_tensor(case: str, single: Path) -> None:
    damage, words = BAD_TENSORS[case]
    damage(single)
    assert_refused(single, SINGLE if "quantised" in words else "", *words)


@pytest.mark.parametrize("options", [{"rewrite": "rmsnorm"}, {"tied": "untie"}], ids=str)
def test_mixed_dtypes_and_none_in_the_config(options: dict[str, Any], tmp_path: Path) -> None:
    """Which of them transformers loads all in is decided by the first tensor."""
    zoo.save("falcon_new", tmp_path / "falcon", dtype="bfloat16")

    def widen(stored: dict[str, torch.Tensor]) -> None:
        norms = [name for name in stored if "ln_" in name or name.startswith("transformer.h.0.")]
        stored.update({name: stored[name].float() for name in norms})

    tensors(widen)(tmp_path / "falcon")
    config_file = tmp_path / "falcon" / CONFIG
    document = json.loads(config_file.read_text())
    del document["dtype"]
    config_file.write_text(json.dumps(document))
    with nothing_written(tmp_path), pytest.raises(normconvert.NormconvertError) as caught:
        normconvert.convert(
            tmp_path / "falcon", tmp_path / "output", **{"rewrite": "flashnorm", **options}
        )
    assert_sentence(str(caught.value), CONFIG, "BF16 and F32", '"dtype"')
    config_file.write_text(json.dumps({**document, "dtype": "float32"}))
    done = normconvert.convert(
        tmp_path / "falcon", tmp_path / "output", **{"rewrite": "flashnorm", **options}
    )
    assert done.status == "converted"


def test_float16_overflow(originals: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(originals / "half", tmp_path / "llama"))
    gain = "model.layers.1.input_layernorm.weight"

    def enlarge(stored: dict[str, torch.Tensor]) -> None:
        for name in (gain, Q.replace(".0.", ".1.")):
            stored[name].view(-1)[0] = 6e4

    tensors(enlarge)(folder)
    assert_refused(folder, Q.replace(".0.", ".1."), "--dtype bfloat16", "--dtype float32")
    report = normconvert.convert(folder, tmp_path / "output", dtype="float32", verify=False)
    assert report.status == "converted"
    written = load_file(tmp_path / "output" / SINGLE)
    assert written[Q.replace(".0.", ".1.")].view(-1)[0] == torch.tensor(6e4).half().float() ** 2


def test_overflow_by_the_dtype_alone(single: Path) -> None:
    """Neither read by a norm nor changed, but too large for the dtype that was asked for."""
    embedding = "model.embed_tokens.weight"
    tensors(lambda stored: stored[embedding].view(-1)[:1].fill_(1e5))(single)
    assert_refused(single, embedding, "--dtype bfloat16", dtype="float16")


def test_gains_that_are_not_numbers(single: Path) -> None:
    """Nothing can be folded, which is not to say that all of it is folded already."""

    def spoil(stored: dict[str, torch.Tensor]) -> None:
        for name, tensor in stored.items():
            if "norm" in name:
                tensor[0] = torch.nan

    tensors(spoil)(single)
    assert_refused(single, "input_layernorm", "not finite")


# --- models


MARKER = "import pathlib\npathlib.Path({!r}).write_text('the code ran')\n"


def test_code_of_the_checkpoint_does_not_run_unasked(single: Path) -> None:
    ran = single.parent / "ran"
    for name in ("configuration_own.py", "modeling_own.py", "tokenization_own.py"):
        (single / name).write_text(MARKER.format(str(ran)))
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    config(model_type="own", auto_map=auto_map)(single)
    assert_refused(single, "'own'", "--trust-remote-code")
    # A type that transformers knows is run by transformers' code, and the tokenizer by none:
    # it is for the option to allow that, not for a question.
    config(model_type="llama")(single)
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (single / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (single / "vocab.json").write_text("{}")
    result = run("flashnorm", single, "--json", cwd=single.parent, answers="y\n" * 9)
    assert not ran.exists()
    assert result.status == 0
    assert result.json()["status"] == "converted"


@pytest.mark.parametrize("name", ["olmo", "bert"])
def test_a_model_without_a_norm_to_fold(name: str, tmp_path: Path) -> None:
    reason = {"olmo": "it has no gain", "bert": "added to another activation"}[name]
    if name == "bert":  # without the masked-language head, whose first layer does fold
        sizes = {"hidden_size": 54, "num_attention_heads": 9, "intermediate_size": 88}
        BertModel(BertConfig(vocab_size=101, num_hidden_layers=1, **sizes)).save_pretrained(
            tmp_path / name
        )
    else:
        zoo.save(name, tmp_path / name, dtype="float32")
    assert_refused(tmp_path / name, name, reason)


# --- where it is, and where it goes


def test_no_such_folder(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", "nowhere", "neither a folder nor")
    with nothing_written(tmp_path), pytest.raises(normconvert.NormconvertError) as caught:
        normconvert.convert("some/model", tmp_path / "output")
    assert_sentence(str(caught.value), "some/model", "HF_HUB_OFFLINE", "not a folder")


def test_a_file_in_place_of_a_folder(single: Path) -> None:
    with nothing_written(single.parent), pytest.raises(normconvert.NormconvertError) as caught:
        normconvert.inspect(single / SINGLE)
    assert_sentence(str(caught.value), SINGLE, "is a file")


def test_no_folder_at_all() -> None:
    with pytest.raises(normconvert.NormconvertError) as caught:
        normconvert.inspect("")
    assert_sentence(str(caught.value), "MODEL is empty")


def test_a_revision_of_a_folder(single: Path) -> None:
    assert_refused(single, "--revision", "local folder", revision="main")


def refused_output(source: Path, output: Path, *words: str, force: bool = False) -> None:
    with nothing_written(source.parent), pytest.raises(normconvert.NormconvertError) as caught:
        normconvert.convert(source, output, force=force)
    assert_sentence(str(caught.value), *words)


def test_output_and_source_in_each_other(single: Path) -> None:
    (single.parent / "link").symlink_to(single)
    for output in (single, single.parent / "link", single / "..", single / "output", single / "."):
        for force in (False, True):
            refused_output(single, output, str(single), "--output", force=force)
    refused_output(single.parent / "link", single, "--output", force=True)


def test_output_exists(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = single.parent / "output"
    output.mkdir()
    (output / "precious").write_text("work")
    refused_output(single, output, "exists", "--force")
    refused_output(single, output, "not written by normconvert", force=True)
    refused_output(single, output / "precious", "exists", "--force")
    refused_output(single, output / "precious", "not written by normconvert", force=True)
    refused_output(single, output / "precious" / "output", "is a file")
    (output / CONFIG).write_text("{}")
    monkeypatch.chdir(output)
    refused_output(single, Path(), "you are in", force=True)


def test_force_replaces_a_conversion_and_nothing_more(single: Path) -> None:
    output = single.parent / "output"
    normconvert.convert(single, output, verify=False)
    normconvert.convert(single, output, verify=False, force=True)
    (output / "notes.txt").write_text("work")
    refused_output(single, output, "notes.txt", "no part of the conversion", force=True)
    (output / "notes.txt").unlink()
    make_pipe(output / "normconvert.json")
    refused_output(single, output, "not written by normconvert", force=True)


def test_an_output_that_appears_meanwhile(single: Path) -> None:
    """It is looked for again at the last moment, and not replaced unasked."""
    output = single.parent / "output"

    def listen(event: Event) -> None:
        if event.stage == "writing" and not output.exists():
            output.mkdir()
            (output / "work").write_text("another program's")

    with pytest.raises(normconvert.NormconvertError) as caught:
        normconvert.convert(single, output, verify=False, listen=listen)
    assert_sentence(str(caught.value), "exists", "--force")
    assert [path.name for path in output.iterdir()] == ["work"]
    assert sorted(path.name for path in single.parent.iterdir()) == ["llama", "output"]


def test_output_where_nothing_can_be_made(single: Path) -> None:
    """Not even by root."""
    refused_output(single, Path("/proc/output"), "/proc/output", "--output")


def test_folders_made_on_the_way_are_removed(single: Path) -> None:
    head = "lm_head.weight"
    tensors(lambda stored: (stored[NORM].fill_(3e38), stored[head].fill_(3e38)))(single)
    refused_output(single, single.parent / "a" / "b" / "output", head, "F32", "no dtype")


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[bool]:
    """A file system of `size` bytes at `place`; False where the kernel does not allow one."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(single: Path) -> None:
    """Too small for the weights, which is seen before writing; or filled by another file."""
    (single / "tokenizer.json").write_bytes(bytes(300_000))
    for size, words in ((100 << 10, ("needs", "are free")), (500 << 10, ("No space left",))):
        with small_disk(single.parent / "disk", size) as mounted:
            if mounted:
                refused_output(single, single.parent / "disk" / "output", *words)
        (single.parent / "disk").rmdir()
    # Anyone may do this: files of at most 100 kB.
    with nothing_written(single.parent):
        result = run(
            "flashnorm", single, "--no-verify", "-o", "output",
            cwd=single.parent,
            before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        )  # fmt: skip
    result.assert_refused(str(single.parent / "output"), "File too large", "--output")


# --- through the command, each kind once


COMMANDS: dict[str, Case] = {
    "damaged": (raw(lambda content: content[:-100]), (SINGLE, "truncated")),
    "unknown": (config(model_type="llamma"), (CONFIG, "'llamma'")),
    "quantised": (pack("gptq"), ("qweight", "quantised")),
    "misfit": (tensors(lambda stored: stored.pop(NORM)), (NORM, "LlamaForCausalLM")),
    "crash of the model's own code": (config(hidden_act="sillu"), ("sillu",)),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_says_so(case: str, single: Path) -> None:
    damage, words = COMMANDS[case]
    damage(single)
    in_a_process = case in ("damaged", "misfit")  # before torch is imported, and after
    with nothing_written(single.parent):
        (run if in_a_process else run_here)("flashnorm", "llama", cwd=single.parent).assert_refused(
            *words
        )
        for arguments in (["inspect", "llama"], ["flashnorm", "llama", "--dry-run"]):
            run_here(*arguments, cwd=single.parent).assert_refused(*words)


def test_the_command_says_it_in_json(single: Path) -> None:
    (single / CONFIG).unlink()
    with nothing_written(single.parent):
        for command in ("flashnorm", "inspect"):
            result = run_here(command, "llama", "--json", cwd=single.parent)
            result.assert_refused(CONFIG, code="source")
