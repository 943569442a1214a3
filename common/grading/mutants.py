"""Known mistakes, made on purpose: the reference with one step left out, exchanged or moved.

A forward pass is a list of calls: convolution, norm, ReLU, sum. Under `Mutation` one of them is
done differently. What comes out is what a student's network gives who made that mistake, so that a
wrong output can be named: "the last ReLU is missing". Nothing here knows the exercises.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Change = Callable[[Callable, tuple, dict], Any]

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
_ALIASES = {"relu_": "relu", "relu6": "hardtanh", "tanh_": "tanh", "sigmoid_": "sigmoid"}
_NORMS = {"batch_norm": "BatchNorm", "layer_norm": "LayerNorm", "group_norm": "GroupNorm"}
_WEIGHTED = {"conv2d": "convolution", "linear": "linear layer"}
_POOLS = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean")
_ATTENTION = "scaled_dot_product_attention"


@dataclass(frozen=True)
class Call:
    """One step of a forward pass."""

    kind: str
    what: str  # in words
    rate: float = 0.0  # of a dropout


class Watch(TorchFunctionMode):
    """Lists the steps of what runs inside; with `changes`, does some of them differently."""

    def __init__(self, changes: dict[int, Change] | None = None) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.changes = changes or {}

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        call = _call(func, args, kwargs or {})
        if call is None:
            return func(*args, **(kwargs or {}))
        self.calls.append(call)
        change = self.changes.get(len(self.calls) - 1)
        if change is None:
            return func(*args, **(kwargs or {}))
        return change(func, args, kwargs or {})


def _call(func: Callable, args: tuple, kwargs: dict) -> Call | None:
    name = getattr(func, "__name__", "")
    name = _ALIASES.get(name, name)
    if name in ACTIVATIONS:
        return Call(name, ACTIVATIONS[name][0])
    for words in (_NORMS, _WEIGHTED):
        if name in words:
            return Call(name, words[name])
    if name in _POOLS:
        return Call(name, "mean" if name == "mean" else name.replace("2d", "").replace("_", " "))
    if name == "dropout":
        return Call(name, name, args[1] if len(args) > 1 else kwargs.get("p", 0.5))
    if name in (_ATTENTION, "cat"):
        return Call(name, "concatenation" if name == "cat" else "attention")
    two = len(args) > 1 and all(isinstance(a, Tensor) and a.dim() > 0 for a in args[:2])
    if name in ("add", "add_") and two and args[0].is_floating_point():
        return Call("add", "sum")
    if name in ("mul", "mul_") and two and args[0].is_floating_point():
        return Call("mul", "product")
    return None


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
            # Of the in-place form the first argument is what it overwrites, the second the chance.
            if name == "bernoulli" and len(args) < 2:
                chance = args[0]
            else:
                chance = args[1] if len(args) > 1 else (kwargs or {}).get("p", 0.5)
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
        generator = torch.Generator().manual_seed(
            (self.seed * 1009 + count * 31 + self.drawn[count]) % 2**62
        )
        numbers = torch.rand(count, generator=generator).clamp(1e-6, 1 - 1e-6)
        return (1 - numbers if self.flip else numbers).view(like.shape)


# ------------------------------------------------------------------------------------- mistakes


def silent_activations(forward: Callable[[], list[Tensor]]) -> list[str]:
    """Activations without which the output is the same: on these numbers nobody could tell."""
    calls, right = record(forward)
    names = _ordinals(calls)
    silent = []
    for i, call in enumerate(calls):
        if call.kind not in ACTIVATIONS:
            continue
        without = run(forward, {i: _skip})
        if without is not None and _same(without, right, 1e-3):
            silent.append(names[i])
    return silent


def record(forward: Callable[[], list[Tensor]]) -> tuple[list[Call], list[Tensor]]:
    with Watch() as watch:
        result = forward()
    return watch.calls, result


def run(forward: Callable[[], list[Tensor]], changes: dict[int, Change]) -> list[Tensor] | None:
    """What comes out with these changes, None where they don't fit."""
    try:
        with Watch(changes):
            return forward()
    except Exception:
        return None


