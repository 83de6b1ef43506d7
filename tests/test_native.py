"""Checkpoints in the native format, used as their users use them: transformers, and nothing else.

Whether a conversion is right is for `test_conversion.py` and its like. Here: whether what was
written can be loaded, run, trained, saved, copied and compiled as its original can, with the code
that it carries or with normconvert, and that nothing else makes a wrong model of it.
"""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Cache,
    GPT2Config,
    GPT2LMHeadModel,
    pipeline,
)
from transformers.pytorch_utils import Conv1D

import normconvert
import zoo
from command_line import environment
from normconvert import precision
from normconvert.api import Rewrite
from normconvert.ir.native import NOT_FOR_STOCK_CLASSES
from normconvert.nn import CRMSNorm, RMSNorm, modeling_normconvert, recenter
from normconvert.precision import float64

EXACT = 1e-12  # of the largest logit, in float64
MODELS = Path(__file__).parents[1] / "models"
TRAINED = ("tiny-gpt2", "tiny-llama")
SHARDED = {"mixtral"}
CODE = "modeling_normconvert.py"
PROMPT = "Alice was beginning to get very tired of"
LENGTH = 24  # of what is generated


@dataclass(frozen=True, slots=True)
class Case:
    """A conversion: of a shipped model, or of one of the zoo."""

    name: str
    rewrite: Rewrite

    def __str__(self) -> str:
        return f"{self.name}-{self.rewrite}"


GPT2_RMS = Case("tiny-gpt2", "rmsnorm")
GPT2_CRMS = Case("tiny-gpt2", "crmsnorm")
LLAMA = Case("tiny-llama", "flashnorm")
PRMS = Case("tiny-llama", "prmsnorm")  # of all coordinates, which makes it exact
NEOX = Case("gpt_neox", "crmsnorm")
XGLM = Case("xglm", "crmsnorm")  # recentered where the first layer reads
MIXTRAL = Case("mixtral", "flashnorm")
PHIMOE = Case("phimoe", "rmsnorm")
PHIMOE_CRMS = Case("phimoe", "crmsnorm")  # modules that need all coordinates
GEMMA = Case("gemma", "flashnorm")  # gains of 1 + w
ZAMBA = Case("zamba2", "flashnorm")  # gains of shared blocks
CASES = (
    GPT2_RMS,
    GPT2_CRMS,
    LLAMA,
    PRMS,
    NEOX,
    XGLM,
    MIXTRAL,
    PHIMOE,
    PHIMOE_CRMS,
    GEMMA,
    ZAMBA,
)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@dataclass(frozen=True, slots=True)
class Pair:
    """A checkpoint in float64, and its conversion."""

    source: Path
    output: Path


Pairs = Callable[[Case], Pair]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """The two folders of a case, made once."""

    @cache
    def source(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name) / "original"
        if name in TRAINED:
            shutil.copytree(MODELS / name, folder)
            load(folder).save_pretrained(folder)
        else:
            zoo.save(name, folder, max_shard_size="150KB" if name in SHARDED else "5GB")
        return folder

    @cache
    def pair(case: Case) -> Pair:
        original = source(case.name)
        output = original.with_name(case.rewrite)
        done = normconvert.convert(
            original, output, case.rewrite, format="native", fraction=1.0, verify=False
        )
        assert done.status == "converted"
        return Pair(original, output)

    return pair


def load(folder: Path, **options: Any) -> Any:
    """The model, loaded as users load it; in float64, unless told otherwise."""
    given = {"dtype": torch.float64, "attn_implementation": "eager", **options}
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **given)
    assert not any(info.values()), info
    return plain(model)


def plain(model: Any) -> Any:
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the default has no float64 kernel
    return model.eval()


