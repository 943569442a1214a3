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
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d)
MOST = 250  # assignments that are tried


@dataclass
class Unit:
    """A layer and what it holds."""

    layer: nn.Module
    name: str
    kind: str  # "norm", "layer" or "bare": parameters of a class of the student's own
    key: str = ""
    zero_bias: bool = False  # a norm follows, which would take the bias away again
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def slot(self) -> list[Any]:
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

    units: dict[nn.Module, Unit] = {}
    for layer in [*met, *layers]:
        if layer not in units:
            units[layer] = _unit(layer, layers[layer])
    _name(list(units.values()), {k: v for k, v in met.items() if v is not None})
    return list(units.values()), error


def _unit(layer: nn.Module, name: str) -> Unit:
    tensors = {role: p for role, p in layer._parameters.items() if p is not None}
    if isinstance(layer, NORMS):
        kind = "norm"
        buffers = layer._buffers.items()
        tensors |= {role: b for role, b in buffers if b is not None and b.is_floating_point()}
    else:
        kind = "layer" if set(layer._parameters) <= {"weight", "bias"} else "bare"
    return Unit(layer, name, kind, tensors=tensors)


def _name(units: list[Unit], follows: dict[nn.Module, nn.Module]) -> None:
    """Give each unit its key; find the biases that norms take away."""
    counts: Counter[str] = Counter()
    keys: dict[nn.Module, str] = {}
    by_layer = {unit.layer: unit for unit in units}
    previous = None
    for unit in units:
        if unit.kind == "norm":
            source = follows.get(unit.layer, previous)
            key = f"norm of {keys.get(source, '')}"
            if source in by_layer and by_layer[source].kind != "norm":
                by_layer[source].zero_bias = True
        else:
            key = str([_shape(tensor) for role, tensor in unit.tensors.items() if role != "bias"])
        counts[key] += 1
        unit.key = keys[unit.layer] = f"{key} {counts[key]}"
        previous = unit.layer


def _shape(tensor: Tensor) -> list[int]:
    """(out, in, 1, 1) of a convolution is (out, in) of a linear layer."""
    shape = list(tensor.shape)
    return shape[:2] if shape[2:] == [1, 1] else shape