def mistakes(calls: list[Call]) -> Iterator[tuple[str, dict[int, Change]]]:
    """In words, and as changes to the calls of the right forward pass."""
    names = _ordinals(calls)
    last = len(calls) - 1
    for i, call in enumerate(calls):
        name, after = names[i], calls[i + 1].kind if i < last else ""
        if call.kind in ACTIVATIONS:
            yield f"{name} is missing", {i: _skip}
            for kind, (word, function) in ACTIVATIONS.items():
                if kind != call.kind:
                    yield f"{word} in place of {name}", {i: _instead(function)}
            if call.kind == "relu":
                for slope in (0.1, 0.2):
                    leaky = _instead(lambda x, s=slope: F.leaky_relu(x, s))
                    yield f"leaky ReLU in place of {name}", {i: leaky}
            if call.kind == "softmax":
                for dim in (0, 1, 2, 3):
                    yield (
                        f"{name} runs over the wrong dimension",
                        {i: lambda f, a, k, d=dim: a[0].softmax(d)},
                    )
        if call.kind in _NORMS:
            yield f"{name} is left out", {i: _skip}
            if after in ACTIVATIONS:
                act = ACTIVATIONS[after][1]
                yield (
                    f"{name} comes after the {calls[i + 1].what}; it belongs before it",
                    {
                        i: lambda f, a, k, act=act: f(act(a[0]), *a[1:], **k),
                        i + 1: _skip,
                    },
                )
            if call.kind == "batch_norm":
                yield f"{name} uses the batch's statistics in eval mode", {i: _batch_statistics}
        if i and calls[i - 1].kind in ACTIVATIONS and call.kind in _NORMS:
            act = ACTIVATIONS[calls[i - 1].kind][1]
            yield (
                f"{name} comes before the {calls[i - 1].what}; it belongs after it",
                {i - 1: _skip, i: lambda f, a, k, act=act: act(f(*a, **k))},
            )
        if call.kind in _WEIGHTED:
            yield f"the bias of {name} is left out", {i: _without_bias}
            for mode in ("reflect", "replicate", "circular"):
                yield f"{name} pads by {mode}, not by zeros", {i: _padding(mode)}
        if call.kind in _POOLS:
            yield from _pool_mistakes(i, call, name)
        if call.kind == "add":
            yield from _sum_mistakes(i, calls, name)
        if call.kind == "mul":
            yield f"the gate is given back, the input is not scaled by it ({name})", {i: _smaller}
            yield f"{name} is left out: the input is not scaled by the gate", {i: _larger}
            yield f"a sum in place of {name}", {i: lambda f, a, k: a[0] + a[1]}
            yield (
                f"the gate is added to 1 before {name}",
                {i: lambda f, a, k: a[0] + a[0] * a[1] if a[0].numel() >= a[1].numel() else a[1]},
            )
        if call.kind == "cat":
            yield f"{name} has its parts in another order", {i: _reversed}
            for count in (2, 3, 4):
                for order in list(itertools.permutations(range(count)))[1:]:
                    yield f"{name} has its parts in another order", {i: _reordered(order)}
        if call.kind == _ATTENTION:
            yield from _attention_mistakes(i)
        if call.kind == "dropout":
            yield f"{name} is missing", {i: _skip}
            for factor in (0.5, 2.0):
                yield (
                    f"the rate of {name} is wrong",
                    {i: _rate(lambda p, c=factor: min(p * c, 0.9))},
                )
            yield f"{name} keeps what it should drop", {i: _rate(lambda p: 1 - p)}
            yield (
                f"the rate of {name} is wrong",
                {i: lambda f, a, k: f(a[0], 0.5, *_training(a, k))},
            )
            for j, other in enumerate(calls):
                if j != i and other.kind not in ("dropout", "add", "mul"):
                    yield (
                        f"{name} is at another place: behind {names[j]}",
                        {i: _skip, j: _then(lambda x, p=call.rate: F.dropout(x, p, True))},
                    )
        if call.kind not in ACTIVATIONS and call.kind != "dropout" and after not in ACTIVATIONS:
            for kind in ("relu", "hardtanh", "silu", "gelu", "hardswish", "sigmoid", "tanh"):
                word, function = ACTIVATIONS[kind]
                yield f"a {word} behind {name} that should not be there", {i: _then(function)}
    for kind in {call.kind for call in calls if call.kind in ACTIVATIONS}:
        places = [i for i, call in enumerate(calls) if call.kind == kind]
        if len(places) > 1:
            word = ACTIVATIONS[kind][0]
            yield f"every {word} is missing", dict.fromkeys(places, _skip)
            for other, (instead, function) in ACTIVATIONS.items():
                if other != kind:
                    yield f"{instead} in place of {word}", dict.fromkeys(places, _instead(function))
    for kind, instead in (("max_pool2d", _average), ("avg_pool2d", _maximum)):
        places = [i for i, call in enumerate(calls) if call.kind == kind]
        if len(places) > 1:
            word = "an average pool" if kind == "max_pool2d" else "a max-pool"
            yield (
                f"{word} in place of every {calls[places[0]].what}",
                dict.fromkeys(places, instead),
            )
    swaps: dict[int, Change] = {}
    for i, call in enumerate(calls[:-1]):
        if call.kind in ACTIVATIONS and calls[i + 1].kind in ("max_pool2d", "avg_pool2d"):
            act = ACTIVATIONS[call.kind][1]
            swap = {i: _skip, i + 1: _then(act)}
            yield f"{names[i]} comes after {names[i + 1]}; it belongs before it", swap
            swaps |= swap
        if call.kind in ("max_pool2d", "avg_pool2d"):
            later = [j for j in range(i + 1, len(calls)) if calls[j].kind in ACTIVATIONS]
            if later:
                yield (
                    f"{names[i]} comes too late: behind {names[later[0]]}",
                    {i: _skip, later[0]: _pool_behind(calls[i].kind)},
                )
    if len(swaps) > 2:
        yield "every activation comes after its pool; it belongs before it", swaps
    for kind, word in _NORMS.items():
        places = [i for i, call in enumerate(calls) if call.kind == kind]
        if len(places) > 1:
            yield f"every {word} is left out", dict.fromkeys(places, _skip)
        changes: dict[int, Change] = {}
        for i in places:
            if i < last and calls[i + 1].kind in ACTIVATIONS:
                act = ACTIVATIONS[calls[i + 1].kind][1]
                changes |= {i: lambda f, a, k, act=act: f(act(a[0]), *a[1:], **k), i + 1: _skip}
        if len(changes) > 2:
            yield f"every {word} comes after its activation; it belongs before it", changes