def token_ids(batch: int = 3, length: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, zoo.SIZES["vocab_size"], (batch, length), generator=generator)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor | None = None, **given: Any) -> torch.Tensor:
    with float64():
        found: torch.Tensor = model(token_ids() if ids is None else ids, **given).logits
    return found


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype == torch.float64
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= EXACT * expected.abs().max()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    shards = sorted(folder.glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def generated(model: Any, folder: Path, **options: Any) -> str:
    """What the model writes after the prompt, always taking the likeliest token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**given, max_new_tokens=LENGTH, do_sample=False, **options)
    text: str = tokenizer.decode(ids[0])
    assert len(ids[0]) == len(given["input_ids"][0]) + LENGTH
    return text


# --- loading, in a process of its own --------------------------------------------------------

WITHOUT_NORMCONVERT = """
import sys
sys.modules["normconvert"] = None
try:
    import normconvert
except ImportError:
    pass
else:
    raise SystemExit("normconvert can be imported")
"""

# The logits of every folder given, computed as in this file; and what the first one writes.
LOAD = """
import importlib.util, json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
request = json.loads(sys.argv[1])
options = request["options"]
spec = importlib.util.spec_from_file_location("precision", request["precision"])
precision = importlib.util.module_from_spec(spec)
spec.loader.exec_module(precision)
found, modules = {}, {}
for folder in request["folders"]:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="float64", attn_implementation="eager", output_loading_info=True, **options
    )
    assert not any(info.values()), info
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    modules[folder] = type(model).__module__
    with torch.no_grad(), precision.float64():
        found[folder] = model(torch.tensor(request["ids"])).logits
    model.save_pretrained(request["saved"] + folder)
    if folder == request["folders"][0]:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        given = tokenizer(request["prompt"], return_tensors="pt")
        ids = model.generate(**given, max_new_tokens=request["length"], do_sample=False)
        text = tokenizer.decode(ids[0])
