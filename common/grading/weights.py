"""Fill two modules with the same numbers, whatever their layers are called.

A layer's numbers follow from the seed, its kind and shape, and how many of its like ran before. A
norm is known by the layer that it follows, so two branches may run in either order. Where that rule
gives a submission other numbers than the reference, `arrangements` tries every assignment that the
shapes allow: branches in another order, one linear layer in place of three, bare parameters.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d)
MOST = 250  # assignments that are tried

Slot = list[Any]  # a layer as plain data: key, kind, zero_bias, [[role, shape], ...]
Rows = Callable[[Tensor], Tensor]
Outline = tuple[tuple[str, tuple[int, ...]], ...]  # of each role the shape, as a matrix
# A tensor, and where its numbers come from: a slot, the role in it, and what is done with them.
Source = tuple[Tensor, Slot, str, Rows]


@dataclass
class Unit:
    """A layer and what it holds."""

    layer: nn.Module
    name: str
    kind: str  # "norm", "layer" or "bare": parameters of a class of the student's own
    tensors: dict[str, Tensor] = field(default_factory=dict)
    key: str = ""
    zero_bias: bool = False  # a norm follows, which would take the bias away again

    def parts(self, rows: int) -> list[Unit]:
        """The layer cut into such of so many rows; itself, where they don't fit."""
        height, *others = {len(t) if t.dim() else 1 for t in self.tensors.values()} or {1}
        if others or height % rows:
            return [self]
        cuts = {role: t.detach().split(rows) for role, t in self.tensors.items()}
        return [replace(self, tensors=dict(zip(cuts, part))) for part in zip(*cuts.values())]

    def slot(self) -> Slot:
        """As plain data, from which `draw` makes the same numbers."""
        shapes = [[role, list(tensor.shape)] for role, tensor in self.tensors.items()]
        return [self.key, self.kind, self.zero_bias, shapes]


def layers_of(module: nn.Module) -> dict[nn.Module, str]:
    """Layer -> its name, for the layers that hold parameters, as they were registered."""
    return {
        layer: name or "(the module itself)"
        for name, layer in module.named_modules()
        if layer._parameters or isinstance(layer, NORMS)
    }


def units_of(
    module: nn.Module, forward: Callable[[], list[Tensor]]
) -> tuple[list[Unit], Exception | None]:
    """The layers as a forward pass meets them, and behind them those that it doesn't; and its
    error, if it fails.
    """
    layers = layers_of(module)
    made: dict[int, nn.Module] = {}  # id of a tensor -> the layer that made it
    kept: list[Tensor] = []  # so that no id is used twice
    met: dict[nn.Module, nn.Module | None] = {}  # layer -> the one that it directly follows

    def before(layer: nn.Module, inputs: tuple) -> None:
        met.setdefault(layer, made.get(id(inputs[0])) if inputs else None)

    def after(layer: nn.Module, _: tuple, output: object) -> None:
        if isinstance(output, Tensor):
            made[id(output)] = layer
            kept.append(output)

    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    module.eval()
    error = None
    try:
        forward()
    except Exception as failure:
        error = failure
    for hook in hooks:
        hook.remove()
    units = {layer: _unit(layer, layers[layer]) for layer in dict.fromkeys([*met, *layers])}
    _name(units, met)
    return list(units.values()), error


def _unit(layer: nn.Module, name: str) -> Unit:
    tensors = {role: p for role, p in layer._parameters.items() if p is not None}
    kind = "layer" if set(layer._parameters) <= {"weight", "bias"} else "bare"
    if isinstance(layer, NORMS):
        kind, buffers = "norm", layer._buffers.items()
        tensors |= {role: b for role, b in buffers if b is not None and b.is_floating_point()}
    return Unit(layer, name, kind, tensors)


def _name(units: dict[nn.Module, Unit], met: dict[nn.Module, nn.Module | None]) -> None:
    """Give each unit its key; find the biases that norms take away."""
    counts: Counter[str] = Counter()
    previous = None
    for layer, unit in units.items():
        if unit.kind == "norm":
            source = units.get(met.get(layer)) or units.get(previous)
            key = f"norm of {source.key if source else ''}"
            if source and source.kind != "norm":
                source.zero_bias = True
        else:
            key = str([_shape(tensor) for role, tensor in unit.tensors.items() if role != "bias"])
        counts[key] += 1
        unit.key = f"{key} {counts[key]}"
        previous = layer


