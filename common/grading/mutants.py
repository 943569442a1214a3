"""Known mistakes, made on purpose: the reference with one step left out, exchanged or moved.

A forward pass is a list of calls: convolution, norm, ReLU, sum. Under `Watch` some of them are
done differently. What comes out is what a student's network gives who made that mistake, so that a
wrong output can be named: "the last ReLU is missing". Nothing here knows the exercises.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Change = Callable[[Callable, tuple, dict], Any]  # what is done in place of a call
Mistake = tuple[str, dict[int, Change]]  # in words, and by number of the call

ACTIVATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "relu": ("ReLU", torch.relu),
    "hardtanh": ("ReLU6", F.relu6),
    "sigmoid": ("sigmoid", torch.sigmoid),
    "hardsigmoid": ("hard sigmoid", F.hardsigmoid),
    "hardswish": ("h-swish", F.hardswish),
    "silu": ("SiLU", F.silu),
    "gelu": ("GELU", F.gelu),
    "tanh": ("tanh", torch.tanh),
    "softmax": ("softmax", lambda x: x.softmax(1 if x.dim() == 4 else -1)),
    "leaky_relu": ("leaky ReLU", F.leaky_relu),
    "elu": ("ELU", F.elu),
}
_NORMS = ("batch_norm", "layer_norm", "group_norm")
_POOLS = ("max_pool2d", "avg_pool2d")
_ATTENTION = "scaled_dot_product_attention"
_WORDS = {
    **{kind: word for kind, (word, _) in ACTIVATIONS.items()},
    "batch_norm": "BatchNorm", "layer_norm": "LayerNorm", "group_norm": "GroupNorm",
    "conv2d": "convolution", "linear": "linear layer", "add": "sum", "mul": "product",
    "max_pool2d": "max pool", "avg_pool2d": "avg pool", "mean": "mean",
    "adaptive_avg_pool2d": "adaptive avg pool", "adaptive_max_pool2d": "adaptive max pool",
    "dropout": "dropout", "cat": "concatenation", _ATTENTION: "attention",
}  # fmt: skip


class Call(NamedTuple):
    """One step of a forward pass."""

    kind: str  # a key of _WORDS
    rate: float  # of a dropout


class Watch(TorchFunctionMode):
    """Lists the steps of what runs inside; with `changes`, does some of them differently."""

    def __init__(self, changes: dict[int, Change] | None = None) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.changes = changes or {}

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        call, change, kwargs = _call(func, args, kwargs or {}), None, kwargs or {}
        if call is not None:
            change = self.changes.get(len(self.calls))
            self.calls.append(call)
        return change(func, args, kwargs) if change else func(*args, **kwargs)


def _call(func: Callable, args: tuple, kwargs: dict) -> Call | None:
    name = getattr(func, "__name__", "").rstrip("_")  # `relu_` is the same in place
    name = "hardtanh" if name == "relu6" else name
    if name in ("add", "mul"):  # of two tensors
        tensors = [a for a in args[:2] if isinstance(a, Tensor) and a.dim() > 0]
        if len(tensors) < 2 or not args[0].is_floating_point():
            return None
    if name not in _WORDS:
        return None
    return Call(name, dict(zip(("input", "p"), args), **kwargs).get("p", 0.5))


class Noise(TorchDispatchMode):
    """Inside, random numbers follow from a seed, their number and how often as many were drawn.

    Two ways to write dropout then drop the same. With `flip` each u is 1 - u: who keeps where
    u >= rate and who keeps where u < 1 - rate meet there.
    """

    def __init__(self, seed: int, flip: bool = False) -> None:
        super().__init__()
        self.seed, self.flip = seed, flip
        self.drawn: Counter[int] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = getattr(func, "overloadpacket", func).__name__
        result = func(*args, **(kwargs or {}))
        if name in ("bernoulli", "bernoulli_"):
            # The chance: a tensor of chances alone, or what stands behind the tensor; else a half.
            chance = args[0] if name == "bernoulli" and len(args) < 2 else [*args, 0.5][1]
            result.copy_((self._uniform(result) < chance).to(result.dtype))
        elif name in ("rand", "rand_like"):
            result.copy_(self._uniform(result))
        elif name == "uniform_":
            low, high = [*args[1:], *(0.0, 1.0)[len(args) - 1 :]][:2]
            result.copy_(low + (high - low) * self._uniform(result))
        elif name in ("randn", "randn_like", "normal", "normal_", "randint", "randperm"):
            self.drawn[result.numel()] += 1
        return result

    def _uniform(self, like: Tensor) -> Tensor:
        count = like.numel()
        self.drawn[count] += 1
        number = self.seed * 1009 + count * 31 + self.drawn[count]
        generator = torch.Generator().manual_seed(number)
        numbers = torch.rand(count, generator=generator).clamp(1e-6, 1 - 1e-6)
        return (1 - numbers if self.flip else numbers).view(like.shape)


def run(forward: Callable[[], list[Tensor]], changes: dict[int, Change]) -> list[Tensor] | None:
    """What comes out with these changes, None where they don't fit."""
    with contextlib.suppress(Exception), Watch(changes):
        return forward()
    return None


