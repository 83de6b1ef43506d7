"""Small models that no architecture resembles: every way a gain may, or may not, be read.

One class for all. A `Case` is a function from the model and the embedded tokens x to what the
output head reads, with a few lines each. The model offers the same modules to every case, and
holds those that it uses: what no pass reads might read a norm, and would keep it. `folds` are the
norms whose gain provably can move; None where a proof exists but finding it is not required.

Hidden size 12 and heads of 4 leave room for squares; every other axis has its own size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

VOCABULARY, HIDDEN, HEAD, LOW, TABLE = 31, 12, 4, 5, 17

Forward = Callable[["Torture", torch.Tensor], Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model. `tied` maps parameters to those they share their tensor with."""

    forward: Forward
    folds: frozenset[str] | None
    norm: Callable[[], nn.Module] | None = None
    tied: dict[str, str] = field(default_factory=dict)
    untie: bool = False
    slots: bool | None = None
    felt: bool = True


CASES: dict[str, Case] = {}


def case(*folds: str, either: bool = False, **options: Any) -> Callable[[Forward], Forward]:
    """Register a case in which exactly the norms `folds` fold; `either`: any may, or none."""

    def register(forward: Forward) -> Forward:
        CASES[forward.__name__] = Case(
            forward=forward, folds=None if either else frozenset(folds), **options
        )
        return forward

    return register


class TortureConfig(PreTrainedConfig):  # type: ignore[misc]
    model_type = "torture"

    case: str = "plain"
    vocab_size: int = VOCABULARY
    tie_word_embeddings: bool = False


