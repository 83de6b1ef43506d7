"""Where a model's weights are while it runs: in memory, on devices, or read from disk each time."""

from __future__ import annotations

import ctypes
import math
import resource
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias

import psutil
import torch
from accelerate.utils import convert_file_size_to_int
from torch.utils._python_dispatch import _disable_current_modes

from normconvert.errors import VerificationError, first_line
from normconvert.torch_dtypes import TORCH_DTYPE

if TYPE_CHECKING:
    from normconvert.source import Checkpoint

Weight: TypeAlias = "Callable[[str, torch.Tensor], torch.Tensor]"
"""What a weight of this name, given as it is, is to be instead."""

_CGROUPS, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_SHARE = 0.6
"""Of the free memory, for weights: the rest is for what is being computed."""
_IN_USE = 3
"""The largest weights that are in memory besides, as they are read and used: mostly the head."""
_give_back = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
"""glibc keeps most of what was freed, hundreds of megabytes where weights come and go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A device map and memory limits as `from_pretrained` takes them; by default all in memory.

    `max_memory` maps "cpu" and numbers of devices to bytes or sizes such as "8GiB".
    """

    device_map: str | Mapping[str, str] | None = None
    max_memory: Mapping[Any, int | str] | None = None


IN_MEMORY = Placement()
_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def place(
    device_map: str | Mapping[str, str] | None, max_memory: Mapping[Any, int | str] | None
) -> Placement:
    """The placement of a `device_map` and memory limits: with the latter alone, "auto".

    Raises:
        VerificationError: there is no such device here, or a limit is no size.
    """
    if isinstance(device_map, str) and device_map not in _MAPS:
        require_device(device_map)
    try:
        for size in (max_memory or {}).values():
            convert_file_size_to_int(size)
    except ValueError as error:
        raise VerificationError(
            f"The memory limit {size!r} is no size; write one such as 8GiB."
        ) from error
    return Placement(
        device_map=device_map or ("auto" if max_memory else None), max_memory=max_memory or None
    )


def require_device(name: str) -> None:
    """Refuse what is no device, or none of this machine.

    Raises:
        VerificationError: no tensor can be put on it.
    """
    remedy = "give a device such as cpu or cuda:0, or the device map auto"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise VerificationError(f"{name!r} is no device; {remedy}.") from error
    try:
        torch.empty(0, device=device)
    except Exception as error:  # torch raises what the device's own library does
        raise VerificationError(
            f"No model can be put on {name!r} ({first_line(error)}); {remedy}."
        ) from error


def choose(
    checkpoint: Checkpoint, asked: str | None, placement: Placement
) -> tuple[torch.dtype, Placement]:
    """The dtype to compute in, unless one is asked for, and where the weights are to be.

    The next wider dtype than the weights' (float32 for 16 bits, else float64), in which the
    rounding of activations does not hide that of the weights; if the model fits into memory in its
    own alone, that one.
    """
    stored = main_dtype(checkpoint)
    wider = torch.float64 if stored.itemsize >= 4 else torch.float32
    counts = [math.prod(tensor.shape) for tensor in checkpoint.tensors.values()]
    dtypes = [getattr(torch, asked)] if asked else [wider, stored]
    if placement != IN_MEMORY:
        return dtypes[0], placement
    free = free_memory()
    for dtype in dtypes:
        if (sum(counts) + _IN_USE * max(counts)) * dtype.itemsize <= free:
            return dtype, IN_MEMORY
    kept = free * _SHARE - _IN_USE * max(counts) * dtypes[0].itemsize
    return dtypes[0], Placement(device_map="auto", max_memory={"cpu": max(0, int(kept))})


def main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating dtype that most of the checkpoint's bytes are stored in."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in checkpoint.tensors.values():
        if TORCH_DTYPE[tensor.dtype].is_floating_point:
            sizes[TORCH_DTYPE[tensor.dtype]] += tensor.nbytes
    if not sizes:
        raise VerificationError(f"{checkpoint.folder} has no floating-point weights to compare.")
    return sizes.most_common(1)[0][0]


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, its control group and its limits."""
    used = psutil.Process().memory_info()
    found = [psutil.virtual_memory().available]
    found += [limit - used.rss for limit in _cgroup_limits()]
    limit_of_addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit_of_addresses != resource.RLIM_INFINITY:
        found.append(limit_of_addresses - used.vms)
    return max(0, int(min(found)))


def _cgroup_limits() -> Iterator[int]:
    """The limits in bytes of the control groups that this process is in, one within the other."""
    lines = _OWN_CGROUP.read_text().splitlines() if _OWN_CGROUP.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # of version 2, which has one tree for all
            place, name = _CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            place, name = _CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        own = PurePosixPath(path)
        for group in (own, *own.parents):
            file = place / group.relative_to("/") / name
            limit = file.read_text().strip() if file.is_file() else ""
            if limit.isdigit():
                yield int(limit)


def input_device(model: Any) -> torch.device:
    """The device that the inputs of `model` belong on."""
    places = getattr(model, "hf_device_map", {"": model.device}).values()
    return torch.device(next((each for each in places if each not in ("cpu", "disk")), "cpu"))


def on_disk(model: Any) -> bool:
    """Whether each run of `model` reads some of its weights from disk."""
    return "disk" in getattr(model, "hf_device_map", {}).values()


def weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and every buffer that is stored, one after the other; shared ones again."""
    known: Mapping[str, torch.Tensor] = next((each.dataset for each in _offloaded(model)), {})
    for name, tensor in _tensors(model).items():
        yield name, known[name] if tensor.is_meta else tensor.detach()


def shapes(model: Any) -> dict[str, torch.Size]:
    """The shape of each of `weights(model)`."""
    return {name: tensor.shape for name, tensor in _tensors(model).items()}


def replace_weights(model: Any, names: tuple[str, ...], weight: Weight) -> None:
    """Put `weight` into the place of the `names` in `model`, each on its own even if it is tied."""
    known = _tensors(model)
    for name in names:
        if known[name].is_meta:
            continue
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        value = weight(name, known[name].detach())
        if attribute in module._parameters:
            setattr(module, attribute, torch.nn.Parameter(value, requires_grad=False))
        else:
            setattr(module, attribute, value)
    for each in _offloaded(model):
        each.dataset = _Read(each.dataset, frozenset(names), weight)


def read_plainly(model: Any) -> None:
    """Let the weights that `model` reads from disk be read whatever mode it runs in."""
    replace_weights(model, (), lambda _, tensor: tensor)


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    stored = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in stored}
    return {**dict(model.named_parameters(remove_duplicate=False)), **buffers}


def _offloaded(model: Any) -> list[Any]:
    """The views that accelerate's hooks have of all weights that are not where they are used."""
    found = []
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        views = (getattr(each, "weights_map", None) for each in getattr(hook, "hooks", (hook,)))
        found += [view for view in views if view is not None]
    return found


class _Read(Mapping[str, torch.Tensor]):
    """Weights as they are on disk, some of them replaced, without regard to any active mode."""

    def __init__(
        self, known: Mapping[str, torch.Tensor], names: frozenset[str], weight: Weight
    ) -> None:
        self._known, self._names, self._weight = known, names, weight

    def __getitem__(self, name: str) -> torch.Tensor:
        _give_back(0)
        with _disable_current_modes():
            value = self._known[name]
            return self._weight(name, value) if name in self._names else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)
