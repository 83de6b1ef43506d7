"""What the commands answer: the API returns these, the command line prints them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias

from normconvert.ir.plan import Plan

Status: TypeAlias = Literal["converted", "planned", "unchanged", "rejected"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a conversion is expected to take, its verification left out.

    `read_bytes` and `written_bytes` are of the weights, `peak_bytes` of memory. `seconds` are those
    of one process whose disk reads and writes `disk_speed` bytes per second.
    """

    read_bytes: int
    written_bytes: int
    peak_bytes: int
    disk_speed: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a conversion would do. Sizes are in bytes of the stored tensors.

    `changed_bytes` are those of the tensors that the plan rewrites, `omitted_bytes` those of the
    tensors that go away, `gain_bytes` those of the gains that become the identity, `added_bytes`
    what the output is larger by, and `untied_bytes` what it would be larger by with tied="untie".
    `done` are the rules that an earlier conversion applied. `cost` is of the plan. `rmsnorm` is
    the plan of that rewrite for a model with LayerNorms.
    """

    model: str
    commit: str | None
    done: tuple[str, ...]
    plan: Plan
    total_tensors: int
    total_bytes: int
    changed_tensors: int
    changed_bytes: int
    omitted_bytes: int
    gain_bytes: int
    added_bytes: int
    untied_bytes: int
    cost: Cost
    rmsnorm: Plan | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        plans = {
            "plan": self.plan.to_json(),
            "rmsnorm": self.rmsnorm and self.rmsnorm.to_json(),
        }
        flat = {field.name: getattr(self, field.name) for field in fields(self)}
        return flat | plans | {"cost": asdict(self.cost)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How far the logits of two models lie apart on one set of tokens.

    `max` and `rms` are of the difference of the logits, `kl` is the mean over positions of
    KL(original || converted) in nats, `top1` the share of positions with the same most likely
    token, `perplexity` that of the two models on text (None: they predict no next token).
    `floor_max` and `floor_rms` are how far the original's logits move when the tensors
    in which the two differ are perturbed within the rounding of their stored dtype. `distribution`
    counts the logits by the power of ten of their difference: (-7, 12) are 12 between 1e-7 and
    1e-6; those without any are left out.
    """

    tokens: str
    positions: int
    max: float
    rms: float
    kl: float
    top1: float
    perplexity: tuple[float, float] | None
    floor_max: float
    floor_rms: float
    distribution: tuple[tuple[int, int], ...]
    equivalent: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is not as the plan says, and where: a tensor or a file."""

    place: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """Whether a converted checkpoint is what its plan makes of the original, bit for bit.

    `rewritten` tensors were computed anew from the original, `copied` tensors and `files` compared
    byte for byte. `undecided` is the number of elements that lie so near to the middle between
    two stored numbers that float64 does not tell to which they round: both count as right.
    `problems` are the first ones of `problem_count`.
    """

    rewritten: int
    copied: int
    files: int
    undecided: int
    problem_count: int
    problems: tuple[Problem, ...]

    @property
    def valid(self) -> bool:
        """Whether nothing is other than the plan says."""
        return self.problem_count == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One rewritten norm and the modules that read it.

    `error` is the largest difference of their outputs between the original and the converted
    model, relative to the largest output of the module, in float64 with unrounded weights.
    """

    norm: str
    readers: tuple[str, ...]
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Algebra:
    """Whether the rewritten norms and their readers compute the same before any rounding."""

    sites: tuple[Site, ...]
    tolerance: float

    @property
    def valid(self) -> bool:
        """Whether no site is off by more than float64's own errors."""
        return all(site.error <= self.tolerance for site in self.sites)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """How far the states behind one layer lie apart (RMS), and the floor for that."""

    module: str
    rms: float
    floor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What two models write after the same tokens, always the likeliest next one.

    The texts are token ids where there is no tokenizer. `same` of the `tokens` are the same before
    the first that is not.
    """

    prompt: str
    original: str
    converted: str
    tokens: int
    same: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Equivalence:
    """The verdict on two models. `dtype` is the one that the logits were computed in.

    It is None, and there are no `comparisons`, where the logits were not computed: then the verdict
    is that of the certificate alone.
    `certificate` and `algebra` are None for a checkpoint that says nothing about how it was
    converted; the latter also where it was not asked for, or cannot be had (`notes` say why).
    `generation` is for a person to read, and says nothing in the verdict; None where the models
    generate no text by themselves. `layers` are in the order in which they run; `parts_at` is the
    first at which two models that are not equivalent are further apart than the rounding of their
    weights explains.
    """

    original: str
    converted: str
    equivalent: bool
    dtype: str | None
    differing_tensors: int
    comparisons: tuple[Comparison, ...]
    certificate: Certificate | None
    algebra: Algebra | None
    generation: Generation | None
    layers: tuple[Layer, ...]
    parts_at: str | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What a conversion did.

    converted: the output is complete, in the folder `output` or, where nothing of it was kept, on
    the Hub at the URL `pushed`. planned: a dry run, nothing was written. unchanged: the
    source is converted already, nothing was written. rejected: the verification found the
    result not equivalent, and it was removed. `kept_shards` is the number of those that an earlier
    run had completed; None unless it was to be resumed.
    """

    status: Status
    output: str | None
    inspection: Inspection
    verification: Equivalence | None
    pushed: str | None = None
    kept_shards: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return {
            "status": self.status,
            "output": self.output,
            "inspection": self.inspection.to_json(),
            "verification": self.verification and self.verification.to_json(),
            "pushed": self.pushed,
            "kept_shards": self.kept_shards,
        }