def at_the_end(right: list[Tensor], inputs: list[Tensor]) -> Iterator[tuple[str, list[Tensor]]]:
    """Mistakes made with the finished output."""
    for kind in ("relu", "softmax", "sigmoid", "tanh"):
        word, function = ACTIVATIONS[kind]
        if kind == "softmax":
            yield "a softmax at the end that should not be there", [y.softmax(1) for y in right]
            yield (
                "a log-softmax at the end that should not be there",
                [y.log_softmax(1) for y in right],
            )
        else:
            yield f"a {word} at the end that should not be there", [function(y) for y in right]
    yield "the output is negated", [-y for y in right]
    yield "the output is zero", [torch.zeros_like(y) for y in right]
    if len(inputs) == 1 == len(right) and inputs[0].shape == right[0].shape:
        yield "the input is given back as it came", inputs
        yield "the input is added once too often", [right[0] + inputs[0]]
        yield "the input is subtracted: the shortcut is missing", [right[0] - inputs[0]]
        yield "the rest of the block is missing: a ReLU of the input", [torch.relu(inputs[0])]
    for y in right:
        if y.dim() == 4 and y.shape[2] == y.shape[3]:
            yield "height and width are exchanged", [y.transpose(2, 3) for y in right]
            break
    yield "the channels come in reversed order", [y.flip(1) if y.dim() > 1 else y for y in right]


def _ordinals(calls: list[Call]) -> list[str]:
    """'the first ReLU', 'the last sum', 'the BatchNorm' for each call."""
    totals, seen, names = Counter(c.what for c in calls), Counter[str](), []
    words = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
    for call in calls:
        i, total = seen[call.what], totals[call.what]
        seen[call.what] += 1
        if total == 1:
            names.append(f"the {call.what}")
        elif i == total - 1:
            names.append(f"the last {call.what}")
        else:
            names.append(f"the {words[i] if i < len(words) else f'{i + 1}th'} {call.what}")
    return names


