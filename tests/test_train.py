"""A model made by `as_rmsnorm` or `as_crmsnorm` trains as its original does, step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from normconvert.errors import PlanError
from normconvert.nn import CRMSNorm, RMSNorm
from normconvert.train import as_crmsnorm, as_rmsnorm, finish
from zoo import SIZES

TINY_GPT2 = Path(__file__).parents[1] / "models" / "tiny-gpt2"
STEPS = {"gpt2": 50, "vit": 50, "dinov2": 10}
CHECKED_GRADIENTS = 3
LABELS: Mapping[str, Any] = {"id2label": {number: f"label {number}" for number in range(11)}}

Batch: TypeAlias = "dict[str, torch.Tensor]"
Optimizer: TypeAlias = "Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]"
Rewrite: TypeAlias = "Callable[[PreTrainedModel], PreTrainedModel]"

# A key's bias has a gradient of rounding alone, which AdamW divides by its size plus eps.
OPTIMIZERS: Mapping[str, Optimizer] = {
    "sgd": partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.05),
    "adamw": partial(torch.optim.AdamW, lr=0.003, weight_decay=0.1, eps=1e-6),
}
ADAM_L2: Optimizer = partial(torch.optim.Adam, lr=0.003, weight_decay=0.1)
REWRITES: Mapping[str, Rewrite] = {"rmsnorm": as_rmsnorm, "crmsnorm": as_crmsnorm}

every_rewrite = pytest.mark.parametrize("rewrite", REWRITES.values(), ids=list(REWRITES))


def config(model_type: str, **more: Any) -> Any:
    config_class = transformers.CONFIG_MAPPING[model_type]
    known = {key: value for key, value in SIZES.items() if hasattr(config_class, key)}
    return config_class(**{**known, **more})


@cache
def _original(name: str) -> PreTrainedModel:
    """Gains, biases and means far from 1 and 0, so that a rewrite that does nothing fails."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "gpt2":
            model = transformers.GPT2LMHeadModel.from_pretrained(TINY_GPT2)
        elif name == "vit":
            model = transformers.ViTForImageClassification(config("vit", **LABELS))
        elif name == "beit":  # with LayerScale in front of the weights that it scales
            scaled = config("beit", layer_scale_init_value=0.1, drop_path_rate=0.0, **LABELS)
            model = transformers.BeitForImageClassification(scaled)
        else:  # with LayerScale
            model = transformers.Dinov2ForImageClassification(config("dinov2", **LABELS))
        model.to(torch.float64).train()
        for parameter in model.parameters():
            random = torch.randn(parameter.shape, dtype=torch.float64)
            parameter.data += 0.1 + 0.1 * random
        for parameter_name, parameter in model.named_parameters():
            if "lambda" in parameter_name:
                parameter.data[::5] = 0.0  # nothing may be divided by it
    return model


def original(name: str) -> PreTrainedModel:
    return copy.deepcopy(_original(name))