def silent_activations(forward: Callable[[], list[Tensor]]) -> list[str]:
    """Activations without which the output is the same, to a thousandth of its largest value: far
    from `checks.TOLERANCE`, to be sure. On these numbers nobody could tell.
    """
    with Watch() as watch:
        right = forward()
    silent = []
    for i, name in enumerate(_ordinals(watch.calls)):
        if watch.calls[i].kind in ACTIVATIONS and (without := run(forward, {i: _skip})):
            far = ((x - y).abs().max() / y.abs().max().clamp(1.0) for x, y in zip(without, right))
            if max(far) <= 1e-3:
                silent.append(name)
    return silent


# -------------------------------------------------------------------------- one call done wrong


def _skip(func: Callable, args: tuple, kwargs: dict) -> Any:
    return args[0]


def _then(function: Callable[[Tensor], Tensor]) -> Change:
    return lambda func, args, kwargs: function(func(*args, **kwargs))


def _instead(function: Callable[..., Tensor], count: int = 1) -> Change:
    """`function` of the call's first arguments, as many as `count`."""
    return lambda func, args, kwargs: function(*args[:count])


def _padded(func: Callable, args: tuple, kwargs: dict, mode: str) -> Any:
    x, weight, bias, stride, (height, width), *rest = args
    return func(F.pad(x, (width, width, height, height), mode), weight, bias, stride, 0, *rest)


def _pool(pool: Callable[..., Tensor]) -> Change:
    """`pool` of the right function, the input, window, stride, padding and whether it rounds up."""
    names = ("input", "kernel_size", "stride", "padding", "ceil_mode")

    def change(func: Callable, args: tuple, kwargs: dict) -> Any:
        given = {"stride": None, "padding": 0, "ceil_mode": False}
        given |= dict(zip(names, args), **kwargs)
        return pool(func, *(given[name] for name in names))

    return change


_average = _pool(lambda f, x, k, stride, pad, ceil: F.avg_pool2d(x, k, stride, pad, ceil))
_maximum = _pool(lambda f, x, k, stride, pad, ceil: F.max_pool2d(x, k, stride, pad, 1, ceil))


def _subsample(func: Callable, x: Tensor, window: Any, stride: Any, *rest: object) -> Tensor:
    step = stride if isinstance(stride, int) else window if isinstance(window, int) else 2
    return x[:, :, ::step, ::step]


def _reordered(func: Callable, args: tuple, kwargs: dict, order: tuple[int, ...]) -> Any:
    if len(args[0]) != len(order):
        raise ValueError("another number of parts")
    return func([args[0][i] for i in order], *args[1:], **kwargs)


