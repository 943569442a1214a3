"""Timing many models so that their order can be trusted."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.comparison.results import Candidate
from common.config import TrainConfig
from common.engine.device import amp_dtype, describe, memory_format
from common.engine.errors import UserError
from common.engine.files import Store
from common.engine.progress import Bar
from common.profiling import fold_batchnorm, peak_memory, time_passes
from common.runs import Run

# The fields of a candidate that depend on the machine.
MEASURED = "latency_ms latency_iqr_ms batch_size images_per_second memory_mb device dtype".split()

SWEEPS = 4  # over all models, far apart: what disturbs a machine rarely lasts, or comes back
MOST_WAYS = 5  # in which `Bench.all_ways` runs a network
SHOWN_WAYS = ("resnet18", "mobilenet_v2", "vit_b_32")  # run in every format and layout

FOLDED = (  # ends a sentence of a table's note
    "BatchNorm is folded into the convolution before it, and was checked, in float64, to leave the "
    "logits as they were; a norm in front of a convolution stays"
)


class Entry(NamedTuple):
    """A model to compare: how to build it, and what is known of it so far."""

    build: Callable[[], nn.Module]
    candidate: Candidate


# What the lesson says of a model: of its task, name, builder and image size.
MakeEntry = Callable[[str, str, Callable[..., nn.Module], int], Entry]


class Way(NamedTuple):
    """How a network is run: its number format, with BatchNorm or without, its layout in memory,
    compiled or not.

    >>> str(Way(channels_last=True, folded=True))
    'float32, folded, channels_last'
    """

    amp: torch.dtype | None = None  # reduced precision, or None for float32
    channels_last: bool = False
    compiled: bool = False
    folded: bool = False  # BatchNorm folded into the convolutions in front of it

    @property
    def dtype(self) -> str:
        return str(self.amp or torch.float32).removeprefix("torch.")

    def __str__(self) -> str:
        words = [self.dtype] + ["folded"] * self.folded
        words += ["channels_last"] * self.channels_last + ["compiled"] * self.compiled
        return ", ".join(words)


def with_weights(model: nn.Module, device: torch.device) -> nn.Module:
    """A model from the meta device with random weights that keep the activations' scale.

    The models' own initialisation would take longer than all measurements. Zeros would not do: a
    chip that multiplies zeros draws less power, and may run faster for it. Nor would norms that do
    nothing: no one would see that one was folded wrongly. Variances are 1/fan-in; He's 2/fan-in
    doubles what a residual block adds to, and after the 55 blocks of EfficientNet-B7 the last bit
    of the input decides the logits.
    """
    model = model.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() > 1:
                bound = (3 / tensor[0].numel()) ** 0.5
                tensor.uniform_(-bound, bound)
            elif tensor.is_floating_point():
                tensor.uniform_(0.9, 1.1)
            else:
                tensor.fill_(1)
    return model.eval()


def prepared(entry: Entry, device: torch.device, way: Way) -> nn.Module:
    """The model with random weights, ready to be run that way.

    Raises:
        UserError: it should be folded, and can't be, or is not the same afterwards.
    """
    with torch.device("meta"):
        model = entry.build()
    model = with_weights(model, device)
    # Folding makes new weights, so the layout comes after it; what is compiled is the outcome.
    if way.folded:
        try:
            model = fold_batchnorm(model)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(
                f"{entry.candidate.model} can't be timed with BatchNorm folded ({error}): leave "
                "out --fold, or this model"
            ) from error
    if way.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if way.compiled:
        model.compile()
    return model


class Bench(NamedTuple):
    """Where and how much is measured, and where it is kept."""

    config: TrainConfig
    device: torch.device
    store: Store
    bar: Bar
    large_batch: int  # images; 0: no such measurement
    limit: float = math.inf  # multiply-adds of one timed pass
    seconds: float = 0.15  # of one measurement
    fold: bool = False  # time networks with BatchNorm folded into the convolutions

    @classmethod
    def open(cls, config: Any, device: torch.device, run: Run, bar: Bar) -> Bench:
        """With what was measured in the run's folder before, on this machine."""
        cpu = device.type == "cpu"
        setup = {"device": describe(device), "threads": torch.get_num_threads()}
        setup |= {"torch": torch.__version__, "amp": config.amp, "compile": config.compile}
        setup |= {"pass_limit": config.pass_limit}
        limit = config.pass_limit if config.pass_limit is not None else 5.0 if cpu else 0.0  # GMACs
        limit = 1e7 if config.smoke else 1e9 * limit or math.inf
        store = Store(run.folder / "profiles.json", setup, run.resumed)
        return cls(config, device, store, bar, 8 if cpu else 64, limit, fold=config.fold)

    def for_small(self) -> Bench:
        """The same for small images, of which more fit into a batch."""
        return self._replace(large_batch=128, limit=4 * self.limit)

    def measure(self, entry: Entry, sweep: str, way: Way, more: bool = True) -> Candidate:
        """The candidate with its times, from the store if they are there: `sweep` names them, and
        two ways of running need two names.
        """
        c = entry.candidate
        key = f"{c.task}, {c.model}, {c.params} parameters, {c.input_px} px, {sweep}"
        if self.store.get(key) is None:
            self.store.put(key, self.timed(entry, way, more))
        self.bar.advance(1, c.model)
        # Counts come from the definition as it is now, times from the store.
        kept = self.store.get(key)
        return replace(c, **{name: kept[name] for name in MEASURED})

    def timed(self, entry: Entry, way: Way, more: bool) -> Candidate:
        """The candidate with latency for one image, and `more`: throughput of a large batch, and
        peak memory. A pass of more multiply-adds than the limit is left out.
        """
        candidate = entry.candidate
        if candidate.macs > self.limit:
            return candidate
        model = prepared(entry, self.device, way)
        layout = torch.channels_last if way.channels_last else torch.contiguous_format

        def images(count: int) -> Tensor:
            size = (count, 3, candidate.input_px, candidate.input_px)
            return torch.zeros(size, device=self.device).contiguous(memory_format=layout)

        median, spread = time_passes(model, images(1), way.amp, self.seconds)
        found = {"latency_ms": median, "latency_iqr_ms": spread}
        found |= {"device": describe(self.device), "dtype": way.dtype}
        if more:
            found["memory_mb"] = peak_memory(model, images(1), way.amp) / 2**20
        n = self.large_batch
        if more and n and candidate.macs * n <= self.limit:
            median, _ = time_passes(model, images(n), way.amp, self.seconds)
            found |= {"batch_size": n, "images_per_second": 1000 * n / median}
        return replace(candidate, **found)

    def sweeps(self, entries: Sequence[Entry]) -> tuple[list[Candidate], str]:
        """All models, SWEEPS times over; of the latencies of each the lowest, and in words how far
        the first half of the sweeps and the second agree, and what was folded.

        Whatever else the machine did in a slower sweep, it did not make the model faster.
        """
        every = []
        for n in range(1, SWEEPS + 1):
            name = f"sweep {n}{', folded' * self.fold}"
            every.append([self.measure(e, name, self.usual_way(e), more=n == 1) for e in entries])
        first, second = (
            [functools.reduce(faster, rows) for rows in zip(*half)]
            for half in (every[: SWEEPS // 2], every[SWEEPS // 2 :])
        )
        told = agreement(first, second) + f"; in all of them {FOLDED}" * self.fold
        return [faster(a, b) for a, b in zip(first, second)], told

    def usual_way(self, entry: Entry) -> Way:
        """channels_last where it pays, mixed precision on a GPU, compiled and folded if asked.

        On a CPU always float32, so that machines with and without AMX measure the same thing;
        `all_ways` shows what bfloat16 gives.
        """
        side = entry.candidate.input_px
        amp = amp_dtype(self.device, self.config.amp and self.device.type != "cpu", side)
        channels_last = memory_format(side) is torch.channels_last
        return Way(amp, channels_last, self.config.compile, self.fold)

    def ways(self, entry: Entry) -> list[Way]:
        """Every way that this device has, MOST_WAYS at most, each with what came before: plain,
        channels_last, BatchNorm folded where there is one; then mixed precision, folded if the
        config says so, and compiled likewise.
        """
        amp = amp_dtype(self.device, True, entry.candidate.input_px)
        with torch.device("meta"):
            norms = any(isinstance(m, nn.BatchNorm2d) for m in entry.build().modules())
        fold = self.fold and norms
        ways = [Way(), Way(channels_last=True)]
        ways += [Way(channels_last=True, folded=True)] * norms
        ways += [Way(amp, True, folded=fold)] * (amp is not None)
        ways += [Way(amp, True, True, fold)] * self.config.compile
        return ways

    def all_ways(self, entries: Sequence[Entry]) -> list[Candidate]:
        """Of the networks those in SHOWN_WAYS, each in every way."""
        rows = []
        for entry in (e for e in entries if e.candidate.model in SHOWN_WAYS):
            ways = self.ways(entry)
            for way in ways:
                row = self.measure(entry, str(way), way)
                own = {"thop_macs": None, "thop_note": "", "top1": None, "top5": None}
                rows.append(replace(row, model=f"{row.model}: {way}", **own))
            self.bar.advance(MOST_WAYS - len(ways))
        return rows


def faster(first: Candidate, second: Candidate) -> Candidate:
    """The first, with the second's latency if that is lower."""
    if first.latency_ms is None or second.latency_ms >= first.latency_ms:
        return first
    return replace(first, latency_ms=second.latency_ms, latency_iqr_ms=second.latency_iqr_ms)


def agreement(first: Sequence[Candidate], second: Sequence[Candidate]) -> str:
    """How alike two measurements rank the models by latency: in how many pairs the same one is
    faster. The order of two that are closer than 5% in both means nothing: they count as alike.
    """
    timed = [(a.latency_ms, b.latency_ms) for a, b in zip(first, second) if a.latency_ms]
    pairs = list(itertools.combinations(timed, 2))
    if not pairs:
        return "one model was timed" if timed else "none was timed"
    gaps = [[math.log(one / other) for one, other in zip(p, q)] for p, q in pairs]
    alike = sum(one * two >= 0 or max(abs(one), abs(two)) <= 0.05 for one, two in gaps)
    return f"measured twice, {alike} of {len(pairs)} pairs of {len(timed)} models rank alike"