torch.save({"logits": found, "modules": modules, "text": text}, request["result"])
"""


def python(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a script that is nowhere near normconvert, and has nobody to answer a question."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *arguments],
        cwd=cwd,
        env=environment(HF_HOME=str(cwd / "home"), HF_HUB_DISABLE_PROGRESS_BARS="1"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def loaded_elsewhere(before: str, folders: list[Path], cwd: Path, **options: Any) -> Any:
    result = cwd / "result.pt"
    request = {
        "folders": [str(folder) for folder in folders],
        "ids": token_ids().tolist(),
        "prompt": PROMPT,
        "length": LENGTH,
        "precision": precision.__file__,
        "options": options,
        "saved": str(cwd / "saved"),
        "result": str(result),
    }
    done = python(before + LOAD, json.dumps(request), cwd=cwd)
    assert done.returncode == 0, done.stderr
    return torch.load(result)


def test_carried_code_needs_no_normconvert(pairs: Pairs, tmp_path: Path) -> None:
    found = {case: pairs(case) for case in (GPT2_RMS, GPT2_CRMS, LLAMA, XGLM, MIXTRAL, PHIMOE)}
    outputs = [pair.output for pair in found.values()]
    result = loaded_elsewhere(WITHOUT_NORMCONVERT, outputs, tmp_path, trust_remote_code=True)
    for pair in found.values():
        assert result["modules"][str(pair.output)].startswith("transformers_modules.")
        expected = logits(load(pair.source))
        assert_same(result["logits"][str(pair.output)], expected)
        saved = Path(f"{tmp_path}/saved{pair.output}")
        assert (saved / CODE).read_bytes() == Path(modeling_normconvert.__file__).read_bytes()
        assert_same(logits(load(saved)), expected)
    source = found[GPT2_RMS].source
    assert result["text"] == generated(load(source), source)


@pytest.mark.parametrize(
    "order",
    ["import normconvert", "from transformers import AutoModelForCausalLM; import normconvert"],
)
def test_normconvert_loads_it_whichever_is_imported_first(
    order: str, pairs: Pairs, tmp_path: Path
) -> None:
    pair = pairs(GPT2_CRMS)
    result = loaded_elsewhere(f"{order}\n", [pair.output], tmp_path)
    assert result["modules"] == {str(pair.output): "normconvert.nn.modeling_normconvert"}
    assert_same(result["logits"][str(pair.output)], logits(load(pair.source)))
    assert result["text"] == generated(load(pair.source), pair.source)


def test_with_neither_it_is_refused(pairs: Pairs, tmp_path: Path) -> None:
    script = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
for auto_class in AutoConfig, AutoModel, AutoModelForCausalLM:
    for options in {}, {"trust_remote_code": False}:
        try:
            auto_class.from_pretrained(sys.argv[1], **options)
        except ValueError as error:
            assert "`trust_remote_code=True`" in str(error), error
        else:
            raise SystemExit(f"{auto_class} loads it")
    try:
        auto_class.from_pretrained(sys.argv[2], trust_remote_code=True)
    except ValueError as error:
        assert "model type `normconvert`" in str(error), error
    else:
        raise SystemExit(f"{auto_class} loads it without its code")
assert AutoTokenizer.from_pretrained(sys.argv[1])("Alice").input_ids == [32, 75, 72, 66, 68]
"""
    output = pairs(GPT2_RMS).output
    without = shutil.copytree(output, tmp_path / "without")
    config = config_of(output)
    del config["auto_map"]
    (without / "config.json").write_text(json.dumps(config))
    done = python(WITHOUT_NORMCONVERT + script, str(output), str(without), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# --- loading, here ---------------------------------------------------------------------------


@every_case
def test_exact(case: Case, pairs: Pairs) -> None:
    pair = pairs(case)
    model = load(pair.output)
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    assert_same(logits(model), logits(load(pair.source)))


def test_installed_code_goes_before_carried_code(pairs: Pairs) -> None:
    model = load(pairs(LLAMA).output, trust_remote_code=True)
    assert type(model).__module__ == modeling_normconvert.__name__


def test_a_class_of_its_own_loads_it_too(pairs: Pairs, tmp_path: Path) -> None:
    """As training code does it, that loads what it saved."""
    pair = pairs(GPT2_CRMS)
    model = load(pair.output)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert type(again) is type(model)
    assert again.dtype == torch.float64
    assert_same(logits(again), logits(load(pair.source)))


def test_what_is_no_class_of_the_checkpoint_is_refused(pairs: Pairs) -> None:
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForSequenceClassification.from_pretrained(pairs(GPT2_RMS).output)


def test_a_stock_class_does_not_load_it(pairs: Pairs) -> None:
    """It looks for weights under a name that says how to load them, and finds none."""
    assert modeling_normconvert.NOT_FOR_STOCK_CLASSES == NOT_FOR_STOCK_CLASSES
    with pytest.raises(OSError, match="AutoModelForCausalLM"):
        GPT2LMHeadModel.from_pretrained(pairs(GPT2_RMS).output)


def test_a_stock_class_whose_defaults_fit_does_not_load_it(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GPT-2 itself has the default sizes: everything in config.json but the sizes is lost."""
    output = pairs(GPT2_RMS).output

    class SmallConfig(GPT2Config):  # type: ignore[misc]
        def __init__(self, **given: Any) -> None:
            sizes = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
            super().__init__(**{name: config_of(output)[name] for name in sizes} | given)

    monkeypatch.setattr(GPT2LMHeadModel, "config_class", SmallConfig)
    with pytest.raises(OSError, match="AutoModelForCausalLM"):
        GPT2LMHeadModel.from_pretrained(output)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map(device_map: Any, pairs: Pairs) -> None:
    pair = pairs(GPT2_CRMS)
    model = load(pair.output, device_map=device_map)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert_same(logits(model), logits(load(pair.source)))


@pytest.mark.parametrize(
    ("case", "layers"),
    [
        (GPT2_CRMS, "transformer.h"),
        (XGLM, "model.layers"),
        (MIXTRAL, "model.layers"),
    ],
    ids=str,
)
def test_offloaded_to_disk(case: Case, layers: str, pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs(case)
    model = load(pair.output)
    path, _, _ = layers.rpartition(".")
    parts = [f"{path}.{name}" for name, _ in model.get_submodule(path).named_children()]
    parts = [*(part for part in parts if part != layers), "lm_head"]
    count = len(model.get_submodule(layers))
    device_map = dict.fromkeys(parts, "cpu")
    device_map |= {f"{layers}.{i}": "disk" if i % 2 else "cpu" for i in range(count)}
    model = load(pair.output, device_map=device_map, offload_folder=tmp_path)
    on_disk = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert on_disk
    assert all(name.startswith(f"{layers}.1.") or ".3." in name for name in on_disk)
    assert_same(logits(model), logits(load(pair.source)))


@pytest.mark.parametrize("case", [GPT2_CRMS, NEOX, LLAMA, MIXTRAL], ids=str)
def test_all_on_disk(case: Case, pairs: Pairs, tmp_path: Path) -> None:
    """Norms lend their weights to hooks: these have to read them as a call does."""
    pair = pairs(case)
    model = load(pair.output, device_map={"": "disk"}, offload_folder=tmp_path)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_same(logits(model), logits(load(pair.source)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", [GPT2_RMS, GPT2_CRMS, LLAMA], ids=str)
def test_other_dtypes(case: Case, dtype: str, pairs: Pairs) -> None:
    """Converted or not, the same arithmetic gives the same errors."""
    pair = pairs(case)
    exact = logits(load(pair.source))
    models = [load(folder, dtype=getattr(torch, dtype)) for folder in (pair.source, pair.output)]
    for model in models:
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    with torch.no_grad():
        before, after = ((model(token_ids()).logits - exact).std() for model in models)
    assert after <= 2 * before


def test_sharded(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs(MIXTRAL)
    index = "model.safetensors.index.json"
    before, after = (
        json.loads((folder / index).read_text())["weight_map"]
        for folder in (pair.source, pair.output)
    )
    assert len(set(after.values())) > 2
    # Beside the gains, nothing is gone, and nothing is in another shard.
    assert after == {name: shard for name, shard in before.items() if "norm" not in name}
    model = load(pair.output)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > len(set(after.values()))
    assert set(json.loads((tmp_path / index).read_text())["weight_map"]) == set(after)
    assert_same(logits(load(tmp_path)), logits(model))


# --- saving ----------------------------------------------------------------------------------


@every_case
def test_saved_again(case: Case, pairs: Pairs, tmp_path: Path) -> None:
    output = pairs(case).output
    model = load(output)
    model.save_pretrained(tmp_path)
    assert (tmp_path / CODE).read_bytes() == (output / CODE).read_bytes()
    before, after = config_of(output), config_of(tmp_path)
    for key in ("model_type", "architectures", "auto_map", "normconvert", "tie_word_embeddings"):
        assert after.get(key) == before.get(key), key
    assert after["model_type"] == "normconvert"
    assert after["architectures"] == [f"Normconvert{type(model).__name__}"]
    assert after["auto_map"] == {"AutoConfig": "modeling_normconvert.NormconvertConfig"}
    # Bit for bit, under the names on disk: per expert, say.
    old, new = stored(output), stored(tmp_path)
    if case is NEOX:  # an added bias, beside embed_out.weight: transformers reads both names
        new["lm_head.bias"] = new.pop("embed_out.bias")
    assert set(old) == set(new)
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert_same(logits(load(tmp_path)), logits(model))


def test_a_saved_config_carries_the_code_too(pairs: Pairs, tmp_path: Path) -> None:
    AutoConfig.from_pretrained(pairs(LLAMA).output).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", CODE]
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.normconvert == config_of(pairs(LLAMA).output)["normconvert"]


# --- text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [GPT2_RMS, GPT2_CRMS, LLAMA, PRMS], ids=str)
def test_generates_the_same_text(case: Case, pairs: Pairs) -> None:
    pair = pairs(case)
    original, model = load(pair.source), load(pair.output)
    expected = generated(original, pair.source)
    assert expected.startswith(PROMPT)
    for use_cache in (True, False):
        assert generated(model, pair.output, use_cache=use_cache) == expected
    assert generated(model, pair.output, num_beams=3) == generated(
        original, pair.source, num_beams=3
    )


@pytest.mark.parametrize("case", [GPT2_CRMS, XGLM], ids=str)
def test_cache_gives_the_same_logits(case: Case, pairs: Pairs) -> None:
    model = load(pairs(case).output)
    whole, ids = logits(model), token_ids()
    with torch.no_grad(), float64():
        past = model(ids[:, :7], use_cache=True)
        cache = {name: value for name, value in past.items() if isinstance(value, Cache)}
        rest = model(ids[:, 7:], **cache, use_cache=True)
    assert_same(torch.cat([past.logits, rest.logits], dim=1), whole)


@pytest.mark.parametrize("case", [GPT2_RMS, GPT2_CRMS, LLAMA], ids=str)
def test_padded_batch(case: Case, pairs: Pairs) -> None:
    pair = pairs(case)
    tokenizer = AutoTokenizer.from_pretrained(pair.output, padding_side="left")
    texts = [PROMPT, "The Queen", "Down, down, down. Would the fall"]
    given = tokenizer(texts, return_tensors="pt", padding=True)
    ids, mask = given["input_ids"], given["attention_mask"]
    assert (mask == 0).any()
    original, model = load(pair.source), load(pair.output)
    before, after = (logits(each, ids, attention_mask=mask) for each in (original, model))
    assert_same(after[mask == 1], before[mask == 1])
    # What is masked is not a number in float64, in which Llama's softmax is not.
    original, model = (load(folder, dtype=torch.float32) for folder in (pair.source, pair.output))
    found = written(model, tokenizer, texts)
    assert found == [text for each in texts for text in written(model, tokenizer, [each])]
    assert found == written(original, tokenizer, texts)


def written(model: Any, tokenizer: Any, texts: list[str]) -> list[str]:
    given = tokenizer(texts, return_tensors="pt", padding=True)
    ids = model.generate(**given, max_new_tokens=LENGTH, do_sample=False)
    found: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return found


def test_pipeline(pairs: Pairs) -> None:
    pair = pairs(GPT2_RMS)
    found, expected = (
        pipeline("text-generation", str(folder))(PROMPT, max_new_tokens=LENGTH, do_sample=False)
        for folder in (pair.output, pair.source)
    )
    assert found == expected


def test_the_tokenizer_of_the_stock_type(pairs: Pairs, tmp_path: Path) -> None:
    """Where no file names a class, as in GPT-2's own repository, the type of the model decides."""
    pair = pairs(GPT2_RMS)
    found = []
    for folder in (pair.source, pair.output):
        copied = shutil.copytree(folder, tmp_path / folder.name)
        (copied / "tokenizer_config.json").write_text('{"model_max_length": 256}')
        found.append(AutoTokenizer.from_pretrained(copied))
    assert type(found[1]) is type(found[0])
    assert type(found[0]).__name__ == "GPT2Tokenizer"
    assert found[1].eos_token == found[0].eos_token == "<|endoftext|>"


# --- training --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [GPT2_CRMS, LLAMA, PHIMOE], ids=str)
def test_gradient_checkpointing(case: Case, pairs: Pairs) -> None:
    model = load(pairs(case).output).train()
    ids = token_ids()
    runs = []
    for checkpointing in (False, True):
        if checkpointing:
            # transformers gives it another name.
            new = getattr(model, "activation_checkpointing_enable", None)
            (new or model.gradient_checkpointing_enable)()
        model.zero_grad()
        torch.manual_seed(0)  # Phi's router adds noise in training
        with float64():
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        runs.append((loss.detach(), gradients))
    (loss, gradients), (other_loss, other_gradients) = runs
    assert_same(other_loss, loss)
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert_same(other_gradients[name], gradient)


@pytest.mark.parametrize("case", [GPT2_CRMS, LLAMA, GEMMA, XGLM, MIXTRAL, ZAMBA], ids=str)
def test_from_config_makes_a_new_model(case: Case, pairs: Pairs) -> None:
    pair = pairs(case)
    config = AutoConfig.from_pretrained(pair.output)
    model = plain(AutoModelForCausalLM.from_config(config, dtype=torch.float64))
    trained = load(pair.output)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in trained.state_dict().items()}
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.abs().max() < 10, name
    for module in model.modules():
        if isinstance(module, modeling_normconvert._Norm) and module.weight is not None:
            assert (module.weight + module.offset == 1).all()
    before, after = logits(trained), logits(model)
    assert after.isfinite().all()
    assert (after - before).abs().max() > 0.01 * before.abs().max()


def test_more_tokens(pairs: Pairs) -> None:
    """The embedding is recentered after it has grown, too."""
    pair = pairs(GPT2_CRMS)
    model = load(pair.output)
    model.resize_token_embeddings(300, mean_resizing=False)
    assert_same(logits(model)[..., :257], logits(load(pair.source)))


def test_more_tokens_are_saved(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs(NEOX)
    model = load(pair.output)
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 3, mean_resizing=False)
    model.save_pretrained(tmp_path)
    assert_same(logits(load(tmp_path))[..., :size], logits(load(pair.source)))


# --- copies, other forms ---------------------------------------------------------------------


@pytest.mark.parametrize("case", [GPT2_CRMS, XGLM, MIXTRAL], ids=str)
def test_copies_stand_alone(case: Case, pairs: Pairs) -> None:
    pair = pairs(case)
    model, expected = load(pair.output), logits(load(pair.source))
    state = pickle.loads(pickle.dumps(model.state_dict()))
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for each in copies:
        assert type(each) is type(model)
        assert_same(logits(each), expected)
    model.load_state_dict(state)
    assert_same(logits(model), expected)
    for config in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
        assert type(config) is type(model.config)
        assert config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("case", [GPT2_CRMS, LLAMA], ids=str)
def test_export(case: Case, pairs: Pairs) -> None:
    model = load(pairs(case).output)
    ids, given = token_ids(), {"use_cache": False}
    program = torch.export.export(model, (ids,), given, strict=False).module()
    with torch.no_grad():
        assert_same(program(ids, **given).logits, model(ids, **given).logits)


# torch's own, on the first import of the compiler.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # Python 3.13.0
def test_compile(tmp_path: Path) -> None:
    """With a small model, for it takes long."""
    entry = zoo.Entry(model_type="gpt2", config={"n_layer": 1, "n_embd": 54, "n_head": 9})
    source, output = tmp_path / "source", tmp_path / "output"
    zoo.build(entry).to(torch.float64).save_pretrained(source)
    normconvert.convert(source, output, "crmsnorm", verify=False)
    model = load(output)
    with torch.no_grad():
        compiled: Any = torch.compile(model)
        found = compiled(token_ids(), use_cache=False).logits
        assert_same(found, model(token_ids(), use_cache=False).logits)


# --- what was converted ----------------------------------------------------------------------


def test_every_layernorm_of_gpt2_is_replaced(pairs: Pairs) -> None:
    for case, kind, size in ((GPT2_RMS, RMSNorm, 64), (GPT2_CRMS, CRMSNorm, 63)):
        pair = pairs(case)
        model = load(pair.output)
        assert not [m for m in model.modules() if "LayerNorm" in type(m).__name__]
        assert sum(isinstance(module, kind) for module in model.modules()) == 9
        tensors, before = stored(pair.output), stored(pair.source)
        # The head is tied to the embedding, so the last norm keeps its gain and bias.
        gone = set(before) - set(tensors)
        layers = [f"transformer.h.{i}.ln_{j}" for i in range(4) for j in (1, 2)]
        assert gone == {f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")}
        assert set(tensors) <= set(before)
        names = ("wpe.weight", "h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight")
        found = {name: list(tensors[f"transformer.{name}"].shape) for name in names}
        assert found == {
            "wpe.weight": [256, size],
            "h.0.attn.c_attn.weight": [size, 192],
            "h.0.attn.c_proj.weight": [64, size],
        }
        biases = {name: tensors[f"transformer.h.0.mlp.{name}.bias"] for name in ("c_fc", "c_proj")}
        assert biases["c_fc"].shape == (256,)
        assert biases["c_proj"].shape == (size,)
        # Those of all d coordinates: the head's, tied, and the last norm's.
        assert tensors["transformer.wte.weight"].shape == (257, 64)
        assert tensors["transformer.ln_f.weight"].shape == (64,)


def test_nothing_of_an_untied_models_norms_is_left(pairs: Pairs) -> None:
    pair = pairs(NEOX)
    model = load(pair.output)
    assert not [m for m in model.modules() if "LayerNorm" in type(m).__name__]
    tensors, before = stored(pair.output), stored(pair.source)
    assert not [name for name in tensors if "norm" in name]
    assert tensors["gpt_neox.embed_in.weight"].shape == (101, 89)
    assert tensors["embed_out.weight"].shape == (101, 89)
    # What the last norm's bias gives the logits.
    added = set(tensors) - set(before)
    assert [(name.rpartition(".")[2], tensors[name].shape) for name in added] == [("bias", (101,))]


@pytest.mark.parametrize("centered", [True, False])
def test_without_centering_the_model_is_another(
    centered: bool, pairs: Pairs, tmp_path: Path
) -> None:
    """RMSNorms with the original's gains: the same model, if what writes is centered, only then."""
    pair = pairs(GPT2_RMS)
    folder = shutil.copytree(pair.output, tmp_path / "folder")
    config = config_of(folder)
    changes = config["normconvert"]
    for norm in changes["norms"]:
        norm |= {"gain": True, "bias": True}
    changes["recenterings"] = changes["recenterings"] if centered else []
    (folder / "config.json").write_text(json.dumps(config))
    tensors = stored(pair.source)
    for name, tensor in tensors.items():
        if centered and name.split(".")[-2] in ("wpe", "c_proj"):
            tensors[name] = recenter(tensor)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(folder)
    assert isinstance(model.transformer.h[0].attn.c_proj, Conv1D)
    before, after = logits(load(pair.source)), logits(model)
    difference = (after - before).abs().max() / before.abs().max()
    assert difference < EXACT if centered else difference > 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rewrite", ["rmsnorm", "crmsnorm"])
def test_half_precision_is_equivalent(rewrite: Rewrite, dtype: Any, tmp_path: Path) -> None:
    """From a checkpoint in half precision, or to one."""
    source = MODELS / "tiny-gpt2"
    options: dict[str, Any] = {"dtype": dtype}
    if rewrite == "crmsnorm":
        source = tmp_path / "source"
        load(MODELS / "tiny-gpt2", dtype=getattr(torch, dtype)).save_pretrained(source)
        options = {}
    done = normconvert.convert(source, tmp_path / "output", rewrite, **options)
    assert done.status == "converted"
    assert done.verification is not None
    assert done.verification.equivalent
    found = {tensor.dtype for tensor in stored(tmp_path / "output").values()}
    assert found == {getattr(torch, dtype)}
    assert load(tmp_path / "output", dtype="auto").dtype == getattr(torch, dtype)
    assert not [m for m in load(tmp_path / "output").modules() if isinstance(m, nn.LayerNorm)]
