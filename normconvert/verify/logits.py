"""Outputs end to end: two checkpoints run on the same input, against a measured noise floor."""

from __future__ import annotations

import hashlib
import tempfile
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.utils._pytree import tree_leaves

from normconvert.errors import VerificationError, first_line
from normconvert.ir.event import Event, Listener
from normconvert.ir.report import Algebra, Certificate, Equivalence, Layer
from normconvert.model_class import auto_classes
from normconvert.precision import computing_in
from normconvert.quiet import quiet
from normconvert.torch_dtypes import TORCH_DTYPE
from normconvert.verify.decoding import (
    continuation,
    side_by_side,
    stepwise_logits,
    tokens_to_step,
)
from normconvert.verify.figures import TIMES_FLOOR, comparison, output_distances, times_floor
from normconvert.verify.layers import distances, layer_states
from normconvert.verify.loading import load_model
from normconvert.verify.noise import perturbed
from normconvert.verify.placement import (
    IN_MEMORY,
    Placement,
    choose,
    main_dtype,
    on_disk,
    replace_weights,
    shapes,
    weights,
)
from normconvert.verify.tokens import input_sets, lacking_tokenizer, unlike_tokenizers
from normconvert.verify.towers import tower_outputs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from normconvert.source import Checkpoint

_FLOOR_RUNS, _MOST_FLOOR_RUNS = 3, 12
_FAR = 100.0
_FEW = 3
_PASSES = 2 + _FLOOR_RUNS
_Outputs: TypeAlias = "tuple[dict[str, torch.Tensor], dict[str, list[torch.Tensor]]]"


def compare(
    original: Checkpoint,
    converted: Checkpoint,
    *,
    text: str | None,
    dtype: str | None,
    returns: tuple[str, ...],
    certificate: Certificate | None,
    algebra: Algebra | None,
    centered: bool,
    trust_remote_code: bool,
    listen: Listener,
    placement: Placement = IN_MEMORY,
) -> Equivalence:
    """Whether `converted` gives the outputs of `original`: logits, or without a head its states.

    Or the outputs called `returns`, if there are any. A `certificate` and the `algebra`
    have to be valid as well. `centered` says that the models' streams may differ by their means.

    Both are run on the same input. Then the tensors in which they differ are perturbed in the
    original within the rounding of their stored dtype, three times; they are equivalent if
    their outputs differ by at most four times what that does. A model of few outputs may hardly
    move in three: before two are called different that are not far apart, it is twelve times.
    Where tensors have another shape (on d - 1 coordinates the last is minus the sum of the others,
    with the rounding of all of them), it is the converted model that is perturbed. Computing in
    another order rounds as well, which shows where no tensor differs, and where what is computed
    is rounded no finer than the weights: there all tensors are perturbed within the rounding of
    what is computed, in all runs or in the nine later ones.

    Tensors that differ and that no input reaches are no proof of anything: without a certificate
    two models are not equivalent if they differ in tensors, and their outputs in no bit.

    A model that does not fit into memory is run with its weights on disk, unless `placement` says
    where they are to be.

    Raises:
        VerificationError: one of them cannot be loaded whole or cannot be run.
        TraceError: what they read is not known.
    """
    compute, placement = choose(original, dtype, placement)
    with _Runner(compute, placement, returns, trust_remote_code, listen) as run:
        model = run.load(original)
        sets, notes = input_sets(model, original, text, trust_remote_code, other=converted)
        if on_disk(model):
            notes += ("Not all weights fit into memory: fewer tokens were read, and written.",)
        generates = "AutoModelForCausalLM" in auto_classes(type(model), model.config)
        prompt, steps = tokens_to_step(model, sets)
        written = [None if prompt is None else continuation(model, prompt)]
        if prompt is not None and written[0] is None:
            name = type(model).__name__
            notes += (f"{name} does not generate by itself; token by token nothing was compared.",)
            prompt = steps = None
        reference, reference_states = run.outputs(model, sets, steps)
        before, sizes = _digests(model), shapes(model)
        del model
        model = run.load(converted)
        candidate, states = run.outputs(model, sets, steps)
        written += [None if prompt is None else continuation(model, prompt)]
        _refuse_other_shapes(reference, candidate)
        after = _digests(model)
        resized = any(sizes.get(name, shape) != shape for name, shape in shapes(model).items())
        became = {} if resized else _vectors(model)
        del model
        differing = _differing(before, after)
        unlike: tuple[str, ...] = ()
        if certificate is None:  # which has compared all files
            unlike = unlike_tokenizers(original, converted, text, trust_remote_code)
        floors: list[dict[str, tuple[float, float]]] = []
        layer_floors = []
        apart = output_distances(reference, candidate)
        coarse = torch.finfo(compute).eps >= torch.finfo(main_dtype(original)).eps
        for seed in range(_MOST_FLOOR_RUNS if differing or times_floor(apart, []) else 0):
            if seed >= _FLOOR_RUNS and not TIMES_FLOOR < times_floor(apart, floors) < _FAR:
                break
            model = run.load(converted if resized else original)
            if not differing or (coarse and seed >= _FLOOR_RUNS):
                replace_weights(model, tuple(shapes(model)), partial(_noisy_in, compute, seed))
            else:
                moving = _differing(after, before) if resized else differing
                replace_weights(model, moving, partial(_noisy, original, converted, became, seed))
            moved, moved_states = run.outputs(model, sets, steps)
            floors.append(output_distances(candidate if resized else reference, moved))
            base = states if resized else reference_states
            layer_floors.append(distances(base, moved_states, centered))
            del model
    comparisons = tuple(
        comparison(
            name,
            reference[name],
            candidate[name],
            [each[name] for each in floors],
            sets[name]["input_ids"].cpu() if name == "text" and generates else None,
        )
        for name in reference
    )
    layers = tuple(
        Layer(module=module, rms=rms, floor=max((each[module] for each in layer_floors), default=0))
        for module, rms in distances(reference_states, states, centered).items()
    )
    if certificate is None:
        notes += _differences(original, converted, differing, unlike)
        notes += lacking_tokenizer(original, converted, trust_remote_code)
    # Tensors that differ and do not move one bit of what is compared have not been reached.
    reached = certificate is not None or not differing or any(each.max for each in comparisons)
    equivalent = (
        reached
        and not unlike
        and all(each.equivalent for each in comparisons)
        and all(each is None or each.valid for each in (certificate, algebra))
    )
    parting = (layer.module for layer in layers if layer.rms > TIMES_FLOOR * layer.floor)
    return Equivalence(
        original=original.model,
        converted=converted.model,
        equivalent=equivalent,
        dtype=str(compute).removeprefix("torch."),
        differing_tensors=len(differing),
        comparisons=comparisons,
        certificate=certificate,
        algebra=algebra,
        generation=side_by_side(original, prompt, written, trust_remote_code),
        layers=layers,
        parts_at=None if equivalent else next(parting, None),
        notes=notes,
    )