def _rated(func: Callable, args: tuple, kwargs: dict, rate: Callable[[float], float]) -> Any:
    given = dict(zip(("input", "p", "training"), args), **kwargs)
    return func(given["input"], rate(given.get("p", 0.5)), given.get("training", True))


_attend = F.scaled_dot_product_attention  # queries, keys and values are (N, heads, T, d)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5


def _one_head(q: Tensor, k: Tensor, v: Tensor, of_width: bool) -> Tensor:
    wide = (t.transpose(1, 2).flatten(2) for t in (q, k, v))
    mixed = _attend(*wide, scale=None if of_width else q.shape[-1] ** -0.5)
    return mixed.unflatten(2, q.shape[1::2]).transpose(1, 2)


def _across(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads as they come out of a view of (N, T, D) as (N, heads, T, d), without a transpose."""
    return _attend(*(t.transpose(1, 2).reshape(q.shape) for t in (q, k, v)))


def _joined(mixed: Tensor) -> Tensor:
    """The way back without a transpose, as the code behind the call expects it."""
    n, heads, tokens, d = mixed.shape
    return mixed.reshape(n, tokens, heads, d).transpose(1, 2)


def _scaled(scale: Callable[[int, int], float]) -> Callable[..., Tensor]:
    """Attention with another scale, by the size and number of heads."""
    return lambda q, k, v: _attend(q, k, v, scale=scale(q.shape[-1], q.shape[1]))


_OF_ATTENTION: tuple[tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]], ...] = (
    ("the scores are not divided by sqrt(d)", _scaled(lambda d, heads: 1.0)),
    ("the scores are divided by d, not by its root", _scaled(lambda d, heads: 1 / d)),
    ("the scores are divided by the root of the whole width, not of a head's",
     _scaled(lambda d, heads: (d * heads) ** -0.5)),
    ("the scores are multiplied by sqrt(d), not divided", _scaled(lambda d, heads: d**0.5)),
    ("the scores are divided by the root of the number of heads",
     _scaled(lambda d, heads: heads**-0.5)),
    ("queries and keys are exchanged", lambda q, k, v: _attend(k, q, v)),
    ("queries stand in for keys", lambda q, k, v: _attend(q, q, v)),
    ("keys stand in for queries", lambda q, k, v: _attend(k, k, v)),
    ("keys stand in for values", lambda q, k, v: _attend(q, k, k)),
    ("values and keys are exchanged", lambda q, k, v: _attend(q, v, k)),
    ("the width is cut into heads across the tokens: (N, T, heads, d) first, then a transpose",
     _across),
    ("the width is cut into heads across the tokens, and joined the same way",
     lambda q, k, v: _joined(_across(q, k, v))),
    ("the softmax is missing", lambda q, k, v: _scores(q, k) @ v),
    ("the softmax runs over the queries, not over the keys",
     lambda q, k, v: _scores(q, k).softmax(-2) @ v),
    ("a sigmoid in place of the softmax", lambda q, k, v: _scores(q, k).sigmoid() @ v),
    ("tokens look only at those before them, as in a language model",
     lambda q, k, v: _attend(q, k, v, is_causal=True)),
    ("the heads are joined without bringing them next to each other first (a transpose)",
     lambda q, k, v: _joined(_attend(q, k, v))),
    ("there is one head: all of the width in one product", partial(_one_head, of_width=True)),
    ("there is one head: all of the width in one product", partial(_one_head, of_width=False)),
    ("the values are not weighted: their mean",
     lambda q, k, v: v.mean(2, keepdim=True).expand_as(v)),
)  # fmt: skip

_BIAS = ("the bias of {} is left out", lambda f, a, k: f(*a[:2], None, *a[3:], **k))
_OF_POOLS = [
    ("{} is left out", _skip),
    ("every second pixel in place of {}", _pool(_subsample)),
    ("the size of {} is rounded the other way (ceil_mode)",
     _pool(lambda f, x, k, stride, pad, ceil: f(x, k, stride, pad, ceil_mode=not ceil))),
    ("the padding of {} is missing", _pool(lambda f, x, k, stride, *_: f(x, k, stride, 0))),
    ("{} is padded by 1", _pool(lambda f, x, k, stride, *_: f(x, k, stride, 1))),
    ("the window of {} is 3", _pool(lambda f, x, k, stride, *_: f(x, 3, stride, 1))),
    ("the window of {} is 3", _pool(lambda f, x, k, stride, *_: f(x, 3, stride, 0))),
    ("the window of {} is 2", _pool(lambda f, x, k, stride, *_: f(x, 2, stride, 0))),
]  # fmt: skip

# Kind of call -> what can be done wrong in it, in words, where {} is its name, and how.
OF_ONE: dict[str, list[tuple[str, Change]]] = {
    "conv2d": [
        _BIAS,
        *((f"{{}} pads by {mode}, not by zeros", partial(_padded, mode=mode))
          for mode in ("reflect", "replicate", "circular")),
    ],
    "linear": [_BIAS],
    "mean": [
        ("a sum in place of {}", lambda f, a, k: a[0].sum(*a[1:], **k)),
        ("a maximum in place of {}", lambda f, a, k: a[0].amax(*a[1:], **k)),
    ],
    "max_pool2d": [
        *_OF_POOLS,
        ("an average pool in place of {}", _average),
    ],
    "avg_pool2d": [
        *_OF_POOLS,
        ("a max-pool in place of {}", _maximum),
        ("{} leaves the padding out of its mean",
         lambda f, a, k: f(*a[:5], not a[5] if len(a) > 5 else False)),
    ],
    "adaptive_avg_pool2d": [
        ("{} is left out", _skip),
        ("a maximum in place of {}", _instead(F.adaptive_max_pool2d, 2)),
        ("the wrong size of {}, and then a mean",
         lambda f, a, k: a[0].mean((2, 3), keepdim=True).expand(f(*a, **k).shape)),
    ],
    "adaptive_max_pool2d": [
        ("{} is left out", _skip),
        ("a mean in place of {}", _instead(F.adaptive_avg_pool2d, 2)),
    ],
    "add": [
        ("{} is missing: only its first operand is left", _instead(lambda a, b: a, 2)),
        ("{} is missing: only its second operand is left", _instead(lambda a, b: b, 2)),
        ("{} subtracts", _instead(lambda a, b: a - b, 2)),
        ("{} subtracts", _instead(lambda a, b: b - a, 2)),
        ("a product in place of {}", _instead(lambda a, b: a * b, 2)),
        ("a mean in place of {}", _instead(lambda a, b: (a + b) / 2, 2)),
        ("{} counts one operand twice", _instead(lambda a, b: a + 2 * b, 2)),
        ("{} counts one operand twice", _instead(lambda a, b: 2 * a + b, 2)),
    ],
    "mul": [
        ("the gate is given back, the input is not scaled by it ({})",
         _instead(lambda a, b: min(a, b, key=Tensor.numel).expand_as(a * b), 2)),
        ("{} is left out: the input is not scaled by the gate",
         _instead(lambda a, b: max(a, b, key=Tensor.numel), 2)),
        ("a sum in place of {}", _instead(lambda a, b: a + b, 2)),
        ("the gate is added to 1 before {}",
         _instead(lambda a, b: max(a, b, key=Tensor.numel) + a * b, 2)),
    ],
    "cat": [
        ("{} has its parts in another order",
         lambda f, a, k: f(list(a[0])[::-1], *a[1:], **k)),
        *(("{} has its parts in another order", partial(_reordered, order=order))
          for count in (2, 3, 4) for order in list(itertools.permutations(range(count)))[1:]),
    ],
    _ATTENTION: [(text, _instead(attend, 3)) for text, attend in _OF_ATTENTION],
    "dropout": [
        ("{} is missing", _skip),
        ("the rate of {} is wrong", partial(_rated, rate=lambda p: p / 2)),
        ("the rate of {} is wrong", partial(_rated, rate=lambda p: min(2 * p, 0.9))),
        ("{} keeps what it should drop", partial(_rated, rate=lambda p: 1 - p)),
        ("the rate of {} is wrong", partial(_rated, rate=lambda p: 0.5)),
    ],
    **{kind: [("{} is left out", _skip)] for kind in _NORMS},
}  # fmt: skip
OF_ONE["batch_norm"] += [
    ("{} uses the batch's statistics in eval mode",
     lambda f, a, k: f(a[0], None, None, **{**k, "training": True})),
]  # fmt: skip

# The same for all places of a kind at once; {} is the kind in words.
OF_ALL: dict[str, list[tuple[str, Change]]] = {
    "max_pool2d": [("an average pool in place of every {}", _average)],
    "avg_pool2d": [("a max-pool in place of every {}", _maximum)],
    **{kind: [("every {} is left out", _skip)] for kind in _NORMS},
}
for _kind in ACTIVATIONS:
    _others = [
        (f"{word} in place of {{}}", _instead(function))
        for other, (word, function) in ACTIVATIONS.items()
        if other != _kind
    ]
    OF_ONE[_kind] = [("{} is missing", _skip), *_others]
    OF_ALL[_kind] = [("every {} is missing", _skip), *_others]
OF_ONE["relu"] += [
    ("leaky ReLU in place of {}", _instead(partial(F.leaky_relu, negative_slope=slope)))
    for slope in (0.1, 0.2)
]
OF_ONE["softmax"] += [
    ("{} runs over the wrong dimension", _instead(partial(torch.softmax, dim=dim)))
    for dim in range(4)
]


def mistakes(calls: list[Call]) -> Iterator[Mistake]:
    """In words, and as changes to the calls of the right forward pass."""
    names = _ordinals(calls)
    everywhere: defaultdict[str, dict[int, Change]] = defaultdict(dict)
    for i, call in enumerate(calls):
        for text, change in OF_ONE[call.kind]:
            yield text.format(names[i]), {i: change}
        yield from _with_the_next(calls, names, i, everywhere)
        if call.kind == "dropout":
            moved = partial(F.dropout, p=call.rate)
            for j, other in enumerate(calls):
                if other.kind not in ("dropout", "add", "mul"):
                    text = f"{names[i]} is at another place: behind {names[j]}"
                    yield text, {i: _skip, j: _then(moved)}
        later = [j for j in range(i, len(calls)) if calls[j].kind in ACTIVATIONS]
        if call.kind in _POOLS and later:
            # A pool that keeps the size, as inception modules have it.
            moved = partial(getattr(F, call.kind), kernel_size=3, stride=1, padding=1)
            text = f"{names[i]} comes too late: behind {names[later[0]]}"
            yield text, {i: _skip, later[0]: _then(moved)}
    for kind, rows in OF_ALL.items():
        places = [i for i, call in enumerate(calls) if call.kind == kind]
        if len(places) > 1:
            for text, change in rows:
                yield text.format(_WORDS[kind]), dict.fromkeys(places, change)
    for text, changes in everywhere.items():
        if len(changes) > 2:
            yield text, changes


def _with_the_next(
    calls: list[Call], names: list[str], i: int, everywhere: dict[str, dict[int, Change]]
) -> Iterator[Mistake]:
    """The order of call `i` and the one behind it, and activations too many between them.
    `everywhere` takes the changes of what can be wrong in all places at once, too.
    """
    kind, name = calls[i].kind, names[i]
    after = calls[i + 1].kind if i + 1 < len(calls) else ""
    if kind in ACTIVATIONS and after in _NORMS:
        word, act = ACTIVATIONS[kind]
        changes = {i: _skip, i + 1: _then(act)}
        yield f"{names[i + 1]} comes before the {word}; it belongs after it", changes
    elif kind in ACTIVATIONS and after in _POOLS:
        changes = {i: _skip, i + 1: _then(ACTIVATIONS[kind][1])}
        yield f"{name} comes after {names[i + 1]}; it belongs before it", changes
        everywhere["every activation comes after its pool; it belongs before it"] |= changes
    elif kind in _NORMS and after in ACTIVATIONS:
        word, act = ACTIVATIONS[after]
        changes = {i: lambda f, a, k: f(act(a[0]), *a[1:], **k), i + 1: _skip}
        yield f"{name} comes after the {word}; it belongs before it", changes
        text = f"every {_WORDS[kind]} comes after its activation; it belongs before it"
        everywhere[text] |= changes
    elif kind == "add" and after in ACTIVATIONS:
        word, act = ACTIVATIONS[after]
        for change in (*_activated(act), _instead(lambda a, b: act(a) + act(b), 2)):
            text = f"the {word} comes before {name}; it belongs after it"
            yield text, {i: change, i + 1: _skip}
        for change in _activated(act):
            yield f"a second {word} before {name}", {i: change}
    elif kind not in ("dropout", *ACTIVATIONS) and after not in ACTIVATIONS:
        for other in ("relu", "hardtanh", "silu", "gelu", "hardswish", "sigmoid", "tanh"):
            word, act = ACTIVATIONS[other]
            if kind == "add" and other not in ("sigmoid", "tanh"):
                for change in _activated(act):
                    yield f"a {word} before {name} that should not be there", {i: change}
            yield f"a {word} behind {name} that should not be there", {i: _then(act)}


def _activated(act: Callable[[Tensor], Tensor]) -> tuple[Change, Change]:
    """A sum of which one operand or the other goes through an activation."""
    return _instead(lambda a, b: act(a) + b, 2), _instead(lambda a, b: a + act(b), 2)


def at_the_end(right: list[Tensor], inputs: list[Tensor]) -> Iterator[tuple[str, list[Tensor]]]:
    """Mistakes made with the finished output."""
    for word, function in (
        ("ReLU", torch.relu),
        ("softmax", lambda y: y.softmax(1)),
        ("log-softmax", lambda y: y.log_softmax(1)),
        ("sigmoid", torch.sigmoid),
        ("tanh", torch.tanh),
    ):
        yield f"a {word} at the end that should not be there", [function(y) for y in right]
    yield "the output is negated", [-y for y in right]
    yield "the output is zero", [torch.zeros_like(y) for y in right]
    if len(inputs) == 1 == len(right) and inputs[0].shape == right[0].shape:
        yield "the input is given back as it came", inputs
        yield "the input is added once too often", [right[0] + inputs[0]]
        yield "the input is subtracted: the shortcut is missing", [right[0] - inputs[0]]
        yield "the rest of the block is missing: a ReLU of the input", [torch.relu(inputs[0])]
    if any(y.dim() == 4 and y.shape[2] == y.shape[3] for y in right):
        yield "height and width are exchanged", [y.transpose(2, 3) for y in right]
    yield "the channels come in reversed order", [y.flip(1) if y.dim() > 1 else y for y in right]


def _ordinals(calls: list[Call]) -> list[str]:
    """'the first ReLU', 'the last sum', 'the BatchNorm' for each call."""
    totals, seen, names = Counter(call.kind for call in calls), Counter[str](), []
    words = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
    for kind, _ in calls:
        seen[kind] += 1
        number = seen[kind]
        which = words[number - 1] if number <= len(words) else f"{number}th"
        which = "last" if number == totals[kind] else which
        names.append(f"the {_WORDS[kind]}" if totals[kind] == 1 else f"the {which} {_WORDS[kind]}")
    return names
