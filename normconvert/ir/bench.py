"""What `normconvert bench` measured: times of contestants that ran in turn."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

SCHEMA_VERSION = 1

Task: TypeAlias = Literal["norm", "norm and linear", "prefill", "decode", "forward", "training"]

ORIGINAL, CONVERTED, CEILING = "original", "converted", "ceiling"
"""Contestants of the tasks that run a model; those of training are named after `train`."""

_STEADY = 1.5  # how many times the lower quartile the upper one may be


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """How to measure: in `dtype` (None: the stored one), on `device`, with so many `threads`.

    Each comparison takes `seconds`, and at least five rounds. With `compile` the models also run
    through `torch.compile`, which takes what it takes. `threads` None is as torch is set.
    """

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str = "cpu"
    threads: int | None = None
    seconds: float = 5.0
    compile: bool = True
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Quartiles:
    """The median of what the rounds measured, and what a quarter of them lie below and above."""

    lower: float
    median: float
    upper: float

    @property
    def steady(self) -> bool:
        """Whether the rounds agree well enough for the median to say something."""
        return self.upper <= _STEADY * self.lower


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long one contestant took.

    `seconds` are those of one call: of a norm, of a forward pass, of one token while decoding, of
    a training step. `speedup` is the time of the task's first contestant divided by its own, each
    taken in the same round: 1.1 is faster, 0.9 slower.
    """

    name: str
    seconds: Quartiles
    speedup: Quartiles

    @property
    def saved(self) -> float:
        """The share of the first contestant's time that it does not take; negative if slower."""
        return 1 - 1 / self.speedup.median


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One task and its contestants, the first of which the others are compared with.

    norm: a norm alone, on `tokens` rows. norm and linear: with one linear behind it. prefill: a
    forward pass on a prompt of `tokens`. decode: one token after such a prompt, with a cache.
    forward: a forward pass of a model that writes no text. training: forward, backward, SGD.
    `tokens` is None where an image or a spectrum is read. `compiled` says that the models ran
    through `torch.compile`. `note` says what could not be measured, and why.
    """

    task: Task
    compiled: bool
    tokens: int | None
    rounds: int
    timings: tuple[Timing, ...]
    note: str | None = None

    def timing(self, name: str) -> Timing | None:
        """That of the contestant `name`, if it took part."""
        return next((each for each in self.timings if each.name == name), None)

    @property
    def share(self) -> float | None:
        """The share of the ceiling's gain that the converted model has, of the median speedups.

        None without both of them, where in a quarter of the rounds the ceiling gains nothing, and
        where the quartiles of one of them lie further apart than what there is to gain.
        """
        converted, ceiling = self.timing(CONVERTED), self.timing(CEILING)
        if converted is None or ceiling is None or ceiling.speedup.lower <= 1:
            return None
        for speedup in (converted.speedup, ceiling.speedup):
            if not speedup.steady or 1 / speedup.lower - 1 / speedup.upper > ceiling.saved:
                return None
        return converted.saved / ceiling.saved


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """The share of the time that was saved by `what`: 0.1 is a tenth; negative if slower."""

    what: str
    saved: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a paper says is saved, `lower` to `upper` of the time, and what was saved here.

    `left_out` is the number of measurements whose rounds differ so much that they say nothing.
    """

    paper: str
    arxiv: str
    lower: float
    upper: float
    measured: tuple[Saving, ...]
    left_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What a conversion buys on this machine.

    `converted` is the checkpoint that was compared, None if it was made for this by `rules` and
    removed. `rules` are what it says was done to it. `norms` is the number of norms that the
    ceiling, which is the original without them, lacks. `busy` says that others wanted the cores
    when it began: then no figure is held against a claim or the ceiling.
    """

    model: str
    converted: str | None
    rules: tuple[str, ...]
    norms: int
    hidden_size: int
    dtype: str
    device: str
    threads: int
    processor: str
    torch: str
    transformers: str
    busy: bool
    measurements: tuple[Measurement, ...]
    claims: tuple[Claim, ...]
    notes: tuple[str, ...]
    schema_version: int = SCHEMA_VERSION

    def share(self, measurement: Measurement) -> float | None:
        """The share of the ceiling's gain in one of the measurements; None where it says little."""
        return None if self.busy else measurement.share

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`, with the shares."""
        measurements = [{**asdict(each), "share": self.share(each)} for each in self.measurements]
        return {**asdict(self), "measurements": measurements}