class Torture(PreTrainedModel):  # type: ignore[misc]
    """Embedding, the case, output head. Linears are named after what they map to."""

    config_class = TortureConfig
    base_model_prefix = ""
    norm: Any
    other: Any

    def __init__(self, config: TortureConfig, *, whole: bool = False) -> None:
        super().__init__(config)
        which = CASES[config.case]
        self._tied_weights_keys = dict(which.tied)
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.norm = which.norm() if which.norm else RMSNorm()
        self.other = RMSNorm()
        self.biased = nn.LayerNorm(HIDDEN)
        self.small = RMSNorm(HEAD)
        self.up = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.gate = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.wide = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)
        self.plus = nn.Linear(HIDDEN, HIDDEN)
        self.more = nn.Linear(HIDDEN, HIDDEN)
        self.low = nn.Linear(HIDDEN, LOW, bias=False)
        self.high = nn.Linear(LOW, HIDDEN, bias=False)
        self.table = nn.Embedding(TABLE, HIDDEN)
        self.vector = nn.Parameter(torch.empty(HIDDEN))
        self.heads = nn.Parameter(torch.empty(HIDDEN // HEAD, HEAD, HIDDEN))
        self.experts = nn.Parameter(torch.empty(LOW, HIDDEN, HIDDEN))
        self.register_buffer("stored", torch.empty(HIDDEN))
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        if not whole:
            for name in idle_members(config.case):
                delattr(self, name)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, use_cache: bool | None = None, **_: Any
    ) -> CausalLMOutput:
        found = CASES[self.config.case].forward(self, self.embed(input_ids))
        hidden, extra = found if isinstance(found, tuple) else (found, None)
        return CausalLMOutput(logits=self.head(hidden), hidden_states=extra)


class _Used(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which tensors some operation reads."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        self.tensors |= {id(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@cache
def idle_members(case: str) -> tuple[str, ...]:
    """The members of the model that the case does not use on any input."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = Torture(TortureConfig(case=case), whole=True).eval()
        for tensor in (*model.parameters(), model.stored):
            torch.nn.init.ones_(tensor)
        called: set[str] = set()
        for name, member in model.named_children():  # a norm may be called and its gain not read
            member.register_forward_hook(lambda *_, name=name: called.add(name))
        with _Used() as used, torch.no_grad():
            for length in (2, 7, 40):
                model(torch.zeros((2, length), dtype=torch.int64))
    names = {path.partition(".")[0] for path, _ in model.named_parameters()}
    read = {p.partition(".")[0] for p, each in model.named_parameters() if id(each) in used.tensors}
    return tuple(sorted(names - read - called))


AutoConfig.register("torture", TortureConfig)
AutoModelForCausalLM.register(TortureConfig, Torture)


@torch.no_grad()
def save(name: str, folder: Path) -> None:
    """Write the model of the case `name`, every parameter drawn at random, in float64."""
    tied = bool(CASES[name].tied)
    with torch.random.fork_rng(devices=[]):
        model = Torture(TortureConfig(case=name, tie_word_embeddings=tied)).to(torch.float64)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*model.parameters(), model.stored):
        drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.4
        sign = torch.rand(tensor.shape, generator=generator) < (0.15 if tensor.ndim == 1 else 0.5)
        tensor.copy_(torch.where(sign, -drawn, drawn) / max(1, tensor[0].numel()) ** 0.5)
    model.save_pretrained(folder)


def constant(x: torch.Tensor) -> torch.Tensor:
    return torch.linspace(0.5, 2.0, HIDDEN, dtype=x.dtype)


def order(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(HIDDEN, device=x.device).roll(5)


# --- norms -----------------------------------------------------------------------------------


def normalised(x: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


class RMSNorm(nn.Module):
    def __init__(self, size: int = HIDDEN) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normalised(x) * self.weight


class Whatever(RMSNorm):
    """Its name says nothing."""


class OnePlus(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normalised(x) * (1 + self.weight)


class GainFirst(RMSNorm):
    """The gain comes before the normalisation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normalised(x * self.weight)


class AbsoluteGain(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normalised(x) * self.weight.abs()


class PositiveGain(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normalised(x) * self.weight.relu()


class BoundedGain(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normalised(x) * self.weight.clamp(max=2.0)


class Clamped(RMSNorm):
    """Bounds its output, but only beyond what ordinary inputs reach."""

    def __init__(self) -> None:
        super().__init__(8 * HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (normalised(x) * self.weight).clamp(-8.0, 8.0)


class Optional(RMSNorm):
    """A gain only when asked for, or a gate if there is one."""

    def forward(
        self, x: torch.Tensor, gate: torch.Tensor | None = None, use_gain: bool = True
    ) -> torch.Tensor:
        out = normalised(x) * self.weight if use_gain else normalised(x)
        return out if gate is None else out * torch.sigmoid(gate * self.weight)


class Switched(RMSNorm):
    """Its owner switches the gain off between calls."""

    active = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normalised(x) * self.weight if self.active else normalised(x)


class Counting(RMSNorm):
    """Every second call, its gain is squared."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return normalised(x) * (self.weight if self.calls % 2 else self.weight.square())


class FirstTokens(RMSNorm):
    """Leaves everything after the sixth token as it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] <= 6:
            return normalised(x) * self.weight
        return torch.cat([normalised(x[:, :6]) * self.weight, x[:, 6:]], dim=1)


class Prototypes(nn.Module):
    """Ignores its input's scale as a norm does, and reads a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(LOW, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (normalised(x) @ self.weight.T).softmax(-1) @ self.weight


class Stacked(nn.Module):
    """Gain and bias are the rows of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normalised(x) * self.weight[0] + self.weight[1]


class Doubled(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normalised(x) * (2 * self.weight)


def hooked() -> nn.Module:
    """A hook adds the input to the output."""
    norm = RMSNorm()
    norm.register_forward_hook(lambda module, args, output: output + args[0])
    return norm


def hooked_before() -> nn.Module:
    norm = RMSNorm()
    norm.register_forward_pre_hook(lambda module, args: (args[0] * module.weight,))
    return norm


class Exponential(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.exp()


def parametrised() -> nn.Module:
    norm = RMSNorm()
    nn.init.ones_(norm.weight)
    parametrize.register_parametrization(norm, "weight", Exponential())
    return norm


# --- who reads it ----------------------------------------------------------------------------


@case("norm")
def plain(m: Torture, x: torch.Tensor) -> Any:
    return x + m.up(m.norm(x))


@case()
def elementwise_gate(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    return m.up(h) + h * torch.sigmoid(h @ m.vector).unsqueeze(-1)


@case("norm")
def gate_of_products(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    return m.up(h) * torch.sigmoid(m.gate(h)) * torch.sigmoid(h @ m.vector).unsqueeze(-1)


@case("norm")
def twice_with_one_linear(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x)) + m.up(m.norm(x.sin())).tanh()


@case("norm")
def twice_with_two_linears(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x)) + m.gate(m.norm(x.sin())).tanh()


@case()
def twice_but_once_bare(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x)) + m.norm(x.sin())


@case()
def one_linear_on_two_norms(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x)) + m.up(m.other(x)).tanh()


@case()
def one_linear_on_a_norm_and_not(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x)) + m.up(x).tanh()


@case()
def sum_of_two_norms(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x) + m.other(x.sin()))


@case("norm")
def sum_of_one_norm(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x) + m.norm(x.sin()))


@case("norm")
def difference_of_one_norm(m: Torture, x: torch.Tensor) -> Any:
    return m.up(torch.sub(m.norm(x), m.norm(x.sin()), alpha=3))


@case()
def as_the_addend(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x).flatten(0, 1)
    return torch.addmm(m.up(h), x.flatten(0, 1), m.gate.weight).view(x.shape) + torch.baddbmm(
        m.norm(x), x, m.experts[: x.shape[0]]
    )


@case("norm")
def inner_product(m: Torture, x: torch.Tensor) -> Any:
    return x * torch.dot(m.norm(x).mean((0, 1)), m.vector)


@case()
def residual_of_the_norm(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    return h + m.up(h)


@case("other")
def norm_of_a_norm(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.other(m.norm(x)))


@case("norm", "other")
def chain(m: Torture, x: torch.Tensor) -> Any:
    x = x + m.up(m.norm(x))
    return x + m.gate(m.other(x))


@case(felt=False)
def unused(m: Torture, x: torch.Tensor) -> Any:
    m.norm(x)
    return m.up(x)


@case()
def returned(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    return m.up(h), (h,)


@case()
def returned_as_a_view(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    return m.up(h), (h.transpose(0, 1)[3:],)


@case()
def as_a_mask(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    return m.up(h) * (h > 0.3)


@case()
def as_an_index(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    return m.up(h) + m.table(h.argmax(-1))


@case()
def as_whole_numbers(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    return m.up(h) + m.table((3 * h[..., 0]).long() % TABLE)


@case()
def as_a_sort(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x).sort(-1).values)


@case()
def rounded(m: Torture, x: torch.Tensor) -> Any:
    return m.up((4 * m.norm(x)).round())


@case()
def summed_as_whole_numbers(m: Torture, x: torch.Tensor) -> Any:
    return x + m.up((8 * m.norm(x)).cumsum(1, dtype=torch.int64).to(x.dtype))


@case()
def times_itself(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    return m.up(h * h)


@case()
def with_itself_as_keys(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    return (h @ h.transpose(1, 2)).softmax(-1) @ m.up(h)


@case()
def with_another_activation(m: Torture, x: torch.Tensor) -> Any:
    return (m.norm(x) @ x.transpose(1, 2)).softmax(-1) @ m.up(x)


@case("norm")
def values_of_attention(m: Torture, x: torch.Tensor) -> Any:
    return m.up((x @ x.transpose(1, 2)).softmax(-1) @ m.norm(x))


@case("norm")
def contracted_over_tokens(m: Torture, x: torch.Tensor) -> Any:
    mixed = m.norm(x).transpose(1, 2) @ m.low(x).softmax(1)
    return x + m.up(mixed.transpose(1, 2)).mean(1, keepdim=True)


@case("norm")
def bilinear_left(m: Torture, x: torch.Tensor) -> Any:
    scores = m.norm(x) @ m.up.weight @ m.other(x).transpose(1, 2)
    return scores.softmax(-1) @ x


@case()
def bilinear_module(m: Torture, x: torch.Tensor) -> Any:
    return F.bilinear(m.norm(x), x, m.experts) @ m.low.weight


@case()
def nonlinear(m: Torture, x: torch.Tensor) -> Any:
    return m.up(F.relu(m.norm(x)))


@case()
def softmax_of_features(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x).softmax(-1))


@case()
def distances(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x)) + torch.cdist(m.norm(x), m.up.weight).softmax(-1) @ m.gate.weight


@case("norm")
def negated_and_divided(m: Torture, x: torch.Tensor) -> Any:
    return m.up(-m.norm(x) / 3 * x.mean(-1, keepdim=True))


@case()
def as_a_divisor(m: Torture, x: torch.Tensor) -> Any:
    return m.up(x / (m.norm(x)))


@case()
def something_else_for_long_inputs(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    return h if x.shape[1] > 1000 else m.up(h)


@case("norm")
def something_else_for_middling_inputs(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    return h if 16 < x.shape[1] < 1000 else m.up(h)


@case("norm")
def dropout(m: Torture, x: torch.Tensor) -> Any:
    return m.up(F.dropout(m.norm(x), 0.3, training=m.training))


@case("norm")
def copied_and_cast(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x).clone().contiguous().detach().to(torch.float32).to(x.dtype))


@case("norm")
def pooled(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    return x + m.up(h.mean(1, keepdim=True)) + m.gate(h.cumsum(1)) + m.up(h.sum((0, 1)))


@case()
def running_sum_of_features(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x).cumsum(-1))


@case()
def mean_of_features(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    return m.up(h) + h.mean(-1, keepdim=True)


@case(either=True)
def centered_over_tokens(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    return m.up(h - h.mean(1, keepdim=True))


@case(either=True)
def shifted_by_a_token(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    return m.up(h) + m.gate(F.pad(h, (0, 0, 1, 0))[:, :-1])


@case("norm")
def masked_with_zero(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x).masked_fill(x > 0.5, 0.0))


@case()
def masked_with_one(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x).masked_fill(x > 0.5, 1.0))


@case()
def chosen_from_two(m: Torture, x: torch.Tensor) -> Any:
    return m.up(torch.where(x > 0.5, m.norm(x), x))


@case()
def through_a_convolution(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x).transpose(1, 2)
    mixed = F.conv1d(h, m.up.weight[:, :1, None].expand(-1, -1, 3), padding=1, groups=HIDDEN)
    return mixed.transpose(1, 2)


@case(either=True)
def pointwise_convolution(m: Torture, x: torch.Tensor) -> Any:
    return F.conv1d(m.norm(x).transpose(1, 2), m.up.weight.unsqueeze(-1)).transpose(1, 2)


@case()
def fourier(m: Torture, x: torch.Tensor) -> Any:
    return m.up(torch.fft.rfft(m.norm(x), n=2 * HIDDEN - 2).abs())


@case()
def as_complex_numbers(m: Torture, x: torch.Tensor) -> Any:
    pairs = torch.view_as_complex(torch.unflatten(m.norm(x), -1, (-1, 2)))
    return m.up(torch.view_as_real(pairs * torch.polar(x[..., ::2], x[..., 1::2])).flatten(-2))


# --- which part of the features --------------------------------------------------------------


@case("norm")
def sliced_columns(m: Torture, x: torch.Tensor) -> Any:
    h, w = m.norm(x), m.up.weight
    return h[..., :5] @ w[:, :5].T + (h[..., 5:] @ w[:, 5:].T).tanh()


@case("norm")
def columns_out_of_step(m: Torture, x: torch.Tensor) -> Any:
    h, w = m.norm(x), m.up.weight
    return h[..., 5:] @ w[:, :7].T + (h[..., :5] @ w[:, 7:].T).tanh()


@case()
def columns_that_overlap(m: Torture, x: torch.Tensor) -> Any:
    h, w = m.norm(x), m.up.weight
    return h[..., 5:] @ w[:, :7].T + (h @ w.T).tanh()


@case("norm")
def columns_half_not_normed(m: Torture, x: torch.Tensor) -> Any:
    h, w = m.norm(x), m.up.weight
    return h[..., :5] @ w[:, :5].T + x[..., 5:] @ w[:, 5:].T


@case("norm", "other")
def columns_of_two_norms(m: Torture, x: torch.Tensor) -> Any:
    w = m.up.weight
    return m.norm(x)[..., :5] @ w[:, :5].T + m.other(x)[..., 5:] @ w[:, 5:].T


@case("norm")
def rows_in_chunks(m: Torture, x: torch.Tensor) -> Any:
    first, second = m.up.weight.chunk(2)
    return torch.cat([F.linear(m.norm(x), first), F.linear(m.norm(x), second).tanh()], -1)


@case()
def rows_half_not_normed(m: Torture, x: torch.Tensor) -> Any:
    first, second = m.up.weight.chunk(2)
    return torch.cat([F.linear(m.norm(x), first), F.linear(x, second)], -1)


@case()
def rows_of_two_norms(m: Torture, x: torch.Tensor) -> Any:
    first, second = torch.split(m.up.weight, [5, 7])
    return torch.cat([F.linear(m.norm(x), first), F.linear(m.other(x), second)], -1)


@case("norm")
def rows_reordered(m: Torture, x: torch.Tensor) -> Any:
    return F.linear(m.norm(x), m.up.weight[order(x)])


@case("norm")
def in_pieces(m: Torture, x: torch.Tensor) -> Any:
    a, b, c = torch.split(m.norm(x), [3, 4, 5], -1)
    return a @ m.up.weight[:3] + b @ m.gate.weight[:4] + c @ m.high.weight.T


@case("norm")
def every_second(m: Torture, x: torch.Tensor) -> Any:
    return m.norm(x)[..., ::2] @ m.up.weight[:6] + m.norm(x)[..., 1::2] @ m.gate.weight[6:]


@case("norm")
def backwards(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x).flip(-1))


@case(either=True)
def rolled(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x).roll(3, -1))


@case(either=True)
def reordered(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x)[..., order(x)])


@case()
def reordered_by_the_input(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x).gather(-1, x.argsort(-1)))


@case("norm")
def repeated(m: Torture, x: torch.Tensor) -> Any:
    return m.wide(m.norm(x).repeat(1, 1, 2))


@case("norm")
def each_repeated(m: Torture, x: torch.Tensor) -> Any:
    return m.wide(m.norm(x).repeat_interleave(2, -1))


@case(either=True)
def padded(m: Torture, x: torch.Tensor) -> Any:
    return m.wide(F.pad(m.norm(x), (5, 7)))


@case("norm")
def joined_with_something(m: Torture, x: torch.Tensor) -> Any:
    return m.wide(torch.cat([m.norm(x), x], -1))


@case("norm")
def joined_after_something(m: Torture, x: torch.Tensor) -> Any:
    return m.wide(torch.cat([x[..., 5:], m.norm(x), x[..., :5]], -1))


@case("norm", "other")
def joined_with_a_norm(m: Torture, x: torch.Tensor) -> Any:
    return m.wide(torch.cat([m.norm(x), m.other(x.sin())], -1))


@case("norm")
def joined_with_itself(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    return m.wide(torch.cat([h, h], -1))


@case()
def joined_with_a_clash(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    return m.wide(torch.cat([h, x], -1)) + m.wide(torch.cat([x, h], -1)).tanh()


@case()
def more_tokens(m: Torture, x: torch.Tensor) -> Any:
    return m.up(torch.cat([m.norm(x), x], 1)).unflatten(1, (2, -1)).sum(1)


@case("norm")
def more_tokens_of_the_norm(m: Torture, x: torch.Tensor) -> Any:
    return m.up(torch.cat([m.norm(x), m.norm(x.sin())], 1)).unflatten(1, (2, -1)).sum(1)


@case()
def stacked_with_something(m: Torture, x: torch.Tensor) -> Any:
    return m.up(torch.stack([m.norm(x), x])).sum(0)


@case("norm")
def unbound_and_stacked(m: Torture, x: torch.Tensor) -> Any:
    return m.up(torch.stack(m.norm(x).unbind(0)[::-1]))


@case("small")
def gain_of_every_head(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.small(torch.unflatten(x, -1, (-1, HEAD))).flatten(-2))


@case("small")
def gain_of_every_head_transposed(m: Torture, x: torch.Tensor) -> Any:
    heads = m.small(torch.unflatten(x, -1, (-1, HEAD)))
    return m.up(heads.transpose(-1, -2).reshape(x.shape))


@case(either=True)
def heads_of_a_matrix(m: Torture, x: torch.Tensor) -> Any:
    return torch.einsum("bthd,hde->bte", torch.unflatten(m.norm(x), -1, (-1, HEAD)), m.heads)


@case(either=True)
def normed_heads_of_a_matrix(m: Torture, x: torch.Tensor) -> Any:
    return torch.einsum("bthd,hde->bte", m.small(torch.unflatten(x, -1, (-1, HEAD))), m.heads)


@case()
def square_with_its_transpose(m: Torture, x: torch.Tensor) -> Any:
    h = m.small(m.low(x)[..., :HEAD, None] * x[..., None, :HEAD])
    return (torch.cat([h, h.transpose(-1, -2)], -1) @ m.wide.weight[:, :8].T).sum(-2)


@case()
def square_with_another_transposed(m: Torture, x: torch.Tensor) -> Any:
    square = m.low(x)[..., :HEAD, None] * x[..., None, :HEAD]
    joined = torch.cat([m.small(square).transpose(-1, -2), square], -1)
    return (joined @ m.wide.weight[:, :8].T).sum(-2)


@case("small")
def flattened_square(m: Torture, x: torch.Tensor) -> Any:
    h = m.small(m.low(x)[..., :HEAD, None] * x[..., None, :HEAD])
    return h.flatten(-2) @ m.wide.weight[:, :16].T


@case(either=True)
def a_mask_over_features(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    kept = h[torch.ones_like(h, dtype=torch.bool)]
    return x + m.up(kept.view(x.shape))


@case("norm")
def chosen_tokens(m: Torture, x: torch.Tensor) -> Any:
    index = m.low(x).argmax(-1).flatten()
    return x + m.up(m.norm(x).flatten(0, 1)[index]).view(x.shape)


@case("norm")
def tokens_sent_to_experts(m: Torture, x: torch.Tensor) -> Any:
    h, out = m.norm(x).flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
    chosen = m.low(h).argmax(-1)
    for expert in range(LOW):
        (rows,) = torch.where(chosen == expert)
        out.index_add_(0, rows, h[rows] @ m.experts[expert])
    return out.view(x.shape)


@case("norm")
def experts_sent_to_tokens(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    matrices = m.experts[m.low(h).argmax(-1).flatten()]
    return torch.bmm(h.view(-1, 1, HIDDEN), matrices).view(x.shape)


@case("norm")
def chosen_by_two_indices(m: Torture, x: torch.Tensor) -> Any:
    row = torch.arange(x.shape[0]).unsqueeze(1)
    return x + m.up(m.norm(x)[row, m.low(x).argmax(-1)])


@case()
def experts_half_not_normed(m: Torture, x: torch.Tensor) -> Any:
    return m.norm(x) @ m.experts[0] + x @ m.experts[1]


@case()
def experts_of_two_norms(m: Torture, x: torch.Tensor) -> Any:
    return m.norm(x) @ m.experts[0] + m.other(x) @ m.experts[1]


@case()
def experts_along_two_axes(m: Torture, x: torch.Tensor) -> Any:
    return m.norm(x) @ m.experts[0] + m.norm(x) @ m.experts[1].T


@case("norm")
def experts_packed(m: Torture, x: torch.Tensor) -> Any:
    flat = m.experts.flatten()
    return m.norm(x) @ flat[: HIDDEN**2].view(HIDDEN, HIDDEN)


@case()
def identity_expert(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    share = m.low(h).softmax(-1)
    return m.up(h) * share[..., :1] + h * share[..., 1:2]


# --- what is done to the weight --------------------------------------------------------------


@case()
def weight_also_transposed(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x)).tanh() @ m.up.weight


@case()
def weight_in_a_penalty(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x)) * m.up.weight.square().mean()


@case()
def weight_also_bare(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x)) + m.up.weight[3]


@case()
def weight_returned(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x)), (m.up.weight.sum(0),)


@case("norm")
def weight_measured_only(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x)) * torch.zeros_like(m.up.weight).add(1)[0]


@case("norm")
def weight_times_a_constant(m: Torture, x: torch.Tensor) -> Any:
    return F.linear(m.norm(x), 0.3 * m.up.weight * constant(x))


@case(either=True)
def weight_times_a_stored_vector(m: Torture, x: torch.Tensor) -> Any:
    return F.linear(m.norm(x), m.up.weight * m.stored)


@case(either=True)
def stored_vector_before_the_weight(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x) * m.stored)


@case()
def weight_normalised(m: Torture, x: torch.Tensor) -> Any:
    return F.linear(m.norm(x), m.up.weight / m.up.weight.norm(dim=1, keepdim=True))


@case()
def weight_clamped(m: Torture, x: torch.Tensor) -> Any:
    return F.linear(m.norm(x), m.up.weight.clamp(-0.2, 0.2))


@case()
def weight_plus_an_update(m: Torture, x: torch.Tensor) -> Any:
    return F.linear(m.norm(x), m.up.weight + m.high.weight @ m.low.weight)


@case("norm")
def update_beside_the_weight(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    return m.up(h) + m.high(m.low(h))


@case("norm")
def weight_on_the_left(m: Torture, x: torch.Tensor) -> Any:
    return (m.up.weight @ m.norm(x).transpose(1, 2)).transpose(1, 2)


@case("norm")
def weight_not_transposed(m: Torture, x: torch.Tensor) -> Any:
    return torch.einsum("btd,de->bte", m.norm(x), m.up.weight)


@case("norm")
def weight_times_a_vector(m: Torture, x: torch.Tensor) -> Any:
    return x + torch.mv(m.up.weight, m.norm(x).mean((0, 1)))


@case("norm")
def weights_joined(m: Torture, x: torch.Tensor) -> Any:
    both = F.linear(m.norm(x), torch.cat([m.up.weight, m.gate.weight]))
    return both[..., :HIDDEN] * both[..., HIDDEN:].sigmoid()


@case("norm")
def weights_stacked(m: Torture, x: torch.Tensor) -> Any:
    stack = torch.stack([m.up.weight, m.gate.weight])
    return torch.einsum("btd,ned->bte", m.norm(x), stack)


@case()
def weight_joined_with_another_read(m: Torture, x: torch.Tensor) -> Any:
    both = F.linear(m.norm(x), torch.cat([m.up.weight, m.gate.weight]))
    return both[..., :HIDDEN] + m.gate(x)


@case("norm")
def weight_rows_by_token(m: Torture, x: torch.Tensor) -> Any:
    rows = m.table(m.low(x).argmax(-1))
    return x * torch.einsum("btd,btd->bt", m.norm(x), rows).unsqueeze(-1)


@case("norm")
def weight_rows_elementwise(m: Torture, x: torch.Tensor) -> Any:
    return m.norm(x) * m.table(m.low(x).argmax(-1))


@case("norm")
def a_loop_of_maps(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    return torch.vmap(lambda w: h @ w)(m.experts).sum(0)


@case("biased")
def packed_attention(m: Torture, x: torch.Tensor) -> Any:
    h = m.biased(x)
    q, k, v = F.linear(h, m.experts[:3].flatten(0, 1)).chunk(3, -1)
    return m.up(F.scaled_dot_product_attention(q, k, v))


@case(either=True, norm=lambda: nn.MultiheadAttention(HIDDEN, 3, batch_first=True))
def attention_of_torch(m: Torture, x: torch.Tensor) -> Any:
    h = m.biased(x)
    return m.norm(h, h, h)[0]


@case(either=True, norm=lambda: nn.TransformerEncoderLayer(HIDDEN, 3, 19, norm_first=True))
def layer_of_torch(m: Torture, x: torch.Tensor) -> Any:
    return m.norm(x)


@case(either=True, norm=lambda: nn.GRU(HIDDEN, HIDDEN, batch_first=True))
def recurrent(m: Torture, x: torch.Tensor) -> Any:
    return m.norm(m.other(x))[0]


@case()
def weight_quantised(m: Torture, x: torch.Tensor) -> Any:
    return m.up(x) + F.linear(m.norm(x), (m.gate.weight * 8).round() / 8)


# --- the gain itself -------------------------------------------------------------------------


@case("norm", "other", tied={"other.weight": "norm.weight"})
def gain_shared(m: Torture, x: torch.Tensor) -> Any:
    x = x + m.up(m.norm(x))
    return x + m.gate(m.other(x))


@case("norm", "other", tied={"other.weight": "norm.weight"})
def gain_shared_one_linear(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x)) + m.up(m.other(x.sin()))


@case(tied={"other.weight": "norm.weight"})
def gain_shared_with_a_kept_norm(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x)) + m.other(x)


@case(tied={"other.weight": "norm.weight"}, norm=OnePlus)
def gain_shared_by_two_kinds(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x)) + m.gate(m.other(x))


@case(tied={"other.weight": "norm.weight"}, norm=GainFirst)
def gain_shared_with_an_unknown_norm(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x)) + m.gate(m.other(x))


@case()
def gain_used_outside(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x)) + x * m.norm.weight


@case()
def gain_used_in_another_call(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x)) + m.gate(F.rms_norm(x, (HIDDEN,), m.norm.weight))