def draw(seed: int, slot: list[Any], role: str, zero: bool) -> Tensor:
    """The numbers of one tensor of a slot.

    Biases have both signs and are as large as what they are added to, so that activations are used
    on both sides. With `zero`, zeros and fresh statistics.
    """
    key, kind, zero_bias, shapes = slot
    shape = dict(shapes)[role]
    digest = hashlib.sha256(f"{seed} {key} {role}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    noise = torch.randn(shape, generator=generator)
    if zero:
        return torch.ones(shape) if role == "running_var" else torch.zeros(shape)
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
def fill(units: list[Unit], seed: int, zero: bool = False) -> None:
    """Parameters and running statistics by the rule above."""
    for unit in units:
        slot = unit.slot()
        for role, tensor in unit.tensors.items():
            tensor.copy_(draw(seed, slot, role, zero))
        _fresh(unit)


def _fresh(unit: Unit) -> None:
    if unit.layer._buffers.get("num_batches_tracked") is not None:
        unit.layer._buffers["num_batches_tracked"].zero_()


# ------------------------------------------------------------------------- assignments by shape


@dataclass
class Arrangement:
    """Which slot's numbers go where: whole units, and single tensors."""

    units: list[tuple[Unit, list[Any]]]
    tensors: list[tuple[Tensor, list[Any], str, Callable[[Tensor], Tensor]]]
    rows: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def fill(self, seed: int, zero: bool = False) -> None:
        for unit, slot in self.units:
            for role, tensor in unit.tensors.items():
                tensor.copy_(self.rows(draw(seed, slot, role, zero)).reshape(tensor.shape))
            _fresh(unit)
        for tensor, slot, role, transform in self.tensors:
            tensor.copy_(transform(draw(seed, slot, role, zero)).reshape(tensor.shape))


def arrangements(units: list[Unit], slots: list[list[Any]]) -> Iterator[Arrangement]:
    """All assignments of the reference's `slots` to the submission's `units` that the shapes allow;
    at most `MOST`, the likeliest first.
    """
    mine = _groups(_families(units, lambda unit: unit.key), _outline)
    theirs = _groups(_families(slots, lambda slot: slot[0]), _slot_outline)
    choices: list[list[list[tuple[Unit, list[Any]]]]] = []
    spare_units, spare_slots = [], []
    for outline in sorted(mine.keys() | theirs.keys()):
        ours, wanted = mine.get(outline, []), theirs.get(outline, [])
        if len(ours) == len(wanted):
            choices.append(
                [
                    [pair for a, b in zip(ours, order) for pair in zip(a, b)]
                    for order in _orders(wanted)
                ]
            )
        else:
            spare_units += [unit for family in ours for unit in family]
            spare_slots += [slot for family in wanted for slot in family]
    loose = list(itertools.islice(_loose(spare_units, spare_slots), MOST))
    layouts = list(_layouts(slots)) if not spare_units else [_same]
    count = 0
    for tensors in loose:
        for rows in layouts:
            for combination in itertools.product(*choices):
                yield Arrangement([p for part in combination for p in part], tensors, rows)
                count += 1
                if count == MOST:
                    return


def _groups(things: list, outline: Callable[[Any], str]) -> dict[str, list]:
    groups: dict[str, list] = {}
    for thing in things:
        groups.setdefault(outline(thing), []).append(thing)
    return groups


def _families(things: list, key: Callable[[Any], str]) -> list[list]:
    """Each layer with the norm that follows it: the two stay together."""
    families: dict[str, list] = {}
    for thing in things:
        name = key(thing)
        if name.startswith("norm of "):
            parent = name.removeprefix("norm of ").rpartition(" ")[0]
            if len(families.get(parent, [])) == 1:
                families[parent].append(thing)
                continue
        families[name] = [thing]
    return list(families.values())


def _outline(family: list[Unit]) -> str:
    return _slot_outline([unit.slot() for unit in family])


def _slot_outline(family: list[list[Any]]) -> str:
    return " ".join(
        f"{kind} {sorted((role, _flat(shape)) for role, shape in shapes)}"
        for _, kind, _, shapes in family
    )


def _flat(shape: list[int]) -> tuple[int, ...]:
    """(out, everything else): a convolution over the whole map is a linear layer behind flatten."""
    return tuple(shape) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


def _orders(wanted: list) -> Iterator[list]:
    """All orders of a few; of many the given one and each exchange of two."""
    if len(wanted) <= 4:
        yield from map(list, itertools.permutations(wanted))
        return
    yield list(wanted)
    for i, j in itertools.combinations(range(len(wanted)), 2):
        order = list(wanted)
        order[i], order[j] = order[j], order[i]
        yield order


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _loose(units: list[Unit], slots: list[list[Any]]) -> Iterator[list[tuple]]:
    """Single tensors against single tensors: equal shapes, slices of a larger, all transposed."""
    yield from _slices(units, slots)
    tensors = [t for unit in units for t in unit.tensors.values()]
    mine = _groups(tensors, lambda t: str(_flat(list(t.shape))))
    for transposed in (False, True):
        theirs = _groups(_pieces(slots, mine, transposed), lambda piece: str(piece[0]))
        if any(len(theirs.get(shape, [])) != len(ours) for shape, ours in mine.items()):
            continue
        choices = [
            [
                [(t, slot, role, change) for t, (_, slot, role, change) in zip(ours, order)]
                for order in _orders(theirs[shape])
            ]
            for shape, ours in mine.items()
        ]
        for combination in itertools.product(*choices):
            yield [part for group in combination for part in group]


def _slices(units: list[Unit], slots: list[list[Any]]) -> Iterator[list[tuple]]:
    """Whole layers against slices of a larger one, weight and bias together."""
    sizes = {len(t) for unit in units for t in unit.tensors.values()}
    pieces: list[tuple[str, list[Any], int, int]] = []
    for slot in slots:
        rows = {shape[0] for _, shape in slot[3]}
        size = next((s for s in sorted(sizes) if rows and max(rows) % s == 0), 0)
        if len(rows) != 1 or not size:
            return
        outline = str(sorted((role, (size, *_flat(shape)[1:])) for role, shape in slot[3]))
        pieces += [(outline, slot, i, size) for i in range(0, max(rows), size)]
    theirs = _groups(pieces, lambda piece: piece[0])
    mine = _groups(
        units,
        lambda unit: str(sorted((role, _flat(list(t.shape))) for role, t in unit.tensors.items())),
    )
    if {k: len(v) for k, v in mine.items()} != {k: len(v) for k, v in theirs.items()} or not mine:
        return
    for combination in itertools.product(*([*_orders(theirs[k])] for k in mine)):
        yield [
            (t, slot, role, lambda t, a=first, n=size: t[a : a + n])
            for ours, order in zip(mine.values(), combination)
            for unit, (_, slot, first, size) in zip(ours, order)
            for role, t in unit.tensors.items()
        ]


def _pieces(slots: list[list[Any]], mine: dict[str, list], transposed: bool) -> list[tuple]:
    """What the reference's tensors can be cut into: shape, slot, role, how."""
    pieces: list[tuple] = []
    for slot in slots:
        for role, shape in slot[3]:
            flat = _flat(shape)
            if transposed and len(flat) == 2:
                pieces.append((flat[::-1], slot, role, lambda t: t.flatten(1).T))
                continue
            # Slices: as many as make the shape of one of the submission's.
            parts = next((k for k in (1, 2, 3, 4) if flat[0] % k == 0 and _key(flat, k) in mine), 1)
            size = flat[0] // parts
            pieces += [
                ((size, *flat[1:]), slot, role, lambda t, a=i * size, n=size: t[a : a + n])
                for i in range(parts)
            ]
    return pieces


def _key(flat: tuple[int, ...], parts: int) -> str:
    return str((flat[0] // parts, *flat[1:]))


def _layouts(slots: list[list[Any]]) -> Iterator[Callable[[Tensor], Tensor]]:
    """Ways to lay out queries, keys and values in the rows of one linear layer; else the one."""
    yield _same
    sizes = {
        tuple(shape)
        for _, kind, _, shapes in slots
        for role, shape in shapes
        if kind == "layer" and role == "weight" and len(shape) == 2 and shape[0] == 3 * shape[1]
    }
    for rows, width in sizes:
        numbers = torch.arange(rows)
        seen = {tuple(numbers.tolist())}
        for heads in [h for h in range(1, width + 1) if width % h == 0]:
            for first in itertools.permutations(range(3)):
                cube = numbers.view(3, heads, width // heads)[list(first)]
                for axes in itertools.permutations(range(3)):
                    order = cube.permute(axes).flatten()
                    if tuple(order.tolist()) not in seen:
                        seen.add(tuple(order.tolist()))
                        yield lambda t, n=rows, o=order: t[o] if len(t) == n else t
