"""Weights that are not in memory: the same figures, and the same verdicts."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import normconvert
import zoo
from command_line import run_here
from normconvert.source import open_checkpoint
from normconvert.verify import decoding, placement
from normconvert.verify.loading import load_model
from normconvert.verify.noise import perturbed
from normconvert.verify.tokens import LENGTH, SEQUENCES
from normconvert.verify.tokens import LENGTH_ON_DISK as ON_DISK

MODELS = Path(__file__).parents[1] / "models"
STATUS = Path("/proc/self/status")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Originals and conversions: norms folded, streams of d - 1 coordinates, stacked experts."""
    folder = tmp_path_factory.mktemp("pairs")
    zoo.save("mixtral", folder / "mixtral", dtype="float32")
    rewrites: dict[str, Any] = {"tiny-llama": "flashnorm", "tiny-gpt2": "crmsnorm"}
    found = {}
    for name, rewrite in {**rewrites, "mixtral": "flashnorm"}.items():
        source = folder / name if name == "mixtral" else MODELS / name
        normconvert.convert(source, folder / f"{name}-output", rewrite, verify=False)
        found[name] = source, folder / f"{name}-output"
    return found


def on_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> list[float]:
    """Let `free` bytes seem to be free; the share of the parameters on disk in every model."""
    shares: list[float] = []
    read_plainly = placement.read_plainly

    def note(model: Any) -> None:
        parameters = list(model.parameters())
        shares.append(sum(each.is_meta for each in parameters) / len(parameters))
        read_plainly(model)

    monkeypatch.setattr("normconvert.verify.placement.free_memory", lambda: free)
    monkeypatch.setattr("normconvert.verify.loading.read_plainly", note)
    return shares


