"""Timing many models: what the sweeps keep, how they are compared, weights that compute
something.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from common.comparison import sweeps
from common.comparison.results import Candidate
from common.comparison.sweeps import Bench, Entry, Way, agreement, faster, with_weights
from common.config import TrainConfig
from common.engine.files import Store
from common.engine.progress import Bar
from common.lessons import get_model


def candidate(model: str, latency_ms: float | None = None, macs: int = 1000) -> Candidate:
    return Candidate("test", model, "01", 2015, 8, 1, macs, latency_ms=latency_ms)


def sweep(*latencies: float | None) -> list[Candidate]:
    return [candidate(str(i), latency) for i, latency in enumerate(latencies)]


def test_agreement_counts_pairs_that_changed_places() -> None:
    same = agreement(sweep(1.0, 2.0, 3.0, None), sweep(1.5, 2.5, 3.5, None))
    assert same == "measured twice, 3 of 3 pairs of 3 models rank alike"
    assert "2 of 3" in agreement(sweep(1.0, 2.0, 3.0), sweep(2.0, 1.0, 3.0))
    assert "0 of 3" in agreement(sweep(1.0, 2.0, 3.0), sweep(3.0, 2.0, 1.0))
    # One alone has no order.
    assert agreement(sweep(1.0, None), sweep(2.0, None)) == "one model was timed"
    assert agreement(sweep(None), sweep(None)) == "none was timed"
    # Two that are 1 % apart have no order that could change.
    assert "3 of 3" in agreement(sweep(1.00, 1.01, 3.0), sweep(1.01, 1.00, 3.0))


def test_the_less_disturbed_latency_counts() -> None:
    assert faster(candidate("a", 3.0), candidate("a", 2.0)).latency_ms == 2.0
    assert faster(candidate("a", 2.0), candidate("a", 3.0)).latency_ms == 2.0
    assert faster(candidate("a"), candidate("a")).latency_ms is None


def test_the_lowest_of_all_sweeps_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the halves are compared: here a and b change places between them."""
    seen = {"a": iter((9.0, 4.0, 2.0, 5.0)), "b": iter((3.0, 8.0, 7.0, 6.0))}

    def disturbed(bench: Bench, entry: Entry, *rest: object) -> Candidate:
        return candidate(entry.candidate.model, next(seen[entry.candidate.model]))

    monkeypatch.setattr(Bench, "timed", disturbed)
    store, bar = Store(tmp_path / "profiles.json", {}), Bar(8, "test", show=False)
    bench = Bench(TrainConfig(), torch.device("cpu"), store, bar, large_batch=0)
    rows, told = bench.sweeps([Entry(nn.Identity, candidate(name)) for name in "ab"])
    assert [row.latency_ms for row in rows] == [2.0, 3.0]
    assert told == "measured twice, 0 of 1 pairs of 2 models rank alike"
    assert bar.done == 2 * sweeps.SWEEPS


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "simple_cnn", "vit_xs_16"])
def test_random_weights_compute_something(name: str) -> None:
    """Neither zeros nor infinities, which would be timed without the work."""
    with torch.device("meta"):
        model = get_model(name)(num_classes=10, small_input=True)
    model = with_weights(model, torch.device("cpu"))
    with torch.no_grad():
        logits = model(torch.randn(2, 3, 32, 32))
    assert logits.isfinite().all() and logits.std() > 0
    assert not any(p.is_meta for p in (*model.parameters(), *model.buffers()))


def test_what_is_measured_is_kept_and_counts_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = partial(get_model("lenet5"), num_classes=10)
    path, config = tmp_path / "profiles.json", TrainConfig(amp=False)
    bar = Bar(10, "test", show=False)

    def bench(**settings: object) -> Bench:
        store = Store(path, {"torch": "2", **settings})
        return Bench(config, torch.device("cpu"), store, bar, large_batch=4, seconds=0.0)

    [first], _ = bench().sweeps([Entry(build, candidate("lenet5"))])
    assert first.latency_ms > 0 and first.images_per_second > 0 and first.memory_mb > 0
    assert first.batch_size == 4 and first.dtype == "float32"

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "timed", None)  # would fail if it were called
        [again], _ = bench().sweeps([Entry(build, candidate("lenet5", macs=999))])
    assert again.latency_ms == first.latency_ms and again.macs == 999

    [other], _ = bench(compile=True).sweeps([Entry(build, candidate("lenet5"))])
    assert other.latency_ms != first.latency_ms