def _differences(
    original: Checkpoint,
    converted: Checkpoint,
    tensors: tuple[str, ...],
    tokenizers: tuple[str, ...],
) -> tuple[str, ...]:
    """Where two checkpoints of which nothing is known differ, if that is a place or few.

    What two configurations do not have in common may matter on input that was not read.
    """
    one, other = original.config, converted.config
    keys = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
    keys = [key for key in keys if key not in ("transformers_version", "dtype", "torch_dtype")]
    found = []
    if keys:
        found.append(f"Their configurations differ in {', '.join(keys)}.")
    if 0 < len(tensors) <= _FEW:
        found.append(f"Of their weights these differ: {', '.join(tensors)}.")
    if tokenizers:
        found.append(f"Their tokenizers read text in different ways: {', '.join(tokenizers)}.")
    return tuple(found)


class _Runner:
    """Loads models quietly and runs them, telling how many of the passes are done."""

    def __init__(
        self,
        compute: torch.dtype,
        placement: Placement,
        returns: tuple[str, ...],
        trust_remote_code: bool,
        listen: Listener,
    ) -> None:
        self._compute, self._placement, self._returns = compute, placement, returns
        self._trust, self._listen = trust_remote_code, listen
        self._done = 0
        self._offloaded = tempfile.TemporaryDirectory()
        self._stack = ExitStack()

    def __enter__(self) -> _Runner:
        self._stack.enter_context(quiet())
        self._stack.enter_context(self._offloaded)
        self._listen(Event("verifying", 0, _PASSES))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def load(self, checkpoint: Checkpoint) -> Any:
        return load_model(
            checkpoint,
            self._compute,
            self._trust,
            placement=self._placement,
            offload_folder=self._offloaded.name,
        )

    def outputs(
        self, model: Any, sets: dict[str, dict[str, Any]], steps: torch.Tensor | None
    ) -> _Outputs:
        """What `model` computes of every set of inputs, each [positions, features].

        And of the tokens `steps`, one at a time. And what its layers return on the way, one tensor
        for each of their calls.
        """
        exact = computing_in(self._compute)
        found: dict[str, torch.Tensor] = {}
        try:
            with torch.no_grad(), exact, layer_states(model) as states:
                for name, inputs in sets.items():
                    found |= _named_outputs(name, model(**inputs), self._returns)
                for name, output in tower_outputs(model).items():
                    found |= _named_outputs(name, output, ())
                if steps is not None:
                    found["token by token"] = stepwise_logits(model, steps).cpu()
        except Exception as error:  # the model's own code may raise anything
            raise VerificationError(
                f"{type(model).__name__} cannot be run in {self._compute}: {first_line(error)}."
            ) from error
        self._done += 1
        self._listen(Event("verifying", self._done, max(_PASSES, self._done)))
        return found, states


