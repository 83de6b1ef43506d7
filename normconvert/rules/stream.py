"""Residual streams: what LayerNorms read, traced back to everything that writes it.

A stream is *convertible* if all its summands can be given mean zero: then its LayerNorms are
RMSNorms (arXiv 2305.14858, section 3). A summand that is a tensor of the checkpoint is centered
by its weights. Any other one needs an explicit recentering, at a place where the model can be
changed: behind a module or in front of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field

from normconvert.ir.graph import Graph, Norm
from normconvert.ir.native import Recentering
from normconvert.rules.draft import Obstacle
from normconvert.rules.origins import Origins
from normconvert.rules.places import entrance, places, unseen_writers
from normconvert.rules.scaling import Stop
from normconvert.rules.shift import KNOWN, Shift, Shifts, obstacles


@dataclass(frozen=True, slots=True)
class Writer:
    """A tensor that writes to the stream along its `axis`; `over` is a LayerScale behind it."""

    axis: int
    over: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """The LayerNorms that read one stream, and how it gets mean zero, or why it cannot.

    `writers` by the name of the tensor; `copies` maps the name of a new tensor, which a tied
    parameter needs for itself, to the tensor that it has been sharing.
    """

    norms: tuple[Norm, ...]
    size: int
    writers: Mapping[str, Writer] = field(default_factory=dict)
    recenterings: tuple[Recentering, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    obstacle: Obstacle | None = None


@dataclass(slots=True)
class _Reach:
    """What lies behind the norms of one stream: its values, and those that no sum explains."""

    values: dict[int, Shift] = field(default_factory=dict)
    ends: dict[int, Shift] = field(default_factory=dict)


def find_streams(
    graph: Graph, origins: Origins, *, untie: bool, recenter: bool
) -> tuple[Stream, ...]:
    """Every stream that LayerNorms read, in the order of the model.

    With `untie`, a tied parameter may get its own copy; with `recenter`, a module may be put
    into the model.
    """
    return _Finder(graph, origins, untie, recenter).streams()


class _Finder:
    def __init__(self, graph: Graph, origins: Origins, untie: bool, recenter: bool) -> None:
        self._graph, self._origins = graph, origins
        self._untie, self._recenter = untie, recenter
        self._shifts = Shifts(graph, origins)
        self._places = places(graph)
        self._at: dict[Recentering, set[int]] = {}
        for value, found in self._places.items():
            for place in found:
                self._at.setdefault(place, set()).add(value)
        self._minded: dict[tuple[int, Shift], Stop | None] = {}
        self._minded_untied: dict[tuple[int, Shift], Stop | None] = {}

    def streams(self) -> tuple[Stream, ...]:
        seeds = {norm.module: self._inputs(norm) for norm in self._graph.norms}
        layer_norms = [norm for norm in self._graph.norms if norm.kind == "layernorm"]
        groups = self._grouped([(norm, seeds[norm.module]) for norm in layer_norms])
        reaches = [self._reach(_merged(seeds[norm.module] for norm in group)) for group in groups]
        ends: dict[int, Shift] = {}
        conflicts: set[int] = set()
        for reach in reaches:
            for value, shift in reach.ends.items():
                if ends.setdefault(value, shift) != shift:
                    conflicts.add(value)
        self._minded = obstacles(self._graph, self._shifts, ends)
        if self._untie:
            aliases = {self._graph.parameter_values[tie.parameter] for tie in self._graph.ties}
            self._minded_untied = obstacles(self._graph, self._shifts, ends, cut=aliases)
        return tuple(
            self._stream(group, _merged(seeds[norm.module] for norm in group), reach, conflicts)
            for group, reach in zip(groups, reaches, strict=True)
        )

    def _inputs(self, norm: Norm) -> dict[int, Shift]:
        """What the calls of `norm` read."""
        nodes = self._graph.norm_calls[norm.module]
        values = (node.inputs[0] for node in nodes)
        return {value: Shift(len(self._graph.values[value].shape) - 1) for value in values}

    def _grouped(self, seeds: list[tuple[Norm, dict[int, Shift]]]) -> list[list[Norm]]:
        """The norms by stream: those that have a value behind them in common, tensors aside."""
        owner: dict[int, int] = {}
        groups: list[list[Norm]] = []
        for norm, starts in seeds:
            met: set[int] = set()
            group = len(groups)
            groups.append([norm])
            waiting = list(starts.items())
            while waiting:
                value, shift = waiting.pop()
                if value in owner:
                    met.add(owner[value])
                    continue
                if value in self._graph.leaf_names:
                    continue
                owner[value] = group
                waiting += (self._shifts.summands(value, shift) or {}).items()
            for other in sorted(met - {group}):
                groups[group] = groups[other] + groups[group]
                groups[other] = []
                owner.update({value: group for value, at in owner.items() if at == other})
        return [group for group in groups if group]

    def _reach(self, seeds: Mapping[int, Shift], stop_at: Set[int] = frozenset()) -> _Reach:
        """Everything that `seeds` are sums of, back to `stop_at`."""
        reach = _Reach()
        waiting = list(seeds.items())
        while waiting:
            value, shift = waiting.pop()
            known = reach.values.get(value)
            if known is not None:
                if known != shift:  # needed along two axes at once: explain it by neither
                    reach.ends[value] = known
                continue
            reach.values[value] = shift
            if value in stop_at:
                continue
            summands = self._shifts.summands(value, shift)
            if summands is None:
                reach.ends[value] = shift
            else:
                waiting += summands.items()
        return reach

    def _stream(
        self, norms: list[Norm], seeds: dict[int, Shift], reach: _Reach, conflicts: Set[int]
    ) -> Stream:
        first = next(iter(seeds))
        size = self._graph.values[first].shape[-1]
        assert isinstance(size, int)
        stream = Stream(norms=tuple(norms), size=size)
        blocked = self._blocked(reach, conflicts)
        unseen = unseen_writers(self._graph, [norm.module for norm in norms], size)
        chosen: dict[int, Recentering] = {}
        if blocked or unseen:
            found = (
                self._shut(norms, seeds, reach, unseen, conflicts)
                if unseen
                else self._recentered(seeds, reach, blocked, conflicts)
            )
            if isinstance(found, Obstacle):
                return _refused(stream, found)
            chosen = found
            if len(set(chosen.values())) >= len(norms):
                what = next(iter(chosen.values())).module
                return _refused(
                    stream,
                    Obstacle(f"recentering what {what} writes would cost as much as it saves"),
                )
            reach = self._reach(seeds, frozenset(chosen))
        writers: dict[str, Writer] = {}
        copies: dict[str, str] = {}
        for value, shift in reach.ends.items():
            tensor = self._graph.leaf_names[value]
            writers[tensor] = Writer(shift.axis, shift.over)
            copies.update(self._copies(value, shift) or {})
        return Stream(
            norms=tuple(norms),
            size=size,
            writers=writers,
            recenterings=tuple(dict.fromkeys(chosen.values())),
            copies=copies,
        )

    def _blocked(self, reach: _Reach, conflicts: Set[int]) -> dict[int, Obstacle]:
        """The ends that no edit of a tensor can center, each with the reason."""
        blocked: dict[int, Obstacle] = {}
        for value, shift in sorted(reach.ends.items(), key=lambda end: self._pass_of(end[0])):
            if reason := self._why_blocked(value, shift, conflicts):
                blocked[value] = Obstacle(reason, unknown=self._is_unknown(value, shift))
        return blocked

    def _pass_of(self, value: int) -> int:
        position = self._graph.producers.get(value)
        return 0 if position is None else self._graph.pass_of(position)

    def _is_unknown(self, value: int, shift: Shift) -> bool:
        """Whether the operation that makes `value`, or one that reads it, is new here."""
        if value not in self._graph.leaf_names:
            position = self._graph.producers.get(value)
            return position is not None and self._graph.nodes[position].op not in KNOWN
        stop = self._minded.get((value, shift))
        return stop is not None and stop.unknown

    def _why_blocked(self, value: int, shift: Shift, conflicts: Set[int]) -> str | None:
        graph = self._graph
        tensor = graph.leaf_names.get(value)
        if tensor is None:
            return f"{self._origin(value)} writes to its stream, which no weight can center"
        if value in conflicts:
            return f"{tensor} writes to its stream along two axes"
        if shift.over is not None and (where := self._read_elsewhere(shift.over)):
            return f"{shift.over} is also read by {where}"
        stop = self._minded[value, shift]
        if stop is None or self._copies(value, shift) is not None:
            return None
        tie = next((tie for tie in graph.ties if self._alias(tie.parameter, value)), None)
        if tie is not None and tie.tensor is not None and not self._untie:
            return (
                f"{tensor} writes to its stream and is tied to {tie.parameter}; give --tied untie"
            )
        return f"{tensor} writes to its stream and cannot be centered: {stop.reason}"

    def _origin(self, value: int) -> str:
        position = self._graph.producers.get(value)
        if position is None:
            return "a constant"
        node = self._graph.nodes[position]
        if node.op == "norm":
            return f"the norm {node.module}"
        return f"{node.op} in {self._graph.where(position)}"

    def _read_elsewhere(self, vector: str) -> str | None:
        """Where a LayerScale vector is read besides one multiplication in each pass."""
        graph, readers = self._graph, dict[int, int]()
        scaled = {value for value, shift in self._minded if shift.over == vector}
        waiting = [graph.leaf_values[vector]]
        while waiting:
            for position in graph.live_consumers.get(waiting.pop(), ()):
                node = graph.nodes[position]
                if node.op == "mul" and not scaled.isdisjoint(node.inputs):
                    if readers.setdefault(graph.pass_of(position), position) != position:
                        return graph.where(position)
                elif len(node.outputs) == 1 and self._origins.tensor(node.outputs[0]) == vector:
                    waiting += node.outputs
                else:
                    return graph.where(position)
        return None

    def _alias(self, parameter: str, leaf: int) -> bool:
        """Whether a tied parameter is the tensor `leaf` by another name."""
        value = self._graph.parameter_values[parameter]
        return self._origins.tensor(value) == self._graph.leaf_names[leaf]

    def _copies(self, value: int, shift: Shift) -> dict[str, str] | None:
        """The new tensors with which the leaf `value` can be centered; none if it needs none.

        None if it cannot be centered, or only by cutting a tie that is to be kept.
        """
        if self._minded[value, shift] is None:
            return {}
        if not self._untie or self._minded_untied[value, shift] is not None:
            return None
        copies: dict[str, str] = {}
        for tie in self._graph.ties:
            alias = self._graph.parameter_values[tie.parameter]
            if self._minded.get((alias, shift)) is None:
                continue
            if tie.tensor is None or tie.stored:
                return None
            copies[tie.tensor] = self._graph.leaf_names[value]
        return copies

    def _recentered(
        self,
        seeds: dict[int, Shift],
        reach: _Reach,
        blocked: Mapping[int, Obstacle],
        conflicts: Set[int],
    ) -> dict[int, Recentering] | Obstacle:
        """Where to recenter so that nothing blocked is left: one place if possible."""
        if not self._recenter or not any(self._goes_on(*each) for each in reach.values.items()):
            return next(iter(blocked.values()))
        legal = self._legal(reach)
        for place, values in legal.items():
            rest = self._reach(seeds, values)
            if not self._blocked(rest, conflicts) and values <= rest.values.keys():
                return dict.fromkeys(values, place)
        several: dict[int, Recentering] = {}
        while True:
            rest = self._reach(seeds, set(several))
            left = self._blocked(rest, conflicts)
            if not left:
                return several
            value, why = next(iter(left.items()))
            nearest = self._nearest(value, rest, legal)
            if nearest is None or not several.keys().isdisjoint(legal[nearest]):
                stop = self._minded.get((value, rest.values[value]))
                return (
                    Obstacle(stop.reason, unknown=stop.unknown)
                    if stop and value not in self._graph.leaf_names
                    else why
                )
            several |= dict.fromkeys(legal[nearest], nearest)

    def _shut(
        self,
        norms: list[Norm],
        seeds: dict[int, Shift],
        reach: _Reach,
        unseen: tuple[str, ...],
        conflicts: Set[int],
    ) -> dict[int, Recentering] | Obstacle:
        """Where to recenter so that whatever `unseen` writes, on another input, has mean zero too.

        That is the one input of a module which has all of `norms` in it and none of `unseen`.
        """
        obstacle = Obstacle(
            f"{unseen[0]}, which was not read in the trace, may write to its stream"
        )
        if not self._recenter:
            return obstacle
        for value, shift in reach.values.items():
            place = entrance(self._graph, value, [norm.module for norm in norms], unseen)
            if place is None or not self._movable(value, shift):
                continue
            values = {
                given
                for call in self._graph.calls
                for key, given in call.inputs
                if (call.module, f"input {key}") == (place.module, place.at)
            }
            if not all(v in reach.values and self._movable(v, reach.values[v]) for v in values):
                continue
            left = self._blocked(self._reach(seeds, values), conflicts)
            return next(iter(left.values())) if left else dict.fromkeys(values, place)
        return obstacle

    def _legal(self, reach: _Reach) -> dict[Recentering, set[int]]:
        """Where to recenter is legal, in order, and the values that are there in all the passes."""
        order = sorted(reach.values, key=lambda value: self._graph.producers.get(value, -1))
        found = dict.fromkeys(place for value in order for place in self._places.get(value, ()))
        movable = {value for value in order if self._movable(value, reach.values[value])}
        return {place: self._at[place] for place in found if self._at[place] <= movable}

    def _goes_on(self, value: int, shift: Shift) -> bool:
        """Whether a LayerNorm reads `value` and it is passed on as well: a residual stream.

        Elsewhere, as on queries and keys, recentering would only take a LayerNorm in two.
        """
        absorbed = passed = False
        for position in self._graph.live_consumers.get(value, ()):
            for operand, each in enumerate(self._graph.nodes[position].inputs):
                if each == value:
                    absorbs = self._shifts.absorbs(position, operand, shift)
                    absorbed |= absorbs
                    passed |= not absorbs and bool(self._shifts.through(position, operand, shift))
        return absorbed and passed

    def _nearest(
        self, value: int, reach: _Reach, legal: Mapping[Recentering, set[int]]
    ) -> Recentering | None:
        """The first place on the way from `value` into the stream."""
        waiting, seen = [value], {value}
        while waiting:
            current = waiting.pop(0)
            at = next((place for place, values in legal.items() if current in values), None)
            if at is not None:
                return at
            for position in self._graph.live_consumers.get(current, ()):
                for output in self._graph.nodes[position].outputs:
                    if output in reach.values and output not in seen:
                        seen.add(output)
                        waiting.append(output)
        return None

    def _movable(self, value: int, shift: Shift) -> bool:
        """Whether nothing minds if `value` is shifted, by one number along its last axis."""
        minded = self._minded.get((value, shift), _UNKNOWN) is not None
        last = shift.axis == len(self._graph.values[value].shape) - 1
        return shift.over is None and not minded and last


_UNKNOWN = Stop(-1, "it was not followed")


def _merged(parts: Iterable[dict[int, Shift]]) -> dict[int, Shift]:
    return {value: shift for part in parts for value, shift in part.items()}


def _refused(stream: Stream, obstacle: Obstacle) -> Stream:
    return Stream(norms=stream.norms, size=stream.size, obstacle=obstacle)