@case(tied={"vector": "norm.weight"})
def gain_is_another_parameter(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x)) + x * m.vector


@case(tied={"plus.bias": "norm.weight"})
def gain_is_a_bias(m: Torture, x: torch.Tensor) -> Any:
    return m.plus(m.norm(x))


@case(either=True, tied={"biased.bias": "biased.weight"})
def gain_is_its_own_bias(m: Torture, x: torch.Tensor) -> Any:
    return m.plus(m.biased(x))


@case(either=True, tied={"biased.bias": "biased.weight"})
def gain_is_its_own_bias_that_stays(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.biased(x))


@case(tied={"low.weight": "norm.weight"}, norm=Prototypes)
def weight_inside_an_unknown_norm(m: Torture, x: torch.Tensor) -> Any:
    return m.norm(x) + m.high(m.low(m.other(x)))


@case(norm=Prototypes)
def weight_read_by_an_unknown_norm(m: Torture, x: torch.Tensor) -> Any:
    return m.norm(x) + m.high(F.linear(m.other(x), m.norm.weight))


@case("norm", norm=Whatever)
def called_something_else(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x))


@case("norm")
def called_by_keyword(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x=x))


@case("norm", norm=OnePlus)
def one_plus_gain(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x))


@case(either=True, norm=Doubled)
def doubled_gain(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x))


