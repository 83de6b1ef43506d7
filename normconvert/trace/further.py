"""What one pass on a plain text does not show: further passes of the model, in the same graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from normconvert.errors import TraceError
from normconvert.ir.graph import Failure
from normconvert.model_inputs import all_wanted, handed_back, inputs_in_use, longest
from normconvert.towers import images_beside, in_a_text, tower_passes
from normconvert.trace.forward import (
    BATCH,
    LENGTH,
    as_trace_errors,
    field,
    output_of,
    plain_pass,
    values_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from normconvert.towers import Pass
    from normconvert.trace.calls import NormCalls
    from normconvert.trace.recorder import Recorder

Values: TypeAlias = "list[tuple[str, int]]"
"""The name and the value of all that a pass returns."""

LONG = 4096
"""The tokens of a long text, where the config does not say how many a model reads at once."""

MOST_ASKED = 16
"""How many numbers that are not known a model's code may ask for: each costs a pass."""


class FurtherPasses:
    """Further passes of a model, and what they return: `of_the_whole` model, and `of_towers`.

    The latter by the tower that read; those that are `followed` were run in one of the former, too.
    What cannot be run is left out, and is among the `failed`. With `images`, all
    of them are on images beside the text, which the model cannot do without.
    """

    def __init__(
        self, model: PreTrainedModel, recorder: Recorder, calls: NormCalls, *, images: bool
    ) -> None:
        self._model, self._recorder, self._calls = model, recorder, calls
        self._images = images
        self.of_the_whole: list[Values] = []
        self.of_towers: dict[str, Values] = {}
        self.followed: set[str] = set()
        self.failed: list[Failure] = []

    def _beside(self, batch: int) -> dict[str, Any]:
        return images_beside(self._model, batch) if self._images else {}

    @contextmanager
    def _further(self, what: str) -> Iterator[None]:
        """A further pass, in which `what` is other: forgotten if it ends in an error."""
        first, self._calls.run = len(self._recorder.nodes), len(self._calls.passes) + 1
        try:
            with self._recorder.undone_on_error(), self._calls.undone_on_error():
                yield
            self._calls.passes.append((first, what))
        finally:
            self._calls.run = 0

    @contextmanager
    def _noting(self, what: str) -> Iterator[None]:
        """A further pass that is among the `failed` if it ends in an error."""
        try:
            with self._further(what):
                yield
        except TraceError as error:
            self.failed.append(Failure(what=what, module=error.module, why=str(error)))

    def on_other_data(self, asked: int) -> None:
        """A pass for each number that was invented and `asked` for, with another: those that run.

        Raises:
            TraceError: there are too many.
        """
        model, recorder, calls = self._model, self._recorder, self._calls
        if asked > MOST_ASKED:
            raise TraceError(f"{type(model).__name__} goes ways that depend on data {asked} times.")
        for recorder.turned in range(asked):
            recorder.asked = 0
            with self._noting("on other data"):
                self.of_the_whole.append(plain_pass(model, recorder, calls, **self._beside(BATCH)))
        recorder.turned = -1

    def on_a_long_text(self, *, most_nodes: int) -> None:
        """One pass on as many tokens as the model reads: its code may do otherwise with them.

        None if it takes more than `most_nodes`: then it loops over the tokens, which would take
        hours.
        """
        model, recorder = self._model, self._recorder
        length = (longest(model) or LONG) - 3  # an odd one, which no dimension has
        if length <= LENGTH:
            return
        recorder.most_nodes = len(recorder.nodes) + most_nodes
        try:
            with self._noting("on a long text"):
                beside = self._beside(BATCH)
                found = plain_pass(model, recorder, self._calls, length=length, **beside)
                self.of_the_whole.append(found)
        finally:
            recorder.most_nodes = math.inf

    def in_use(self, first: Values, *, optional: bool) -> None:
        """Two passes on a single text as in use: it all with a mask, then one token with the cache.

        The first with gradients, labels and all that the model can return besides what the `first`
        pass did; if it does not run so, or makes no cache, without labels, without these, and
        without a cache.
        """
        model, recorder = self._model, self._recorder
        shape = (1, LENGTH) if optional else None
        fields = {"loss", *(field(name) for name, _ in first)}
        logits = next((recorder.values[of].shape for name, of in first if name == "logits"), ())
        before = len(self.of_the_whole)

        def run(what: str, inputs: dict[str, Any]) -> Any:
            with self._noting(what), as_trace_errors(model, recorder):
                output = output_of(model, recorder, self._calls, inputs, shape)
                if _asks(inputs) and not isinstance(output, Mapping):
                    raise TraceError("Among outputs without names, more of them move the others.")
                values = values_of(model, recorder, output, fields)
                self.of_the_whole.append(values or values_of(model, recorder, output))
                return output
            return None

        with torch.device(model.device):
            plain = inputs_in_use(model, LENGTH) | self._beside(1)
            full = plain | all_wanted(model, logits)
        # Labels may have to be of another kind.
        unlabelled = {name: given for name, given in full.items() if name != "labels"}
        encoded, cache = list[Any](), dict[str, Any]()
        for inputs in (full, unlabelled, plain, {**plain, "use_cache": False}):
            ran = len(self.of_the_whole) > before
            if inputs is unlabelled and (ran or "labels" not in full):
                continue
            with _gradients(model) if _asks(inputs) else nullcontext(), _encoded(model, encoded):
                cache = handed_back(model, run(_circumstances(inputs), inputs))
            ran = len(self.of_the_whole) > before
            if cache or (ran and (inputs is plain or "use_cache" not in plain)):
                break
        if cache:
            states = encoded[-1] if encoded else None
            with torch.device(model.device):
                inputs = inputs_in_use(model, LENGTH, cache, states)
            run("on one token with a cache", inputs)

    def of_images_and_sound(self) -> None:
        """Each tower, what makes of its output that which the text model reads, and that it does.

        Of the passes of one name, the first that runs.
        """
        ran, failed = set[str](), dict[str, Failure]()

        def run(each: Pass) -> Any:
            """What the pass returns, if it runs."""
            if (name := each.name or each.what) in ran:
                return None
            try:
                output = self._of_a_tower(each)
            except TraceError as error:
                failed[name] = Failure(
                    what=name, module=error.module, why=str(error), tower=each.tower
                )
                return None
            ran.add(name)
            return output

        for each in tower_passes(self._model, BATCH, LENGTH):
            output = run(each)
            following = None if output is None else in_a_text(self._model, each, output)
            if following is not None:
                run(following)
        self.failed += [each for name, each in failed.items() if name not in ran]

    def _of_a_tower(self, each: Pass) -> Any:
        recorder, calls = self._recorder, self._calls
        inside = each.alone and not self._images  # a model that reads them returns what it chooses
        inputs = each.inputs | ({"output_hidden_states": True} if inside else {})
        what = "" if each.name else f"on {each.what}"
        with self._further(what), as_trace_errors(each.part, recorder):
            output = output_of(each.part, recorder, calls, inputs, run=each.run)
            found = values_of(each.part, recorder, output)
        if each.name:
            returned = self.of_towers.setdefault(each.tower, [])
            returned += [(f"{each.name}.{name}", value) for name, value in found]
        else:
            self.of_the_whole.append(found)
            self.followed.add(each.tower)
        return output


def _asks(inputs: dict[str, Any]) -> bool:
    """Whether more is to be returned than in the first pass."""
    return "labels" in inputs or "output_attentions" in inputs


def _circumstances(inputs: dict[str, Any]) -> str:
    """What is other with these `inputs` than in the first pass."""
    given = [word for name, word in _OTHER.items() if inputs.get(name, False) is not False]
    return " with ".join(["on a batch of one", *filter(None, [", ".join(given)])])


_OTHER = {
    "attention_mask": "a mask",
    "use_cache": "a cache",
    "labels": "labels",
    "output_attentions": "all outputs",
}


@contextmanager
def _encoded(model: PreTrainedModel, found: list[Any]) -> Iterator[None]:
    """While active, what the encoder of `model` returns, if it has one, is added to `found`."""
    encoder = model.get_encoder() if model.config.is_encoder_decoder else None
    if not isinstance(encoder, torch.nn.Module) or encoder is model:
        yield
        return
    handle = encoder.register_forward_hook(lambda *call: found.append(call[-1]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _gradients(model: PreTrainedModel) -> Iterator[None]:
    """While active, gradients are enabled, as code may ask, but nothing needs any: that is slow."""
    learning = [each for each in model.parameters() if each.requires_grad]
    model.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