def batch(model: PreTrainedModel, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "input_ids":
        ids = torch.randint(model.config.vocab_size, (3, 11), generator=generator)
        return {"input_ids": ids, "labels": ids}
    size = model.config.image_size
    shape = (3, model.config.num_channels, size, size)
    images = torch.randn(shape, generator=generator, dtype=torch.float64).to(model.dtype)
    return {"pixel_values": images, "labels": torch.randint(11, (3,), generator=generator)}


def loss_of(model: PreTrainedModel, seed: int) -> torch.Tensor:
    """The loss in the model's own dtype: GPT-2 would round its logits to float32 for it."""
    given = batch(model, seed)
    labels = given.pop("labels")
    logits = model(**given).logits
    if labels.ndim > 1:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def plain(name: str) -> str:
    """The name that a parameter had in the original."""
    return name.replace("parametrizations.", "").removesuffix(".original")


def values(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {plain(name): value.detach().clone() for name, value in model.named_parameters()}


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    named = {plain(name): parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.clone() for name, grad in named.items() if grad is not None}


def train(
    model: PreTrainedModel,
    optimizer: Optimizer,
    steps: int,
    *,
    before_step: Callable[[], None] = lambda: None,
    after_step: Callable[[], None] = lambda: None,
) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """The loss at every step, and the gradients at the first ones."""
    stepping = optimizer(model.parameters())
    losses, first = [], []
    for step in range(steps):
        stepping.zero_grad()
        loss = loss_of(model, step % 5)
        loss.backward()  # type: ignore[no-untyped-call]
        before_step()
        losses.append(float(loss.detach()))
        if step < CHECKED_GRADIENTS:
            first.append(gradients(model))
        stepping.step()
        after_step()
    return losses, first


@cache
def reference(name: str, optimizer: str) -> tuple[Any, ...]:
    """What training the original gives: losses, gradients, parameters, outputs."""
    model = original(name)
    losses, first = train(model, OPTIMIZERS[optimizer], STEPS[name])
    return losses, first, values(model), outputs(model)


def outputs(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**batch(model, 1000)).logits
    return found


def distance(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """The largest difference, relative to the largest number of its tensor.

    A gradient that is zero but for rounding (a key's bias) is compared with the others.
    """
    assert one.keys() == other.keys()
    floor = 1e-3 * max(float(tensor.abs().max()) for tensor in other.values())
    return max(
        float((one[name] - other[name]).abs().max()) / max(float(other[name].abs().max()), floor)
        for name in one
    )


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return distance({"": one}, {"": other})


def parametrized(model: PreTrainedModel) -> list[str]:
    return [name for name, m in model.named_modules() if parametrize.is_parametrized(m)]


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The names of all operators that run inside it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def operators(model: PreTrainedModel) -> set[str]:
    seen = Operators()
    with seen:
        model(**batch(model, 0))
    return seen.names


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@every_rewrite
@pytest.mark.parametrize("name", ["gpt2", "vit", "dinov2"])
def test_every_step_is_the_originals(name: str, rewrite: Rewrite, optimizer: str) -> None:
    losses, first, final, function = reference(name, optimizer)
    model = rewrite(original(name))
    found, found_first = train(model, OPTIMIZERS[optimizer], STEPS[name])
    assert found == pytest.approx(losses, rel=1e-9)
    assert min(losses) < losses[0]
    for ours, theirs in zip(found_first, first, strict=True):
        assert distance(ours, theirs) < 1e-9
    assert distance(values(model), final) < 1e-9
    trained = outputs(model)
    assert relative(trained, function) < 1e-9
    assert finish(model) is model
    assert relative(outputs(model), trained) < 1e-12
    assert not parametrized(model)


@every_rewrite
@pytest.mark.parametrize("name", ["gpt2", "vit", "dinov2"])
def test_no_layer_norm_is_left(name: str, rewrite: Rewrite) -> None:
    model = original(name)
    assert "aten::native_layer_norm" in operators(model)
    norms = sum(isinstance(module, nn.LayerNorm) for module in model.modules())
    rewrite(model)
    assert "aten::native_layer_norm" not in operators(model)
    kind = RMSNorm if rewrite is as_rmsnorm else CRMSNorm
    assert sum(isinstance(module, kind) for module in model.modules()) == norms
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())


@every_rewrite
def test_a_mask_token_trains_alike(rewrite: Rewrite) -> None:
    model = original("dinov2")
    mask = torch.rand(3, model.dinov2.embeddings.patch_embeddings.num_patches) < 0.5
    images = batch(model, seed=0)["pixel_values"]
    found = []
    for each in (model, rewrite(original("dinov2"))):
        each.dinov2(images, bool_masked_pos=mask).last_hidden_state.square().sum().backward()
        found.append(gradients(each)["dinov2.embeddings.mask_token"])
    assert relative(*found) < 1e-12


def test_without_centering_it_differs() -> None:
    model = as_rmsnorm(original("vit"))
    for name in parametrized(model):
        module: Any = model.get_submodule(name)
        for tensor in list(module.parametrizations):
            parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
    losses, _ = train(model, OPTIMIZERS["sgd"], 3)
    assert losses != pytest.approx(reference("vit", "sgd")[0][:3], rel=1e-3)


@every_rewrite
def test_parameters_stay_the_same_objects(rewrite: Rewrite) -> None:
    """So an optimizer, and what it has in memory, survives."""
    model = original("dinov2")
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    rewrite(model)
    assert {plain(name): id(p) for name, p in model.named_parameters()} == before


@pytest.mark.parametrize(
    ("optimizer", "same"),
    [(OPTIMIZERS["sgd"], True), (OPTIMIZERS["adamw"], True), (ADAM_L2, False)],
    ids=["sgd", "adamw", "adam-l2"],
)
def test_whether_a_mean_may_be_left_out_of_the_decay(optimizer: Optimizer, same: bool) -> None:
    """From centered weights on, there is no mean that could decay."""
    losses, _ = train(original("vit"), optimizer, 10)
    model = as_rmsnorm(original("vit"))
    for name in parametrized(model):
        module: Any = model.get_submodule(name)
        for tensor, chain in module.parametrizations.items():
            chain.original.data = getattr(module, tensor).detach().clone()
    found, _ = train(model, optimizer, 10)
    assert (found == pytest.approx(losses, rel=1e-9)) is same


def baked(rewrite: Rewrite) -> tuple[PreTrainedModel, list[tuple[nn.Parameter, int]]]:
    """A finished ViT, and its changed parameters with the axis of the stream."""
    model = rewrite(original("vit"))
    axes = {}
    for path in parametrized(model):
        for name, chain in model.get_submodule(path).parametrizations.items():
            axes[f"{path}.{name}"] = chain[0].expression.axis
    finish(model)
    return model, [(model.get_parameter(name), axis) for name, axis in axes.items()]


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_baked_weights_train_alike_only_if_centered_twice(optimizer: str) -> None:
    losses = reference("vit", optimizer)[0][:10]
    for center_gradients, center_weights in ((True, True), (False, True), (False, False)):
        model, changed = baked(as_rmsnorm)

        def gradients_centered(do: bool = center_gradients, changed: Any = changed) -> None:
            for parameter, axis in changed if do else ():
                parameter.grad -= parameter.grad.mean(axis, keepdim=True)

        def weights_centered(do: bool = center_weights, changed: Any = changed) -> None:
            for parameter, axis in changed if do else ():
                parameter.data -= parameter.data.mean(axis, keepdim=True)

        found, _ = train(
            model,
            OPTIMIZERS[optimizer],
            10,
            before_step=gradients_centered,
            after_step=weights_centered,
        )
        # For SGD, which is linear, one of the two is enough.
        same = center_gradients or (optimizer == "sgd" and center_weights)
        assert (found == pytest.approx(losses, rel=1e-9)) is same


def test_compressed_weights_have_another_metric() -> None:
    losses = reference("vit", "sgd")[0][:10]
    for corrected in (True, False):
        model, changed = baked(as_crmsnorm)

        def correct(do: bool = corrected, changed: Any = changed) -> None:
            for parameter, axis in changed if do else ():
                total = parameter.grad.sum(axis, keepdim=True)
                parameter.grad -= total / SIZES["hidden_size"]

        found, _ = train(model, OPTIMIZERS["sgd"], 10, before_step=correct)
        assert (found == pytest.approx(losses, rel=1e-9)) is corrected


@every_rewrite
def test_shared_parameters_and_norms(rewrite: Rewrite) -> None:
    """A weight that two layers write with, and a norm that stands in two places."""
    model = original("gpt2")
    first, second = model.transformer.h[0], model.transformer.h[1]
    second.mlp.c_proj.weight = first.mlp.c_proj.weight
    second.ln_2 = first.ln_2
    losses, theirs = train(copy.deepcopy(model), OPTIMIZERS["sgd"], 3)
    found, ours = train(rewrite(model), OPTIMIZERS["sgd"], 3)
    assert found == pytest.approx(losses, rel=1e-9)
    assert distance(ours[-1], theirs[-1]) < 1e-9
    before = outputs(model)
    finish(model)
    assert second.mlp.c_proj.weight is first.mlp.c_proj.weight
    assert relative(outputs(model), before) < 1e-12


@every_rewrite
def test_a_copy_trains_on_its_own(rewrite: Rewrite) -> None:
    """What a parametrization reads besides its own parameter is the copy's, too."""
    model = copy.deepcopy(rewrite(original("dinov2")))
    losses, first = train(model, OPTIMIZERS["sgd"], 3)
    assert losses == pytest.approx(reference("dinov2", "sgd")[0][:3], rel=1e-9)
    assert distance(first[2], reference("dinov2", "sgd")[1][2]) < 1e-9


@every_rewrite
def test_a_copy_is_finished_on_its_own(rewrite: Rewrite) -> None:
    """A snapshot in the middle of training."""
    model = rewrite(original("gpt2"))
    expected = outputs(model)
    snapshot = finish(copy.deepcopy(model))
    assert not parametrized(snapshot)
    assert relative(outputs(snapshot), expected) < 1e-12
    assert torch.equal(outputs(model), expected)
    losses, _ = train(model.train(), OPTIMIZERS["sgd"], 3)
    assert losses == pytest.approx(reference("gpt2", "sgd")[0][:3], rel=1e-9)


@every_rewrite
def test_an_optimizer_of_trainer_is_made_before(rewrite: Rewrite, tmp_path: Path) -> None:
    """It goes by classes: a LayerNorm's gain does not decay, and would as another norm's."""
    logits = []
    for change in (None, rewrite):
        model = original("gpt2")
        settings = transformers.TrainingArguments(
            str(tmp_path), max_steps=4, learning_rate=3e-3, weight_decay=0.5, seed=0,
            per_device_train_batch_size=1, use_cpu=True, disable_tqdm=True, report_to="none",
            adam_epsilon=1e-6, save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        ids = batch(model, 0)["input_ids"]
        texts: Any = [{"input_ids": row, "labels": row} for row in ids]
        trainer = transformers.Trainer(model, settings, train_dataset=texts)
        trainer.create_optimizer()
        if change is not None:
            change(model)
        trainer.train()
        logits.append(outputs(model))
    assert relative(*logits) < 1e-9


def test_finished_weights_are_exact_in_the_original_class(tmp_path: Path) -> None:
    for name in ("gpt2", "dinov2", "beit"):
        model = finish(as_rmsnorm(original(name)))
        model.save_pretrained(tmp_path / name)
        stock = type(model).from_pretrained(tmp_path / name, dtype=torch.float64)
        assert relative(outputs(stock), outputs(original(name))) < 1e-12


@every_rewrite
@pytest.mark.parametrize("name", ["gpt2", "dinov2"])
def test_a_checkpoint_during_training_is_of_the_original_class(
    name: str, rewrite: Rewrite, tmp_path: Path
) -> None:
    model = rewrite(original(name))
    train(model, OPTIMIZERS["adamw"], steps=2)
    model.eval()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert not parametrized(again)
    assert relative(outputs(again), outputs(model)) < 1e-12
    other = rewrite(original(name)).eval()
    assert relative(outputs(other), outputs(model)) > 1e-6
    for assign in (False, True):
        other.load_state_dict(again.state_dict(), assign=assign)
        assert relative(outputs(other), outputs(model)) < 1e-12


@pytest.mark.parametrize("name", ["gpt2", "vit", "dinov2", "beit"])
def test_finished_crmsnorm_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = finish(as_crmsnorm(original(name))).eval()
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert relative(outputs(again.eval()), expected) < 1e-12
    assert relative(expected, outputs(original(name).eval())) < 1e-12
    auto = transformers.AutoConfig.from_pretrained(tmp_path)
    assert auto.model_type == original(name).config.model_type


@every_rewrite
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_narrow_dtypes(rewrite: Rewrite, dtype: torch.dtype) -> None:
    losses = []
    for model in (original("vit").to(dtype), rewrite(original("vit").to(dtype))):
        stepping = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(5):
            stepping.zero_grad()
            loss = loss_of(model, step)
            loss.backward()  # type: ignore[no-untyped-call]
            stepping.step()
        losses.append(float(loss.detach()))
        assert all(parameter.dtype is dtype for parameter in model.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4 if dtype is torch.float32 else 0.05)


@every_rewrite
def test_random_numbers_stay_the_same(rewrite: Rewrite) -> None:
    """Attention dropout draws what it drew; LayerDrop's and DropPath's modules are converted."""
    settings = {"attention_probs_dropout_prob": 0.3, "drop_path_rate": 0.3, **LABELS}
    torch.manual_seed(3)
    first = transformers.Dinov2ForImageClassification(config("dinov2", **settings)).double().train()
    second = copy.deepcopy(first)
    state = torch.get_rng_state()
    rewrite(second)
    assert torch.equal(torch.get_rng_state(), state)
    losses, _ = train(first, OPTIMIZERS["sgd"], 3)
    torch.set_rng_state(state)
    found, _ = train(second, OPTIMIZERS["sgd"], 3)
    assert found == pytest.approx(losses, rel=1e-9)


def test_layer_drop_is_no_obstacle() -> None:
    opt = config("opt", dropout=0.0, layerdrop=0.3, word_embed_proj_dim=54, ffn_dim=88)
    model = as_rmsnorm(transformers.OPTForCausalLM(opt).double().eval())
    assert not model.training
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())


REFUSED = {
    "post-norm": (
        transformers.BertForMaskedLM,
        config("bert"),
        "No LayerNorm of BertForMaskedLM can be replaced in training: .* in between",
    ),
    "no LayerNorm": (transformers.LlamaForCausalLM, config("llama"), "has no LayerNorm"),
    "dropout": (
        transformers.ViTForImageClassification,
        config("vit", hidden_dropout_prob=0.1, **LABELS),
        "has dropout on its residual streams",
    ),
}


@every_rewrite
@pytest.mark.parametrize(("model_class", "settings", "reason"), REFUSED.values(), ids=list(REFUSED))
def test_refusals_leave_the_model_alone(
    model_class: Any, settings: Any, reason: str, rewrite: Rewrite
) -> None:
    model = model_class(settings)
    before = dict(model.named_modules())
    with pytest.raises(PlanError, match=reason):
        rewrite(model)
    assert dict(model.named_modules()) == before
    assert not parametrized(model)


class _KnowsTheWidth(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, 11 if x.shape[1] == 11 else 7, 64)


def test_code_that_knows_the_hidden_size_by_heart() -> None:
    model = original("gpt2")
    model.transformer.drop = _KnowsTheWidth()
    modules = dict(model.named_modules())
    with pytest.raises(PlanError, match=r"does not run when it is changed so.*as_rmsnorm"):
        as_crmsnorm(model)
    assert dict(model.named_modules()) == modules
    assert not parametrized(model)
    before = outputs(model)
    assert relative(outputs(as_rmsnorm(model)), before) < 1e-12


def test_the_model_is_traced_without_memory() -> None:
    with torch.device("meta"):
        model = transformers.ViTForImageClassification(config("vit", **LABELS))
    as_crmsnorm(model)
    assert all(parameter.is_meta for parameter in model.parameters())


class _PenalizesItsStream(transformers.GPT2LMHeadModel):  # type: ignore[misc]
    """Its loss, which is asked for with labels alone, sees the mean of the residual stream."""

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        asked = {**kwargs, "output_hidden_states": True} if labels is not None else kwargs
        output = super().forward(input_ids, labels=labels, **asked)
        if labels is not None:
            output.loss = output.loss + output.hidden_states[1].square().mean()
        return output


class _WithAPrefix(transformers.GPT2LMHeadModel):  # type: ignore[misc]
    """Puts vectors in front of the text that it makes of something else, if that is given."""

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.prefix = nn.Linear(10, 3 * settings.n_embd)

    def forward(self, input_ids: Any = None, seen: Any = None, **kwargs: Any) -> Any:
        if seen is None:
            return super().forward(input_ids, **kwargs)
        text = self.transformer.wte(input_ids)
        vectors = self.prefix(seen).view(len(seen), 3, -1)
        return super().forward(inputs_embeds=torch.cat((vectors, text), 1), **kwargs)


@every_rewrite
@pytest.mark.parametrize(
    ("model_class", "reason"),
    [
        (_PenalizesItsStream, "on a batch of one with labels"),
        (_WithAPrefix, "prefix.weight, which"),
    ],
)
def test_what_writes_or_reads_in_use_alone(model_class: Any, reason: str, rewrite: Rewrite) -> None:
    model = model_class(config("gpt2", resid_pdrop=0.0, embd_pdrop=0.0))
    with pytest.raises(PlanError, match=reason):
        rewrite(model)
    assert not parametrized(model)