def _shape(tensor: Tensor) -> list[int]:
    """(out, in, 1, 1) of a convolution is (out, in) of a linear layer."""
    shape = list(tensor.shape)
    return shape[:2] if shape[2:] == [1, 1] else shape


def draw(seed: int, slot: Slot, role: str, zero: bool) -> Tensor:
    """The numbers of one tensor of a slot.

    Biases have both signs and are as large as what they are added to, so that activations are used
    on both sides. With `zero`, zeros and fresh statistics.
    """
    key, kind, zero_bias, shapes = slot
    shape = dict(shapes)[role]
    if zero:
        return torch.ones(shape) if role == "running_var" else torch.zeros(shape)
    digest = hashlib.sha256(f"{seed} {key} {role}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    noise = torch.randn(shape, generator=generator)
    if kind == "norm":
        if role == "weight":
            return 1 + 0.3 * noise.clamp(-2, 2)
        return (0.5 * noise).exp() if role == "running_var" else 0.3 * noise
    if role == "bias" and zero_bias:
        return torch.zeros(shape)
    if len(shape) > 1:
        return noise * (2 / max(1, math.prod(shape[1:]))) ** 0.5
    return 0.5 * noise


@torch.no_grad()
def fill(sources: list[Source], seed: int, zero: bool = False) -> None:
    """Parameters and running statistics."""
    for tensor, slot, role, change in sources:
        tensor.copy_(change(draw(seed, slot, role, zero)).reshape(tensor.shape))


def by_rule(units: list[Unit]) -> list[Source]:
    """Each layer's numbers are its own."""
    return _whole(((unit, unit.slot()) for unit in units), _same)


def _whole(pairs: Iterable[tuple[Unit, Slot]], rows: Rows) -> list[Source]:
    return [
        (tensor, slot, role, rows) for unit, slot in pairs for role, tensor in unit.tensors.items()
    ]


def _same(tensor: Tensor) -> Tensor:
    return tensor


# ------------------------------------------------------------------------- assignments by shape


def arrangements(units: list[Unit], slots: list[Slot]) -> Iterator[list[Source]]:
    """All assignments of the reference's `slots` to the submission's `units` that the shapes allow;
    the likeliest first, and far too many of them: see `MOST`.
    """
    mine = _families([(unit.slot(), unit) for unit in units])
    theirs = _families([(slot, slot) for slot in slots])
    spare: tuple[list[Unit], list[Slot]] = [], []
    for outline in sorted(mine.keys() | theirs.keys()):
        if len(mine[outline]) != len(theirs[outline]):
            spare[0].extend(itertools.chain(*mine.pop(outline)))
            spare[1].extend(itertools.chain(*theirs.pop(outline)))
    for chosen, order in zip(spare, (units, slots)):  # as they ran
        places = {id(thing): i for i, thing in enumerate(order)}
        chosen.sort(key=lambda thing: places[id(thing)])
    layouts = [_same] if spare[0] else list(_layouts(slots))
    for loose in itertools.islice(_loose(*spare), MOST):
        for rows in layouts:
            for pairing in _pairings(mine, theirs):
                pairs = (pair for ours, wanted in pairing for pair in zip(ours, wanted))
                yield _whole(pairs, rows) + loose


def _pairings(
    mine: dict[Hashable, list], theirs: dict[Hashable, list]
) -> Iterator[list[tuple[Any, Any]]]:
    """All ways to pair what has the same key; none, where one side has more of it."""
    if all(len(theirs.get(key, ())) == len(ours) for key, ours in mine.items()):
        for orders in itertools.product(*(_orders(theirs[key]) for key in mine)):
            yield [pair for ours, order in zip(mine.values(), orders) for pair in zip(ours, order)]


def _orders(wanted: list) -> Iterator[list]:
    """All orders of a few; of many the given one, those of queries, keys and values head by head,
    and each exchange of two.
    """
    if len(wanted) <= 4:
        yield from map(list, itertools.permutations(wanted))
        return
    yield list(wanted)
    if len(wanted) % 3 == 0:
        each = len(wanted) // 3
        for thirds in itertools.permutations([wanted[i : i + each] for i in (0, each, 2 * each)]):
            yield [thing for of_a_head in zip(*thirds) for thing in of_a_head]
    for i, j in itertools.combinations(range(len(wanted)), 2):
        order = list(wanted)
        order[i], order[j] = order[j], order[i]
        yield order


def _groups(pairs: Iterable[tuple[Hashable, Any]]) -> defaultdict[Hashable, list]:
    """Key -> what comes with it."""
    groups: defaultdict[Hashable, list] = defaultdict(list)
    for key, thing in pairs:
        groups[key].append(thing)
    return groups


def _families(things: list[tuple[Slot, Any]]) -> defaultdict[Hashable, list[list]]:
    """Each layer with the norm that follows it, by what they hold: the two stay together."""
    families: dict[str, list[tuple[Slot, Any]]] = {}
    for slot, thing in things:
        name = slot[0]
        parent = name.removeprefix("norm of ").rpartition(" ")[0]
        if name.startswith("norm of ") and len(families.get(parent, ())) == 1:
            families[parent].append((slot, thing))
        else:
            families[name] = [(slot, thing)]
    return _groups(
        (str([(slot[1], _outline(slot)) for slot, _ in family]), [thing for _, thing in family])
        for family in families.values()
    )


def _outline(slot: Slot) -> Outline:
    return tuple(sorted((role, _flat(shape)) for role, shape in slot[3]))


def _flat(shape: list[int]) -> tuple[int, ...]:
    """(out, everything else): a convolution over the whole map is a linear layer behind flatten."""
    return tuple(shape) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


def _loose(units: list[Unit], slots: list[Slot]) -> Iterator[list[Source]]:
    """Layers, or their parts as high as the lowest, against slices of larger ones, weight and bias
    together; then single tensors against single tensors: equal shapes, slices of a larger, all
    transposed.
    """
    if not units:
        yield []
        return
    low = min((len(t) for unit in units for t in unit.tensors.values() if t.dim()), default=0) or 1
    parts = [part for unit in units for part in unit.parts(low)]
    for pieces in (units, parts) if len(parts) > len(units) else (units,):
        layers = _groups((_outline(unit.slot()), unit) for unit in pieces)
        cuts = ((key, (slot, rows)) for slot in slots for key, rows in _cut(_outline(slot), layers))
        for pairing in _pairings(layers, _groups(cuts)):
            yield [s for unit, (slot, rows) in pairing for s in _whole([(unit, slot)], rows)]
    # By role, as in an outline, so that a norm's four tensors of one shape meet their like.
    mine = [t for unit in units for _, t in sorted(unit.tensors.items())]
    tensors = _groups(((("", _flat(t.shape)),), t) for t in mine)
    for transposed in (False, True):
        pieces = (
            (key, (slot, role, rows))
            for slot in slots
            for role, flat in _outline(slot)
            for key, rows in _cut((("", flat),), tensors, transposed)
        )
        for pairing in _pairings(tensors, _groups(pieces)):
            yield [(t, *source) for t, source in pairing]


def _cut(
    outline: Outline, mine: dict[Outline, list], transposed: bool = False
) -> Iterator[tuple[Outline, Rows]]:
    """What is to be had of a layer or a tensor: slices, as many as make one of the submission's."""
    if transposed and len(outline[0][1]) == 2:
        ((role, flat),) = outline
        yield ((role, flat[::-1]),), lambda t: t.flatten(1).T
        return
    for parts in range(1, max((flat[0] for _, flat in outline), default=0) + 1):
        key = tuple((role, (flat[0] // parts, *flat[1:])) for role, flat in outline)
        if key in mine and all(flat[0] % parts == 0 for _, flat in outline):
            break
    else:
        parts, key = 1, outline
    for i in range(parts):
        yield key, lambda t, n=parts, i=i: t.tensor_split(n)[i]


def _layouts(slots: list[Slot]) -> Iterator[Rows]:
    """Ways to lay out queries, keys and values in the rows of one linear layer; else the one."""
    yield _same
    sizes = {
        tuple(shape)
        for _, kind, _, shapes in slots
        for role, shape in shapes
        if kind == "layer" and role == "weight" and len(shape) == 2 and shape[0] == 3 * shape[1]
    }
    for rows, width in sizes:
        numbers, orders = torch.arange(rows), list(itertools.permutations(range(3)))
        seen = {tuple(numbers.tolist())}
        divisors = [heads for heads in range(1, width + 1) if width % heads == 0]
        for heads, first, axes in itertools.product(divisors, orders, orders):
            cube = numbers.view(3, heads, width // heads)[list(first)]
            order = cube.permute(axes).flatten()
            if tuple(order.tolist()) not in seen:
                seen.add(tuple(order.tolist()))
                yield lambda t, n=rows, o=order: t[o] if len(t) == n else t