@pytest.mark.parametrize(
    ("name", "limit"), [("mixtral", None), ("tiny-gpt2", None), ("tiny-gpt2", 1_200_000)]
)
def test_what_does_not_fit_gives_the_same_figures(
    name: str,
    limit: int | None,
    pairs: dict[str, tuple[Path, Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as as_few:  # tokens
        for module in ("tokens", "decoding"):
            as_few.setattr(f"normconvert.verify.{module}.on_disk", lambda _: True)
        expected = normconvert.verify_equivalence(*pairs[name])
    shares = on_disk(monkeypatch, 10)
    max_memory = None if limit is None else {"cpu": limit}
    found = normconvert.verify_equivalence(*pairs[name], max_memory=max_memory)
    assert len(shares) == 7  # two for the algebra, and five: three of them for the floor
    assert all(share == 1 if limit is None else 0 < share < 1 for share in shares[2:])
    assert found.equivalent
    assert found.dtype == expected.dtype == "float64"
    for one, other in zip(found.comparisons, expected.comparisons, strict=True):
        for figure in ("max", "rms", "floor_max", "floor_rms"):
            assert getattr(one, figure) == pytest.approx(getattr(other, figure), rel=1e-6)
    assert found.differing_tensors == expected.differing_tensors
    assert found.generation == expected.generation
    assert found.generation is not None
    assert found.generation.tokens == decoding.GREEDY_ON_DISK < decoding.GREEDY
    assert any("fewer tokens" in note for note in found.notes)
    assert not any("fewer tokens" in note for note in expected.notes)


def test_a_fault_on_disk_is_found(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = pairs["tiny-llama"]
    other = Path(shutil.copytree(source, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] += 0.02
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert on_disk(monkeypatch, 10) == []
    report = normconvert.verify_equivalence(source, other)
    assert not report.equivalent
    assert (report.differing_tensors, report.parts_at) == (1, "model.layers.2")


def test_a_conversion_of_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk(monkeypatch, 10)
    conversion = normconvert.convert(MODELS / "tiny-llama", tmp_path / "output", "flashnorm")
    assert conversion.verification is not None
    assert conversion.verification.equivalent


def test_the_command_needs_no_option_for_what_does_not_fit(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = on_disk(monkeypatch, 10)
    report = run_here("verify-equivalence", *pairs["tiny-llama"], "--json", "-", cwd=tmp_path)
    assert report.json()["equivalent"]
    assert shares[2:] == [1] * 5


@pytest.mark.skipif(not STATUS.exists(), reason="the kernel does not tell how much is not of files")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Loaded from disk, run, and run with noise: a few of its largest weights, not all of them."""
    config = LlamaConfig(
        vocab_size=16_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        LlamaForCausalLM(config).save_pretrained(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    checkpoint = open_checkpoint(str(tmp_path))
    place = placement.Placement(device_map={"": "disk"})
    ids = torch.zeros(1, 4, dtype=torch.int64)
    placement._give_back(0)
    with most_memory() as taken, torch.no_grad():
        model = load_model(
            checkpoint, torch.float32, False, placement=place, offload_folder=str(tmp_path)
        )
        sizes = [4 * shape.numel() for shape in placement.shapes(model).values()]
        for _ in range(3):
            expected = model(ids).logits
        noise = torch.Generator().manual_seed(0)
        placement.replace_weights(
            model, tuple(checkpoint.tensors), lambda _, t: perturbed(t, torch.bfloat16, noise)
        )
        assert 0 < (model(ids).logits - expected).abs().max() < 0.1
    assert max(taken) < 5 * max(sizes) < 0.5 * sum(sizes)


@contextmanager
def most_memory() -> Iterator[list[int]]:
    """The bytes that this process takes beside its files, more than before, again and again."""
    taken: list[int] = []
    done = threading.Event()

    def anonymous() -> int:
        line = next(each for each in STATUS.read_text().splitlines() if "RssAnon" in each)
        return 1024 * int(line.split()[1])

    def watch() -> None:
        while not done.wait(0.002):
            taken.append(anonymous() - before)

    before = anonymous()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield taken
    finally:
        done.set()
        thread.join()


def test_the_options(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    command = ("verify-equivalence", *pairs["tiny-llama"])
    plain = run_here(*command, "--json", "-", cwd=tmp_path).json()
    on_device = run_here(*command, "--device", "cpu", "--json", "-", cwd=tmp_path)
    limited = ("--device-map", "auto", "--max-memory", "cpu=300KB")
    in_part = run_here(*command, *limited, "--json", "-", cwd=tmp_path)
    for result, positions in ((on_device, SEQUENCES * LENGTH), (in_part, SEQUENCES * ON_DISK)):
        assert (result.status, result.err) == (0, "")
        one, other = result.json()["comparisons"][0], plain["comparisons"][0]
        assert one["positions"] == positions
        same = one["max"] == pytest.approx(other["max"], rel=1e-6)
        assert same == (positions == other["positions"])
    for options, words in (
        (["--device", "nowhere"], ("'nowhere' is no device", "such as cpu")),
        (["--device", "hpu:0"], ("No model can be put on 'hpu:0'", "such as cpu")),
        (["--max-memory", "cpu=much"], ("limit 'much' is no size", "8GiB")),
    ):
        run_here(*command, *options, cwd=tmp_path).assert_refused(*words)
    for options, word in (
        (["--max-memory", "8GiB"], "DEVICE=SIZE"),
        (["--device", "cpu", "--device-map", "auto"], "not both"),
    ):
        result = run_here(*command, *options, cwd=tmp_path)
        assert result.status == 2
        assert word in result.err


def test_every_weight_can_be_replaced(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """In memory and on disk; tied ones each on their own."""
    checkpoint = open_checkpoint(str(pairs["tiny-gpt2"][0]))
    for place in (placement.IN_MEMORY, placement.Placement(device_map={"": "disk"})):
        model = load_model(
            checkpoint, torch.float64, False, placement=place, offload_folder=str(tmp_path)
        )
        before = dict(placement.weights(model))
        chosen = ("transformer.wte.weight", "transformer.h.0.ln_1.bias")
        placement.replace_weights(model, chosen, lambda name, tensor: tensor + len(name))
        after = dict(placement.weights(model))
        assert before.keys() == after.keys()
        assert {n for n in before if not torch.equal(before[n], after[n])} == set(chosen)
        for name in chosen:
            assert torch.equal(after[name], before[name] + len(name))


def test_free_memory_knows_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = placement.free_memory()
    assert 0 < free < 2**50
    groups = tmp_path / "cgroup"
    monkeypatch.setattr(placement, "_CGROUPS", groups)
    monkeypatch.setattr(placement, "_OWN_CGROUP", tmp_path / "own")
    for line, limit in (
        ("0::/a/b", groups / "a" / "b" / "memory.max"),
        ("0::/a/b", groups / "a" / "memory.max"),
        ("0::/of/the/host", groups / "memory.max"),  # as in a container
        ("4:cpu,memory:/a", groups / "memory" / "a" / "memory.limit_in_bytes"),
    ):
        (tmp_path / "own").write_text(f"9:name=systemd:/x\n{line}\n")
        limit.parent.mkdir(parents=True, exist_ok=True)
        limit.write_text("max\n")
        assert placement.free_memory() > 0.5 * free
        limit.write_text("1\n")
        assert placement.free_memory() == 0
        limit.unlink()
    monkeypatch.setattr("resource.getrlimit", lambda _: (2, 2))
    assert placement.free_memory() == 0