def _same(a: list[Tensor], b: list[Tensor], tolerance: float) -> bool:
    """Whether two outputs could be taken for equal: far from `checks.TOLERANCE`, to be sure."""
    return all(
        x.shape == y.shape and (x - y).abs().max() <= tolerance * max(1.0, float(y.abs().max()))
        for x, y in zip(a, b)
    )


def _skip(func: Callable, args: tuple, kwargs: dict) -> Any:
    return args[0] if args else kwargs["input"]


def _instead(function: Callable[[Tensor], Tensor]) -> Change:
    return lambda func, args, kwargs: function(args[0] if args else kwargs["input"])


def _then(function: Callable[[Tensor], Tensor]) -> Change:
    return lambda func, args, kwargs: function(func(*args, **kwargs))


def _batch_statistics(func: Callable, args: tuple, kwargs: dict) -> Any:
    x, _, _, weight, bias, *_ = args
    return F.batch_norm(x, None, None, weight, bias, True, 0.0, kwargs.get("eps", 1e-5))


def _without_bias(func: Callable, args: tuple, kwargs: dict) -> Any:
    x, weight, _, *rest = args
    return func(x, weight, None, *rest, **kwargs)


def _padding(mode: str) -> Change:
    def change(func: Callable, args: tuple, kwargs: dict) -> Any:
        x, weight, bias, stride, padding, *rest = args
        height, width = padding
        x = F.pad(x, (width, width, height, height), mode=mode)
        return func(x, weight, bias, stride, 0, *rest)

    return change


def _pool_mistakes(i: int, call: Call, name: str) -> Iterator[tuple[str, dict[int, Change]]]:
    if call.kind == "mean":
        yield f"a sum in place of {name}", {i: lambda f, a, k: a[0].sum(*a[1:], **k)}
        yield f"a maximum in place of {name}", {i: lambda f, a, k: a[0].amax(*a[1:], **k)}
        return
    yield f"{name} is left out", {i: _skip}
    if call.kind in ("max_pool2d", "avg_pool2d"):
        yield f"the size of {name} is rounded the other way (ceil_mode)", {i: _other_rounding}
        for window, padding in ((3, 1), (3, 0), (2, 0)):
            yield (
                f"the window of {name} is {window}",
                {i: lambda f, a, k, w=window, p=padding: f(a[0], w, _pool_arguments(a, k)[2], p)},
            )
    if call.kind == "adaptive_avg_pool2d":
        yield (
            f"a maximum in place of {name}",
            {i: lambda f, a, k: F.adaptive_max_pool2d(a[0], a[1])},
        )
        yield (
            f"the wrong size of {name}, and then a mean",
            {i: lambda f, a, k: a[0].mean((2, 3), keepdim=True).expand(f(*a, **k).shape)},
        )
    if call.kind == "adaptive_max_pool2d":
        yield f"a mean in place of {name}", {i: lambda f, a, k: F.adaptive_avg_pool2d(a[0], a[1])}
    if call.kind == "max_pool2d":
        yield f"an average pool in place of {name}", {i: _average}
        yield f"every second pixel in place of {name}", {i: _subsample}
    if call.kind == "avg_pool2d":
        yield f"a max-pool in place of {name}", {i: _maximum}
        yield f"every second pixel in place of {name}", {i: _subsample}
        yield (
            f"{name} leaves the padding out of its mean",
            {i: lambda f, a, k: f(*a[:5], not a[5] if len(a) > 5 else False)},
        )


def _pool_arguments(args: tuple, kwargs: dict) -> tuple[Any, Any, Any, Any, bool]:
    x, kernel = args[:2]
    stride = args[2] if len(args) > 2 else kwargs.get("stride")
    padding = args[3] if len(args) > 3 else kwargs.get("padding", 0)
    place = 5 if len(args) > 5 and isinstance(args[4], int) else 4  # max_pool2d has a dilation
    ceil = args[place] if len(args) > place else kwargs.get("ceil_mode", False)
    return x, kernel, stride, padding, bool(ceil)


