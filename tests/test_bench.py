"""`normconvert bench`: what it measures, how it counts, what it prints and what it refuses."""

from __future__ import annotations

import struct
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import zoo
from command_line import Run, environment, nothing_written, run, run_here
from normconvert import bench, convert
from normconvert.benchmark import passes, report, rounds
from normconvert.benchmark.claims import claims
from normconvert.benchmark.models import removable, without_norms
from normconvert.benchmark.norms import main_norm
from normconvert.benchmark.training import step, trained
from normconvert.cli.show_bench import claim_line
from normconvert.ir.bench import BenchOptions, Measurement, Quartiles, Timing
from normconvert.source import open_checkpoint
from normconvert.trace import trace

MODELS = Path(__file__).parents[1] / "models"
QUICK = ("--seconds", "0", "--no-compile")  # five rounds of each

NORMS = (
    "LayerNorm",
    "RMSNorm",
    "RMSNorm, weightless",
    "RMSNorm, weightless, zero mean",
    "pRMSNorm 1/16, weightless",
    "CRMSNorm",
    "CRMSNorm, d coordinates out",
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A report as JSON, of a model that is converted for it."""
    here = tmp_path_factory.mktemp("llama")
    with nothing_written(here), mock.patch("psutil.getloadavg", return_value=(0.5, 9.0, 9.0)):
        return run_here("bench", MODELS / "tiny-llama", *QUICK, "--json", cwd=here)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A report as text, of a model and its conversion, and the picture of it."""
    here = tmp_path_factory.mktemp("gpt2")
    convert(MODELS / "tiny-gpt2", here / "converted", "crmsnorm", verify=False)
    command = ("bench", MODELS / "tiny-gpt2", "converted", *QUICK, "--plot", "bench.png")
    with mock.patch("psutil.getloadavg", return_value=(1000.0, 0.0, 0.0)):
        return run_here(*command, cwd=here, columns=80), here / "bench.png"


def test_a_report_for_machines(llama: Run) -> None:
    """Every key that the document has, and how the figures hang together."""
    assert llama.status == 0
    assert llama.err == ""
    report = llama.json()
    assert {*report} == {
        "schema_version", "model", "converted", "rules", "norms", "hidden_size", "dtype", "device",
        "threads", "processor", "torch", "transformers", "busy", "measurements", "claims",
        "notes",
    }  # fmt: skip
    assert report["schema_version"] == 1
    assert report["converted"] is None
    assert report["rules"] == ["flashnorm"]
    assert (report["norms"], report["hidden_size"]) == (9, 64)
    assert (report["dtype"], report["device"], report["notes"]) == ("float32", "cpu", [])
    found = [(each["task"], each["tokens"]) for each in report["measurements"]]
    assert found == [
        ("norm", 1), ("norm", 248), ("norm and linear", 1), ("norm and linear", 248),
        ("prefill", 248), ("decode", 248), ("training", 128),
    ]  # fmt: skip
    for each in report["measurements"]:
        assert {*each} == {"task", "compiled", "tokens", "rounds", "timings", "note", "share"}
        assert (each["compiled"], each["rounds"], each["note"]) == (False, 5, None)
        assert each["timings"][0]["speedup"] == {"lower": 1, "median": 1, "upper": 1}
        for timing in each["timings"]:
            assert {*timing} == {"name", "seconds", "speedup"}
            for quartile in (timing["seconds"], timing["speedup"]):
                assert 0 < quartile["lower"] <= quartile["median"] <= quartile["upper"]
                assert quartile["upper"] < 1e3
    assert names(report, "norm") == (*NORMS, "this model's LlamaRMSNorm")
    assert names(report, "norm and linear") == ("RMSNorm, then linear", "deferred 1/RMS")
    assert names(report, "prefill") == names(report, "decode")
    assert names(report, "decode") == ("original", "converted", "ceiling")
    assert names(report, "training") == ("original", "ceiling")  # nothing to make an RMSNorm


def names(report: dict[str, Any], task: str) -> tuple[str, ...]:
    first = next(each for each in report["measurements"] if each["task"] == task)
    return tuple(timing["name"] for timing in first["timings"])


def test_the_papers_claims_beside_what_was_measured(llama: Run) -> None:
    one, both = llama.json()["claims"]
    assert (one["arxiv"], one["lower"], one["upper"]) == ("1910.07467", 0.07, 0.64)
    assert (both["arxiv"], both["lower"], both["upper"]) == ("2305.14858", 0.01, 0.10)
    rmsnorms = [
        next(t for t in each["timings"] if t["name"] == "RMSNorm")["speedup"]
        for each in llama.json()["measurements"]
        if each["task"] == "norm"
    ]
    steady = [each["median"] for each in rmsnorms if each["upper"] <= 1.5 * each["lower"]]
    assert [each["saved"] for each in one["measured"]] == [1 - 1 / speed for speed in steady]
    assert one["left_out"] == len(rmsnorms) - len(steady)
    assert both["measured"] == []  # a Llama has no LayerNorm that could have become one


def test_a_report_for_people(gpt2: tuple[Run, Path]) -> None:
    result, _ = gpt2
    assert result.status == 0
    assert result.err == ""
    lines = result.out.splitlines()
    assert max(len(line) for line in lines if line[:1] in "┃│├└┏┡") <= 80
    assert "Converted (rmsnorm, flashnorm, crmsnorm): converted" in lines
    words = " ".join(result.out.split())
    for part in ("prefill: 248", "decode: 1 token", "training step", "as_rmsnorm", "as_crmsnorm"):
        assert part in words
    assert "this model's" not in words  # its norm is torch's LayerNorm
    assert "The machine was busy when this began (a load of 1000.0 on" in words
    shares = [line.split("│")[-2].strip() for line in lines if line.startswith("│   converted ")]
    assert shares == ["", ""]  # of what is trained nothing is converted
    said = [line.partition("Here: ")[2] for line in lines if "Here: " in line]
    assert said == [f"{count} measurements say nothing about it." for count in (5, 3)]


def test_the_picture(gpt2: tuple[Run, Path]) -> None:
    """A PNG of a readable size, with more on it than paper."""
    content = gpt2[1].read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert 1500 < width < 3000
    assert 500 < height < 2000
    from matplotlib.image import imread

    from normconvert.cli import plot

    pixels = (255 * imread(gpt2[1])[::4, ::4, :3].reshape(-1, 3)).round().astype(int)
    colours = {f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in pixels}
    assert {*plot._COLOURS.values(), plot._ONE_ROW, plot._MANY_ROWS, plot._GREY} <= colours


# --- the ceiling and the passes


def graph_and_model(name: str, folder: Path) -> tuple[Any, Any]:
    zoo.save(name, folder / name, dtype="float32")
    return trace(open_checkpoint(str(folder / name))), zoo.load(folder / name)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_ceiling_has_no_norms(name: str, tmp_path: Path) -> None:
    """Of the classes that the norms have, none is left."""
    graph, model = graph_and_model(name, tmp_path)
    paths = removable(graph)
    ceiling = without_norms(model, paths)
    classes = {type(model.get_submodule(path)) for path in paths}
    assert len(paths) == 7
    assert not classes & {type(each) for each in ceiling.modules()}
    assert [path for path, each in ceiling.named_modules() if type(each) is nn.Identity] == [*paths]
    assert classes <= {type(each) for each in model.modules()}  # the original is as it was
    ids = torch.arange(7)[None]
    with torch.no_grad():
        assert not torch.equal(ceiling(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_norm_that_two_layers_share_goes_from_both(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path / "llama", dtype="float32")
    model = zoo.load(tmp_path / "llama")
    layers = model.model.layers
    layers[1].input_layernorm = layers[0].input_layernorm
    ceiling = without_norms(model, ("model.layers.0.input_layernorm",)).model.layers
    gone = [type(layer.input_layernorm) is nn.Identity for layer in ceiling]
    assert gone == [True, True, False]


def test_every_sample_decodes_after_the_same_prompt(tmp_path: Path) -> None:
    _, model = graph_and_model("llama", tmp_path)
    seen: list[tuple[int, int]] = []

    def look(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        seen.append((0 if cache is None else cache.get_seq_length(), kwargs["input_ids"].shape[1]))

    model.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        watch = passes.passing("decode", model, 20, compiled=False)
        assert watch() > 0
    steps = [(20 + i, 1) for i in range(passes.STEPS)]
    assert seen == [(0, 20), *steps, *steps]


def test_compiled_steps_compute_what_the_others_do(tmp_path: Path) -> None:
    """With its cache of a fixed size; dynamo alone, because compiling takes minutes."""
    _, model = graph_and_model("llama", tmp_path)
    logits: dict[bool, list[torch.Tensor]] = {False: [], True: []}

    compile_eagerly = partial(torch.compile, backend="eager")
    for how, found in logits.items():
        keep = model.register_forward_hook(lambda *a, found=found: found.append(a[-1].logits))
        with torch.no_grad(), mock.patch.object(torch, "compile", compile_eagerly):
            passes.passing("decode", model, 20, compiled=how)()
        keep.remove()
        torch.compiler.reset()
    assert len(logits[True]) == len(logits[False]) > 2 * passes.STEPS
    for one, other in zip(logits[False], logits[True], strict=True):
        torch.testing.assert_close(one[:, -1], other[:, -1])


@pytest.mark.parametrize("name", ["vit_classifier", "whisper", "bert"])
def test_models_that_write_no_text(name: str, tmp_path: Path) -> None:
    """They run on an image, a spectrum, a text; and train."""
    zoo.save(name, tmp_path / name, dtype="float32")
    model = zoo.load(tmp_path / name)
    assert passes.tasks(model) == ("forward",)
    with torch.no_grad():
        assert passes.passing("forward", model, 9, compiled=False)() > 0
    before = [each.detach().clone() for each in model.parameters()]
    assert step(model.train(), 9)() > 0
    after = [*model.parameters()]
    assert not all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_a_model_of_images(tmp_path: Path) -> None:
    zoo.save("vit_classifier", tmp_path / "vit", dtype="float32")
    found = bench(tmp_path / "vit", options=BenchOptions(seconds=0, compile=False))
    assert found.rules == ("rmsnorm", "flashnorm")
    whole = [each for each in found.measurements if not each.task.startswith("norm")]
    assert [(each.task, each.tokens) for each in whole] == [("forward", None), ("training", None)]
    assert [len(each.timings) for each in whole] == [3, 4]
    assert all(each.share is None for each in whole[1:])


def test_the_hidden_size_is_not_that_of_a_head(tmp_path: Path) -> None:
    zoo.save("qwen3", tmp_path / "qwen3", dtype="float32")
    graph = trace(open_checkpoint(str(tmp_path / "qwen3")))
    path, size = main_norm(graph, tuple(norm.module for norm in graph.norms))
    assert (path, size) == ("model.layers.0.input_layernorm", zoo.SIZES["hidden_size"])


def test_what_cannot_be_trained_is_said(tmp_path: Path) -> None:
    """Dropout is taken out where it is a module; where code draws it, the change is refused."""
    _, model = graph_and_model("opt", tmp_path)
    for layer in model.model.decoder.layers:
        layer.dropout = 0.1
    models, missing = trained(model, (), layer_norms=True)
    assert [*models] == ["original", "ceiling"]
    assert missing is not None
    assert "as_rmsnorm: " in missing
    assert "dropout" in missing


def test_compiled_models_do_not_share_what_is_compiled() -> None:
    """Of models of one class; a shared one would make each look through the others' first."""
    codes = []
    with mock.patch.object(torch, "compile", lambda run, **_: codes.append(run.__code__)):
        for _ in range(2):
            passes._compiled(nn.Identity())
    assert codes[0] is not codes[1]


# --- counting


def test_rounds_are_paired_and_in_changing_order() -> None:
    """A machine that is slower for a whole round slows both; the ratio does not see it."""
    log: list[str] = []
    slower = (1, 5, 2, 4, 3, 6)  # the first is the round that is not counted

    def watch(name: str, seconds: float) -> rounds.Stopwatch:
        def look() -> float:
            log.append(name)
            return seconds * slower[(len(log) - 1) // 2]

        return look

    found = rounds.measured("norm", 1, {"a": watch("a", 2.0), "b": watch("b", 1.0)}, 0.0)
    assert found.rounds == 5
    assert log == [*"ab", *"ab", *"ba", *"ba", *"ab", *"ab"]
    fast = found.timing("b")
    assert fast is not None
    assert fast.speedup == Quartiles(lower=2, median=2, upper=2)
    assert fast.saved == 0.5
    assert fast.seconds == Quartiles(lower=3, median=4, upper=5)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_everyone_runs_first_as_often(count: int) -> None:
    contestants = [str(i) for i in range(count)]
    orders = [rounds.order(contestants, turn) for turn in range(2 * count)]
    assert all(sorted(each) == contestants for each in orders)
    assert {*Counter(each[0] for each in orders).values()} == {2}


def test_quartiles() -> None:
    assert rounds.quartiles([5, 1, 4, 2, 3]) == Quartiles(lower=2, median=3, upper=4)


def test_the_share_of_the_ceilings_gain() -> None:
    """Of the time that the ceiling saves: 1.25 times as fast saves a fifth, 1.1 a tenth."""

    def share(*timings: Timing) -> float | None:
        return Measurement(task="decode", compiled=False, tokens=1, rounds=5, timings=timings).share

    converted = timing("converted", 1.05, 10 / 9, 1.15)
    ceiling = timing("ceiling", 1.2, 1.25, 1.3)
    assert share(converted, ceiling) == pytest.approx(0.5)
    assert share(converted) is None
    for lower, upper in ((0.99, 1.3), (1.1, 1.6), (1.01, 1.3)):
        assert share(converted, timing("ceiling", lower, 1.25, upper)) is None  # not for sure
    for lower, upper in ((0.9, 1.15), (1.05, 1.4)):
        assert share(timing("converted", lower, 10 / 9, upper), ceiling) is None
    odd = timing("converted", 300, 514, 700), timing("ceiling", 300, 514, 700)
    assert share(*odd) is None


def timing(name: str, lower: float, median: float, upper: float) -> Timing:
    some = Quartiles(lower=lower, median=median, upper=upper)
    return Timing(name=name, seconds=some, speedup=some)


@pytest.mark.parametrize("busy", [False, True])
def test_what_says_nothing_is_not_held_against_a_claim(busy: bool) -> None:
    measurements = [
        Measurement(
            task="norm", compiled=False, tokens=tokens, rounds=5,
            timings=(timing("LayerNorm", 1, 1, 1), timing("RMSNorm", lower, median, upper)),
        )
        for tokens, lower, median, upper in ((1, 1.2, 1.25, 1.3), (8, 1.0, 514.01, 600.0))
    ]  # fmt: skip
    claim, other = claims(measurements, ("flashnorm",), busy=busy)
    said = claim_line(claim).partition("Here: ")[2]
    if busy:
        assert said == "2 measurements say nothing about it."
    else:
        assert said == "RMSNorm alone, 1 row: 20% less; 1 measurement says nothing about it."
    assert claim_line(other).endswith("Here: no LayerNorm became an RMSNorm.")


# --- what is refused, and what is left out


def refused(*arguments: str | Path, cwd: Path) -> Run:
    with nothing_written(cwd):
        return run_here("bench", *arguments, cwd=cwd)


def test_a_picture_without_matplotlib(tmp_path: Path) -> None:
    with mock.patch.dict(sys.modules, {"matplotlib": None}):
        result = refused(MODELS / "tiny-llama", "--plot", "bench.png", cwd=tmp_path)
    result.assert_refused("--plot", "matplotlib", "pip install 'normconvert[plot]'")


@pytest.mark.parametrize("place", ["bench.txt", "bench", "nowhere/bench.png"])
def test_a_picture_that_cannot_be_written(place: str, tmp_path: Path) -> None:
    result = refused(MODELS / "tiny-llama", "--plot", place, cwd=tmp_path)
    result.assert_refused(place)


def test_other_refusals(tmp_path: Path) -> None:
    convert(MODELS / "tiny-llama", tmp_path / "done", format="native", verify=False)
    llama = MODELS / "tiny-llama"
    refused("done", cwd=tmp_path).assert_refused("done", "converted already", "ORIGINAL")
    refused("nowhere", cwd=tmp_path).assert_refused("nowhere")
    refused(llama, "nowhere", cwd=tmp_path).assert_refused("nowhere")
    for device in ("moon", "auto", "cuda:0"):
        refused(llama, "done", "--device", device, cwd=tmp_path).assert_refused(device)
    with mock.patch.object(report, "free_memory", return_value=10):
        result = refused(llama, "done", "--json", cwd=tmp_path)
    result.assert_refused("tiny-llama", "free", "--dtype", code="bench")


def test_without_a_compiler_the_rest_is_measured(tmp_path: Path) -> None:
    """As a user without one has it: the rows say why, and the others stand."""
    zoo.save("llama", tmp_path / "llama", dtype="float32")
    result = run(
        "bench", tmp_path / "llama", "--seconds", "0", "--json",
        cwd=tmp_path,
        env=environment(CXX="/nowhere/c++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache")),
    )  # fmt: skip
    assert result.status == 0, result.err
    found = {
        (each["task"], each["compiled"]): each
        for each in result.json()["measurements"]
        if not each["task"].startswith("norm")
    }
    assert {*found} == {
        ("prefill", False), ("decode", False), ("prefill", True), ("decode", True),
        ("training", False),
    }  # fmt: skip
    for (_, compiled), each in found.items():
        assert (each["timings"] == []) is compiled
        assert ("torch.compile" in (each["note"] or "")) is compiled
