"""Any value of any knob: an exit code of 0 or 2, and one line where it is 2.

KNOBS=1000 pytest -s tests/test_values.py  # 1,000 values of each knob, and how many were taken
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from common import limits
from common.comparison.results import parse_size
from common.config import TrainConfig
from common.engine.errors import UserError
from tests.conftest import LESSONS, lesson

DRAWS = int(os.environ.get("KNOBS", 3))
CODES: Counter[int] = Counter()  # of all values of all knobs
SHARED = {spec.name for spec in fields(TrainConfig)}


def knobs() -> Iterator[tuple[str, str]]:
    """The shared ones in lesson 1, each lesson's own in itself."""
    for name in LESSONS:
        for spec in fields(lesson(name[:2]).Config):
            if name.startswith("01") or spec.name not in SHARED:
                yield name[:2], spec.name


def values(number: str, knob: str) -> st.SearchStrategy[str]:
    """Numbers of any size, the edges of what is allowed and what lies between, texts, nothing."""
    kind = lesson(number).Config
    (spec,) = (spec for spec in fields(kind) if spec.name == knob)
    low, high = spec.metadata.get("low"), spec.metadata.get("high")
    some = [st.integers().map(str), st.floats().map(repr), st.text(max_size=40)]
    some.append(st.sampled_from(["", "0", "-1", "1e999", "-inf", "nan", "0x10", "9" * 5000, "2,3"]))
    some += [st.sampled_from([c for c in spec.metadata.get("choices") or ("",)])]
    if low is not None:
        some += [st.sampled_from([str(low), str(high)]), st.floats(low, high).map(repr)]
        some += [st.integers(int(low), int(high)).map(str)]
    return st.one_of(some)


def company(number: str, knob: str) -> list[str]:
    """The flags without which a knob would do nothing."""
    needs = lesson(number).Config.__dataclass_fields__[knob].metadata["only"]
    needs = needs.split(",")[0].split()  # any one of several experiments
    return [*needs, next(iter(lesson(number).EXPERIMENTS))] if needs == ["--experiment"] else needs


def told(number: str, *argv: str) -> tuple[int, str]:
    """Exit code and stderr of a lesson that is told to do nothing once its flags are accepted."""
    module = lesson(number)
    module_argv, sys.argv = sys.argv, [f"{module.__name__}.py", *argv]
    out, err = io.StringIO(), io.StringIO()
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            config = module.parse_flags(module.Config)
            models = {config.model: None} if number == "07" else module.MODELS
            nothing: Callable[[object], None] = lambda config: None  # noqa: E731
            module.main(
                config, models, module.build, nothing, dict.fromkeys(module.EXPERIMENTS, nothing)
            )
    except SystemExit as leaving:
        code = leaving.code or 0
    finally:
        sys.argv = module_argv
    return code, err.getvalue()


@pytest.fixture(scope="module", autouse=True)
def counted_once() -> Iterator[None]:
    """Nothing but these settings decides whether the machine is large enough."""
    real, seen = limits.check_size, {}
    read = {"model", "dataset", "image_size", "batch_size", "epochs", "ema", "smoke", "device"}

    def once(config: TrainConfig, *rest: object) -> None:
        own = {k: v for k, v in config.to_dict().items() if k in read or k not in SHARED}
        key = repr((type(config).__module__, own))
        if key not in seen:
            seen[key] = None
            try:
                real(config, *rest)
            except UserError as error:
                seen[key] = str(error)
        if seen[key]:
            raise UserError(seen[key])

    limits.check_size = once
    yield
    limits.check_size = real
    print(f"\n{CODES.total():,} values: {CODES[0]:,} taken, {CODES[2]:,} refused in one line")