def _pool_behind(kind: str) -> Change:
    """A pool that keeps the size, as inception modules have it."""
    pool = F.max_pool2d if kind == "max_pool2d" else F.avg_pool2d
    return lambda func, args, kwargs: pool(func(*args, **kwargs), 3, 1, 1)


def _average(func: Callable, args: tuple, kwargs: dict) -> Any:
    x, kernel, stride, padding, ceil = _pool_arguments(args, kwargs)
    return F.avg_pool2d(x, kernel, stride, padding, ceil)


def _maximum(func: Callable, args: tuple, kwargs: dict) -> Any:
    x, kernel, stride, padding, ceil = _pool_arguments(args, kwargs)
    return F.max_pool2d(x, kernel, stride, padding, 1, ceil)


def _other_rounding(func: Callable, args: tuple, kwargs: dict) -> Any:
    x, kernel, stride, padding, ceil = _pool_arguments(args, kwargs)
    return func(x, kernel, stride, padding, ceil_mode=not ceil)


def _subsample(func: Callable, args: tuple, kwargs: dict) -> Any:
    x, kernel, stride, *_ = _pool_arguments(args, kwargs)
    step = stride if isinstance(stride, int) else kernel if isinstance(kernel, int) else 2
    return x[:, :, ::step, ::step]


def _sum_mistakes(i: int, calls: list[Call], name: str) -> Iterator[tuple[str, dict[int, Change]]]:
    yield f"{name} is missing: only its first operand is left", {i: lambda f, a, k: a[0]}
    yield f"{name} is missing: only its second operand is left", {i: lambda f, a, k: a[1]}
    yield f"{name} subtracts", {i: lambda f, a, k: a[0] - a[1]}
    yield f"{name} subtracts", {i: lambda f, a, k: a[1] - a[0]}
    yield f"a product in place of {name}", {i: lambda f, a, k: a[0] * a[1]}
    yield f"a mean in place of {name}", {i: lambda f, a, k: (a[0] + a[1]) / 2}
    yield f"{name} counts one operand twice", {i: lambda f, a, k: a[0] + 2 * a[1]}
    yield f"{name} counts one operand twice", {i: lambda f, a, k: 2 * a[0] + a[1]}
    if i + 1 < len(calls) and calls[i + 1].kind in ACTIVATIONS:
        word, act = ACTIVATIONS[calls[i + 1].kind]
        skip = {i + 1: _skip}
        text = f"the {word} comes before {name}; it belongs after it"
        yield text, {i: lambda f, a, k: act(a[0]) + a[1], **skip}
        yield text, {i: lambda f, a, k: a[0] + act(a[1]), **skip}
        yield text, {i: lambda f, a, k: act(a[0]) + act(a[1]), **skip}
        text = f"a second {word} before {name}"
        yield text, {i: lambda f, a, k: act(a[0]) + a[1]}
        yield text, {i: lambda f, a, k: a[0] + act(a[1])}
    else:
        for kind in ("relu", "hardtanh", "silu", "hardswish", "gelu"):
            word, act = ACTIVATIONS[kind]
            text = f"a {word} before {name} that should not be there"
            yield text, {i: lambda f, a, k, act=act: act(a[0]) + a[1]}
            yield text, {i: lambda f, a, k, act=act: a[0] + act(a[1])}


def _smaller(func: Callable, args: tuple, kwargs: dict) -> Any:
    small, large = sorted(args[:2], key=lambda t: t.numel())
    return small.expand_as(large)


def _larger(func: Callable, args: tuple, kwargs: dict) -> Any:
    return max(args[:2], key=lambda t: t.numel())


def _reversed(func: Callable, args: tuple, kwargs: dict) -> Any:
    return func(list(args[0])[::-1], *args[1:], **kwargs)


def _reordered(order: tuple[int, ...]) -> Change:
    def change(func: Callable, args: tuple, kwargs: dict) -> Any:
        parts = list(args[0])
        if len(parts) != len(order):
            raise ValueError("another number of parts")
        return func([parts[i] for i in order], *args[1:], **kwargs)

    return change