def norms_of(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "kept"),
    # By hand: in DenseNet the norm in front of each of the 6 + 12 + 24 + 16 layers stays, and those
    # in front of 3 transitions and the head.
    [("resnet20", 0), ("mobilenet_v2", 0), ("densenet121", 58 + 3 + 1), ("vit_xs_16", 0)],
)
def test_a_folded_way_runs_without_the_norms_that_follow_a_convolution(
    name: str, kept: int
) -> None:
    entry = Entry(partial(get_model(name), num_classes=10, small_input=True), candidate(name))
    device = torch.device("cpu")
    folded = sweeps.prepared(entry, device, Way(channels_last=True, folded=True))
    assert norms_of(folded) == kept
    # Folding made these weights; the layout that was asked for has to come after it.
    convolutions = [m.weight for m in folded.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in convolutions)
    assert norms_of(sweeps.prepared(entry, device, Way())) == norms_of(entry.build())


def test_a_wrong_fold_is_seen_with_the_weights_that_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If every norm were the identity, leaving them all out would pass the check."""
    from torch.fx.experimental import optimization

    from common.engine.errors import UserError

    monkeypatch.setattr(optimization, "fuse_conv_bn_eval", lambda conv, norm: conv)
    entry = Entry(partial(get_model("resnet20"), num_classes=10), candidate("resnet20"))
    with pytest.raises(UserError, match=r"resnet20 can't be timed with BatchNorm folded \(ResNet "):
        sweeps.prepared(entry, torch.device("cpu"), Way(folded=True))


def test_times_of_folded_nets_are_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Entry(partial(get_model("resnet20"), num_classes=10), candidate("resnet20"))

    def bench(fold: bool) -> Bench:
        bar = Bar(100, "test", show=False)
        store = Store(tmp_path / "profiles.json", {})
        return Bench(TrainConfig(), torch.device("cpu"), store, bar, 0, seconds=0.0, fold=fold)

    def norms_as_ms(bench: Bench, entry: Entry, way: Way, *rest: object) -> Candidate:
        """A clock that can't be disturbed: the latency is the number of norms."""
        norms = norms_of(sweeps.prepared(entry, bench.device, way))
        return candidate("resnet20", latency_ms=norms)

    monkeypatch.setattr(Bench, "timed", norms_as_ms)
    monkeypatch.setattr(sweeps, "SHOWN_WAYS", ("resnet20",))
    monkeypatch.setattr(sweeps, "agreement", lambda *_: "alike")  # zeros have no logarithm
    for _ in range(2):  # measured, then read back
        for fold, norms in ((False, 19), (True, 0)):
            [row], told = bench(fold).sweeps([entry])
            assert row.latency_ms == norms
            assert ("a norm in front of a convolution stays" in told) == fold
        rows = {row.model: row.latency_ms for row in bench(False).all_ways([entry])}
        assert rows["resnet20: float32"] == rows["resnet20: float32, channels_last"] == 19
        assert rows["resnet20: float32, folded, channels_last"] == 0


def test_no_folded_row_without_batchnorm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sweeps, "SHOWN_WAYS", ("vit_xs_16", "resnet20"))
    bar, counted = Bar(100, "test", show=False), []
    store = Store(tmp_path / "profiles.json", {})
    for name in ("vit_xs_16", "resnet20"):
        entry = Entry(partial(get_model(name), num_classes=10), candidate(name))
        for fold in (False, True):
            bench = Bench(TrainConfig(), torch.device("cpu"), store, bar, 0, limit=1, fold=fold)
            names = [row.model for row in bench.all_ways([entry])]
            assert len(set(names)) == len(names)
            assert any("folded" in n for n in names) == (name == "resnet20")
            assert any("folded" not in n for n in names)
            counted.append(bar.done)
    # However many ways a net has, the bar advances by as much.
    assert counted == [sweeps.MOST_WAYS * n for n in (1, 2, 3, 4)]


def test_a_pass_above_the_limit_is_not_timed() -> None:
    def unbuildable() -> nn.Module:
        raise AssertionError("should not be built")

    entry = Entry(unbuildable, candidate("large", macs=10**9))
    bench = Bench(TrainConfig(), torch.device("cpu"), None, None, 0, limit=1e8, seconds=0.1)
    assert bench.timed(entry, Way(), more=True).latency_ms is None


def test_a_damaged_store_is_one_clear_line(tmp_path: Path) -> None:
    from common.engine.errors import UserError

    (tmp_path / "trainings.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"trainings.json can't be read .* remove it"):
        Store(tmp_path / "trainings.json", {})