@case("norm", norm=lambda: nn.RMSNorm(HIDDEN))
def of_torch(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x))


@case("norm", norm=lambda: nn.GroupNorm(1, HIDDEN))
def one_group(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x.flatten(0, 1))).view(x.shape)


@case(norm=lambda: nn.GroupNorm(3, HIDDEN))
def three_groups(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x.flatten(0, 1))).view(x.shape)


@case(norm=GainFirst)
def gain_before_the_norm(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x))


@case(norm=AbsoluteGain)
def absolute_gain(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x))


@case(norm=PositiveGain)
def positive_gain(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x))


@case(norm=BoundedGain)
def bounded_gain(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x))


@case(norm=Clamped)
def clamped_output(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(F.pad(x.pow(9), (0, 7 * HIDDEN)))[..., :HIDDEN])


@case("norm", norm=Optional)
def gain_only_the_first_time(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x)) + m.gate(m.norm(x.sin(), use_gain=False))


@case("norm", norm=Optional)
def gain_only_the_second_time(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x, use_gain=False)) + m.gate(m.norm(x.sin()))


@case(norm=Optional, felt=False)
def gain_never(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x, use_gain=False))


@case(norm=Optional)
def gated_the_second_time(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x)) + m.gate(m.norm(x.sin(), x))