def _attention_mistakes(i: int) -> Iterator[tuple[str, dict[int, Change]]]:
    def with_scale(scale: Callable[[Tensor], float]) -> Change:
        return lambda f, a, k: f(a[0], a[1], a[2], scale=scale(a[0]))

    yield "the scores are not divided by sqrt(d)", {i: with_scale(lambda q: 1.0)}
    yield "the scores are divided by d, not by its root", {i: with_scale(lambda q: 1 / q.shape[-1])}
    yield (
        "the scores are divided by the root of the whole width, not of a head's",
        {i: with_scale(lambda q: (q.shape[-1] * q.shape[1]) ** -0.5)},
    )
    yield (
        "the scores are multiplied by sqrt(d), not divided",
        {i: with_scale(lambda q: math.sqrt(q.shape[-1]))},
    )
    yield (
        "the scores are divided by the root of the number of heads",
        {i: with_scale(lambda q: q.shape[1] ** -0.5)},
    )
    yield "queries and keys are exchanged", {i: lambda f, a, k: f(a[1], a[0], a[2])}
    yield "queries stand in for keys", {i: lambda f, a, k: f(a[0], a[0], a[2])}
    yield "keys stand in for queries", {i: lambda f, a, k: f(a[1], a[1], a[2])}
    yield "keys stand in for values", {i: lambda f, a, k: f(a[0], a[1], a[1])}
    yield "values and keys are exchanged", {i: lambda f, a, k: f(a[0], a[2], a[1])}
    yield (
        "the width is cut into heads across the tokens: (N, T, heads, d) first, then a transpose",
        {i: lambda f, a, k: _across(f, a)},
    )
    yield (
        "the width is cut into heads across the tokens, and joined the same way",
        {i: lambda f, a, k: _across(f, a, both=True)},
    )
    yield "the softmax is missing", {i: lambda f, a, k: _scores(a) @ a[2]}
    yield (
        "the softmax runs over the queries, not over the keys",
        {i: lambda f, a, k: _scores(a).softmax(-2) @ a[2]},
    )
    yield (
        "a sigmoid in place of the softmax",
        {i: lambda f, a, k: _scores(a).sigmoid() @ a[2]},
    )
    yield (
        "tokens look only at those before them, as in a language model",
        {i: lambda f, a, k: f(a[0], a[1], a[2], is_causal=True)},
    )
    yield (
        "the heads are joined without bringing them next to each other first (a transpose)",
        {
            i: lambda f, a, k: (
                f(*a)
                .flatten(1)
                .view(a[0].shape[0], a[0].shape[2], a[0].shape[1], a[0].shape[3])
                .transpose(1, 2)
            )
        },
    )
    yield (
        "there is one head: all of the width in one product",
        {i: lambda f, a, k: _one_head(a)},
    )
    yield (
        "there is one head: all of the width in one product",
        {i: lambda f, a, k: _one_head(a, a[0].shape[-1] ** -0.5)},
    )
    yield (
        "the values are not weighted: their mean",
        {i: lambda f, a, k: a[2].mean(2, keepdim=True).expand_as(a[2])},
    )


def _scores(args: tuple) -> Tensor:
    return args[0] @ args[1].transpose(-2, -1) * args[0].shape[-1] ** -0.5


def _one_head(args: tuple, scale: float | None = None) -> Tensor:
    q, k, v = (t.transpose(1, 2).flatten(2) for t in args[:3])
    mixed = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return mixed.unflatten(2, args[0].shape[1::2]).transpose(1, 2)


def _across(func: Callable, args: tuple, both: bool = False) -> Tensor:
    """Heads as they come out of a view of (N, T, D) as (N, heads, T, d), without a transpose."""
    shape = args[0].shape
    mixed = func(*(t.transpose(1, 2).reshape(shape) for t in args[:3]))
    if both:
        return mixed.reshape(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)
    return mixed


def _training(args: tuple, kwargs: dict) -> tuple[bool, ...]:
    return (bool(args[2] if len(args) > 2 else kwargs.get("training", True)),)


def _rate(change: Callable[[float], float]) -> Change:
    def instead(func: Callable, args: tuple, kwargs: dict) -> Any:
        p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
        return func(args[0], change(p), *_training(args, kwargs))

    return instead