@pytest.mark.parametrize(("number", "knob"), list(knobs()))
@pytest.mark.timeout(3600 if DRAWS > 10 else 60)
def test_any_value_is_taken_or_refused_in_one_line(number: str, knob: str, tmp_path: Path) -> None:
    flag, more = "--" + knob.replace("_", "-"), company(number, knob)
    more *= more != ["--summary"]  # it would be printed

    @settings(
        max_examples=DRAWS,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(values(number, knob))
    def check(value: str) -> None:
        code, err = told(number, "--dataset=digits", "--device=cpu", *more, f"{flag}={value}")
        lines = [line for line in err.split("\n") if line]
        CODES[code] += 1
        assert code in (0, 2), (value, code, err)
        assert len(lines) == (code == 2), (value, err)
        assert code == 0 or err.startswith("error: "), (value, err)

    check()


@pytest.mark.parametrize(("number", "knob"), [k for k in knobs() if company(*k)])
def test_what_would_do_nothing_is_refused(number: str, knob: str) -> None:
    flags, spec = company(number, knob), lesson(number).Config.__dataclass_fields__[knob]
    value = {"shift": "noisy", "target_dir": "."}.get(knob)
    value = value or next(
        v for v in (spec.metadata[k] for k in ("low", "high")) if v != spec.default
    )
    flag = f"--{knob.replace('_', '-')}={value}"
    code, err = told(number, flag)
    assert code == 2 and f"is for {spec.metadata['only']}, " in err
    assert told(number, *flags, flag) == (0, "")


@pytest.mark.parametrize(
    ("flags", "beside"),
    [
        (["--lr=0.1", "--base-lr=0.2"], "--lr"),
        (["--optimizer=adamw", "--momentum=0.5"], "--optimizer adamw"),
        (["--augment=none", "--still=0.5"], "--augment none"),
    ],
)
def test_a_flag_that_another_makes_idle_is_refused(flags: list[str], beside: str) -> None:
    code, err = told("01", "--dataset=digits", "--device=cpu", *flags)
    assert code == 2 and f"would do nothing beside {beside}" in err
    for flag in flags:
        assert told("01", "--dataset=digits", "--device=cpu", flag) == (0, "")


def test_what_would_do_nothing_on_the_way_is_refused_too(tmp_path: Path) -> None:
    """A plain training has no seeds to add; one that was begun with some still goes on."""
    begun = {"lesson": "01_resnet_beginner", **lesson("01").Config(deep=7).to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(begun))
    assert told("01", "--resume", str(tmp_path)) == (0, "")
    begun |= lesson("01").Config(base_lr=0.1).resolve("digits").to_dict()  # with the rate it gives
    (tmp_path / "config.json").write_text(json.dumps(begun))
    assert told("01", "--resume", str(tmp_path), "--base-lr", "0.1") == (0, "")
    code, err = told("01", "--resume", str(tmp_path), "--seeds", "5")
    assert code == 2 and "--seeds is for --experiment, " in err


def test_a_name_that_does_not_exist_is_the_first_mistake() -> None:
    code, err = told("04", "--experiment", "serach", "--nets", "20")
    assert code == 2 and "serach" in err


# What once ended in a traceback, was taken without a word, or never ended.
REFUSED = [
    ("01", "--label-smoothing=2"), ("01", "--ema=1.5"), ("01", "--ema=inf"), ("01", "--ema=1"),
    ("01", "--warmup=inf"), ("01", f"--seed={2**64}"), ("01", f"--cutout={2**70}"),
    ("01", "--image-size=100000"), ("01", f"--image-size={2**40}"), ("01", "--image-size=20000"),
    ("01", "--image-size=4096"), ("01", "--momentum=2"), ("01", "--depths=60000002"),
    ("01", "--batch-size=1000000"), ("01", "--epochs=nan"), ("02", "--dropout=2"),
    ("03", "--width-mult=inf"), ("03", "--width-mult=1e6"), ("03", "--clock=inf"),
    ("04", "--depth-mult=inf"), ("04", "--budget=0"), ("08", "--seeds=0"), ("08", "--seeds=-2"),
    ("08", "--rate-decay=inf"), ("08", "--imbalance=inf"), ("05", "--width-mults=1,inf"),
    ("01", "--resume=\n"), ("01", "--resume=a\r\nb"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "flag"), REFUSED)
def test_nonsense_is_refused(number: str, flag: str) -> None:
    code, err = told(number, "--dataset", "digits", "--device", "cpu", flag)
    assert code == 2 and len(err.strip().split("\n")) == 1, err
    assert flag.split("=")[0] in err or "GiB of memory" in err


def test_what_would_take_years_is_refused() -> None:
    flags = "--dataset=cifar10 --epochs=10000 --image-size=512 --device=cpu --batch-size=8"
    code, err = told("01", *flags.split())
    assert code == 2 and "days here, at the very least" in err


@pytest.mark.parametrize("text", ["1", "0", "9K", "1e3", "101G", "inf"])
def test_a_size_that_no_net_has(text: str) -> None:
    with pytest.raises(UserError, match=f"--match-to {text}: "):
        parse_size(text, "--match-to")