@case(norm=Switched)
def switched_off_later(m: Torture, x: torch.Tensor) -> Any:
    first = m.up(m.norm(x))
    m.norm.active = False
    second = m.gate(m.norm(x.sin()))
    m.norm.active = True
    return first + second


@case(norm=Counting)
def counting_its_calls(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x)) + m.gate(m.norm(x.sin()))


@case(norm=FirstTokens)
def first_tokens_only(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x))


@case(norm=Stacked)
def gain_and_bias_in_one(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x))


@case(norm=hooked)
def with_a_hook(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x))


@case(norm=hooked_before)
def with_a_hook_before(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x))


@case("other", norm=hooked)
def with_a_hook_after_one_without(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.other(x)).tanh() + m.gate(m.norm(x))


@case(norm=parametrised)
def gain_parametrised(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x))


@case()
def hooks_left_out(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x)) + m.gate(m.norm.forward(x.sin()))


@case()
def gain_swapped_in_between(m: Torture, x: torch.Tensor) -> Any:
    first, own = m.up(m.norm(x)), m.norm.weight
    m.norm.weight = m.other.weight
    second = m.gate(m.norm(x.sin()))
    m.norm.weight = own
    return first + second


@case()
def gain_changed_in_between(m: Torture, x: torch.Tensor) -> Any:
    first = m.up(m.norm(x))
    gain = m.norm.weight.data.clone()
    m.norm.weight.data.mul_(2)
    second = m.gate(m.norm(x.sin()).tanh())
    m.norm.weight.data.copy_(gain)
    return first + second