def _named_outputs(name: str, output: Any, returns: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The outputs `returns` of what a model returned.

    Unless there are any, the logits; without them the first that has features, such as the last
    hidden states (a loss has none), and what is pooled of them.
    """
    if returns:
        found = {f"{name}, {field}": output[field] for field in returns}
    else:
        first = next(each for each in tree_leaves(output) if getattr(each, "ndim", 0) > 1)
        found = {name: getattr(output, "logits", first)}
        pooled = tree_leaves(getattr(output, "pooler_output", None))
        if pooled[0] is not None:  # of each image, what the text model reads
            found[f"{name}, pooled"] = torch.cat([each.flatten(0, -2) for each in pooled])
        for field in getattr(output, "keys", tuple)():
            if field.endswith("_embeds") and getattr(output[field], "ndim", 0) > 1:
                found[f"{name}, {field}"] = output[field]  # what is compared to be the logits
    return {name: tensor.flatten(0, -2).cpu() for name, tensor in found.items()}


def _digests(model: Any) -> dict[str, bytes]:
    """A hash of every tensor, by its name in the model: two models need not fit in memory."""
    return {
        name: hashlib.blake2b(
            tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        ).digest()
        for name, tensor in weights(model)
    }


def _differing(before: dict[str, bytes], after: dict[str, bytes]) -> tuple[str, ...]:
    return tuple(sorted(name for name in before if after.get(name) != before[name]))


def _vectors(model: Any) -> dict[str, torch.Tensor]:
    """What may take the place of a bias of 0; gains that were set to 1 were not rounded."""
    found = {name: each.cpu().clone() for name, each in weights(model) if each.ndim == 1}
    return {name: each for name, each in found.items() if (each != 1).any()}


def _noisy(
    original: Checkpoint,
    converted: Checkpoint,
    became: Mapping[str, torch.Tensor],
    seed: int,
    name: str,
    tensor: torch.Tensor,
) -> torch.Tensor:
    """The tensor `name` of a model, perturbed within the rounding of its coarsest dtype.

    `became` has the vectors of the converted model, or none if that is the model.
    """
    if not tensor.is_floating_point():
        return tensor
    stored = (_stored(checkpoint, name) for checkpoint in (original, converted))
    coarsest = max((*stored, tensor.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    return _noisy_in(coarsest, seed, name, tensor, became.get(name))


def _noisy_in(
    dtype: torch.dtype,
    seed: int,
    name: str,
    tensor: torch.Tensor,
    became: torch.Tensor | None = None,
) -> torch.Tensor:
    """The tensor `name` of a model, perturbed within the rounding of `dtype`."""
    if not tensor.is_floating_point():
        return tensor
    # The same whenever it is read, and of its own for every tensor.
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return perturbed(tensor.cpu(), dtype, generator, became).to(tensor.device)


def _stored(checkpoint: Checkpoint, name: str) -> torch.dtype:
    """The dtype that a parameter is stored in: its own, or where names differ that of most."""
    tensor = checkpoint.tensors.get(name)
    dtype = TORCH_DTYPE[tensor.dtype] if tensor else main_dtype(checkpoint)
    return dtype if dtype.is_floating_point else main_dtype(checkpoint)


def _refuse_other_shapes(
    reference: dict[str, torch.Tensor], candidate: dict[str, torch.Tensor]
) -> None:
    one, other = (
        {name: list(tensor.shape) for name, tensor in outputs.items()}
        for outputs in (reference, candidate)
    )
    if one != other:
        raise VerificationError(
            f"The outputs have different shapes: {one} and {other}; these are not the same "
            "architecture."
        )