# --- overwritten in place --------------------------------------------------------------------


@case()
def features_overwritten(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    h[..., :5] = x[..., :5]
    return m.up(h)


@case(either=True)
def token_overwritten(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    h[:, 0] = 0
    return m.up(h)


@case()
def view_overwritten(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    h.transpose(0, 1).narrow(-1, 2, 4).fill_(0.7)
    return m.up(h)


@case()
def base_overwritten(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    view = h.transpose(1, 2)
    h.copy_(x)
    return m.up(view.transpose(1, 2))


@case()
def added_in_place(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    h.add_(x)
    return m.up(h)


@case(either=True)
def read_before_overwritten(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    out = m.up(h)
    h.copy_(x)
    return out + m.gate(h)


@case("norm")
def multiplied_in_place(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    h.mul_(constant(x))
    return m.up(h)


@case("norm")
def stream_overwritten(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    x.add_(m.up(h))
    return x + m.gate(h)


@case()
def product_written_over_it(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    out = m.up(h)
    torch.mul(x, constant(x), out=h)
    return out + m.gate(h)


@case()
def sum_written_over_it(m: Torture, x: torch.Tensor) -> Any:
    h, twin = m.norm(x), m.norm(x.sin())
    out = m.up(h)
    torch.add(h, twin, out=h)
    torch.neg(x, out=twin)
    return out + m.gate(h) + m.gate(twin).tanh()


@case()
def matrix_written_over_it(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x).flatten(0, 1)
    out = m.up(h)
    torch.mm(x.flatten(0, 1), m.more.weight, out=h)
    return (out + m.gate(h)).view(x.shape)


@case()
def written_into_a_buffer(m: Torture, x: torch.Tensor) -> Any:
    buffer = torch.zeros_like(x).repeat(1, 1, 2)
    buffer[..., 3 : 3 + HIDDEN] = m.norm(x)
    return m.wide(buffer)


@case(either=True)
def scattered(m: Torture, x: torch.Tensor) -> Any:
    index = order(x).expand(x.shape)
    return m.up(torch.zeros_like(x).scatter(-1, index, m.norm(x)))


@case()
def squeezed_in_place(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x).unsqueeze(1)
    h.squeeze_(1).transpose_(0, 1)
    return m.up(h).transpose(0, 1) + h.transpose(0, 1)


@case()
def weight_overwritten(m: Torture, x: torch.Tensor) -> Any:
    weight = m.up.weight.clone()
    weight[:, 3] = 0.3
    return F.linear(m.norm(x), weight)


# --- biases ----------------------------------------------------------------------------------


@case("biased", slots=True)
def readers_with_bias(m: Torture, x: torch.Tensor) -> Any:
    h = m.biased(x)
    return m.plus(h) + m.more(h).tanh()


@case("biased", slots=False)
def one_reader_without_bias(m: Torture, x: torch.Tensor) -> Any:
    h = m.biased(x)
    return m.plus(h) + m.up(h).tanh()


@case("biased", slots=False, tied={"more.bias": "plus.bias"})
def bias_of_two_linears(m: Torture, x: torch.Tensor) -> Any:
    h = m.biased(x)
    return m.plus(h) + m.more(h).tanh()


@case("biased", slots=False)
def bias_used_twice(m: Torture, x: torch.Tensor) -> Any:
    return m.plus(m.biased(x)).tanh() + m.plus.bias


@case("biased", slots=True)
def linear_with_bias_used_twice(m: Torture, x: torch.Tensor) -> Any:
    return m.plus(m.biased(x)) + m.plus(m.biased(x.sin())).tanh()


@case("biased", slots=False)
def negated_with_bias(m: Torture, x: torch.Tensor) -> Any:
    return m.plus(-m.biased(x))


@case("biased", slots=False)
def masked_with_bias(m: Torture, x: torch.Tensor) -> Any:
    return m.plus(m.biased(x).masked_fill(x > 0.5, 0.0))


@case("biased", slots=False)
def bias_pooled(m: Torture, x: torch.Tensor) -> Any:
    return x + m.plus(m.biased(x).sum(1, keepdim=True))


@case("biased", slots=True)
def bias_added_later(m: Torture, x: torch.Tensor) -> Any:
    return F.linear(m.biased(x), m.plus.weight) + m.plus.bias


@case("biased", slots=False)
def bias_times_two(m: Torture, x: torch.Tensor) -> Any:
    flat = m.biased(x).flatten(0, 1)
    return torch.addmm(m.plus.bias, flat, m.plus.weight.T, alpha=2, beta=0.5).view(x.shape)


@case("biased", slots=False)
def weight_halved_bias_not(m: Torture, x: torch.Tensor) -> Any:
    return F.linear(m.biased(x), 0.5 * m.plus.weight, m.plus.bias)


@case("biased", slots=False)
def bias_half_not_normed(m: Torture, x: torch.Tensor) -> Any:
    return m.plus(torch.cat([m.biased(x)[..., :5], x[..., 5:]], -1))


@case("biased", slots=False)
def bias_in_halves(m: Torture, x: torch.Tensor) -> Any:
    (first, second), (one, two) = m.plus.weight.chunk(2), m.plus.bias.chunk(2)
    h = m.biased(x)
    return torch.cat([F.linear(h, first, one), F.linear(h, second, two).tanh()], -1)


@case("biased", slots=False)
def bias_half_left_out(m: Torture, x: torch.Tensor) -> Any:
    first, one = m.plus.weight[:6], m.plus.bias[:6]
    return F.pad(F.linear(m.biased(x), first, one), (6, 0)) + F.pad(m.plus.bias[6:], (0, 6))


@case("biased", slots=False)
def bias_backwards(m: Torture, x: torch.Tensor) -> Any:
    return F.linear(m.biased(x), m.plus.weight, m.plus.bias.flip(0))


@case("biased", slots=False)
def repeated_with_bias(m: Torture, x: torch.Tensor) -> Any:
    joined = torch.cat([m.plus.weight, m.more.weight], 1)
    return F.linear(m.biased(x).repeat(1, 1, 2), joined, m.plus.bias)


@case(tied={"more.bias": "biased.bias"})
def norm_bias_is_read_elsewhere(m: Torture, x: torch.Tensor) -> Any:
    return m.plus(m.biased(x)) + m.more(x)


@case(either=True, tied={"plus.bias": "biased.bias"})
def norm_bias_is_the_reader_bias(m: Torture, x: torch.Tensor) -> Any:
    return m.plus(m.biased(x))


@case("norm", "biased", slots=True)
def bias_after_another_fold(m: Torture, x: torch.Tensor) -> Any:
    return m.plus(m.biased(x + m.up(m.norm(x))))


@case("biased", "other", slots=False)
def bias_and_weight_of_two_norms(m: Torture, x: torch.Tensor) -> Any:
    w, c = m.plus.weight, m.plus.bias
    flat = m.biased(x)[..., :5].flatten(0, 1)
    return torch.addmm(c, flat, w[:, :5].T).view(x.shape) + m.other(x)[..., 5:] @ w[:, 5:].T


# --- tied embeddings -------------------------------------------------------------------------


@case(tied={"head.weight": "embed.weight"})
def final_norm_tied(m: Torture, x: torch.Tensor) -> Any:
    return m.norm(x)


@case("norm", tied={"head.weight": "embed.weight"}, untie=True)
def final_norm_untied(m: Torture, x: torch.Tensor) -> Any:
    return m.norm(x)


@case("norm", "other", tied={"head.weight": "embed.weight"}, untie=True)
def both_norms_untied(m: Torture, x: torch.Tensor) -> Any:
    return m.other(x + m.up(m.norm(x)))


@case("other", tied={"head.weight": "embed.weight"})
def inner_norm_tied(m: Torture, x: torch.Tensor) -> Any:
    return m.norm(x + m.up(m.other(x)))


@case("norm", tied={"gate.weight": "up.weight", "head.weight": "embed.weight"}, untie=True)
def two_ties_one_cut(m: Torture, x: torch.Tensor) -> Any:
    return m.norm(x + m.up(x) + m.gate(x.sin()))


@case("norm", tied={"gate.weight": "up.weight"})
def readers_tied(m: Torture, x: torch.Tensor) -> Any:
    h = m.norm(x)
    return m.up(h) + m.gate(h).tanh()


@case(tied={"gate.weight": "up.weight"})
def reader_tied_to_another(m: Torture, x: torch.Tensor) -> Any:
    return m.up(m.norm(x)) + m.gate(x)


@case("norm")
def final_norm_own_head(m: Torture, x: torch.Tensor) -> Any:
    return m.norm(x)


@case()
def embedding_as_head_of_a_norm(m: Torture, x: torch.Tensor) -> Any:
    return (m.norm(x) @ m.embed.weight.T).softmax(-1) @ m.embed.weight
