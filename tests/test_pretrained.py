"""The course's own weights: made from a finished run only, loaded without a network, used as they
were trained.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import bundle, data, pretrained
from common.engine import checkpoint, processes
from common.engine import weights as stored
from common.engine.errors import UserError
from tests.conftest import lesson

CPU = torch.device("cpu")
TEN = [f"class{i}" for i in range(10)]
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
SHIPPED = stored.WEIGHTS


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*parts: object) -> None:
        raise AssertionError("a network connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(pretrained, "official_state", refuse)


@pytest.fixture(autouse=True)
def weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of weights of each test's own."""
    monkeypatch.setattr(stored, "WEIGHTS", tmp_path / "weights")
    return tmp_path / "weights"


@pytest.fixture
def finished(cli: Callable, tmp_path: Path, no_figures: None) -> Path:
    """A run of lesson 1 from its first to its last line, on a few noisy pictures."""
    images = str(make_pictures(tmp_path / "pictures", TEN))
    code, _, err = cli(
        "01", "--dataset", "folder", "--data-dir", images, "--model", "resnet20", "--epochs", "1",
        "--batch-size", "16", "--device", "cpu", "--no-zero-init-residual",
    )  # fmt: skip
    assert code == 0, err
    (result,) = (tmp_path / "runs").rglob("result.json")
    return result.parent


def make_pictures(folder: Path, classes: list[str], side: int = 32) -> Path:
    from PIL import Image

    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for j in range(10):
            noise = torch.rand(side, side, 3, generator=torch.Generator().manual_seed(100 * i + j))
            pixels = (255 * noise * torch.tensor([1.0, 0.6, 0.3])).byte().numpy()
            Image.fromarray(pixels).save(folder / name / f"{j}.png")
    return folder


def resnet20(num_classes: int = 10, **options: object) -> torch.nn.Module:
    return lesson("01").MODELS["resnet20"](num_classes=num_classes, **options)


# ------------------------------------------------------------------------------- making the file


def test_a_finished_run_becomes_a_file_with_the_same_logits_and_its_record(
    finished: Path, weights: Path, no_network: None, capsys: pytest.CaptureFixture
) -> None:
    bundle.main([str(finished), "--trained-on", "noise"])
    path = weights / "resnet20.pt"
    assert f"{path}: resnet20, 269,722 parameters" in capsys.readouterr().out
    record = json.loads((weights / "resnet20.json").read_text(encoding="utf-8"))
    result = json.loads((finished / "result.json").read_text(encoding="utf-8"))
    best = checkpoint.load(finished / "best.pt")

    told = ("test_top1", "epochs", "train_seconds", "seed", "hardware", "torch_version", "amp")
    assert {k: record[k] for k in told} == {k: result[k] for k in told}
    assert record["parameters"] == result["params"] == 269_722
    assert record["trained_on"] == "noise" and record["class_names"] == TEN
    assert str(finished.parent.parent) not in (weights / "resnet20.json").read_text()

    saved = torch.load(path, weights_only=True)
    assert "optimizer" not in saved and path.stat().st_size < 1.2e6
    assert record["sha256"] == bundle.digest(saved["state"])
    trained, ours = resnet20(), resnet20()
    trained.load_state_dict(best["model"])
    pretrained.load_pretrained(ours, "resnet20", TEN)
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(ours.eval()(x), trained.eval()(x))
    found = stored.find_bundle("resnet20")
    assert torch.equal(found.mean, best["mean"]) and torch.equal(found.std, best["std"])

    before = path.read_bytes(), (weights / "resnet20.json").read_bytes()
    bundle.main([str(finished), "--trained-on", "noise"])
    assert (path.read_bytes(), (weights / "resnet20.json").read_bytes()) == before
    assert sorted(p.name for p in weights.iterdir()) == ["resnet20.json", "resnet20.pt"]


def test_the_record_holds_the_shortest_command_that_gives_the_same_settings(
    finished: Path, weights: Path
) -> None:
    path = bundle.pack(finished)
    words = json.loads(path.with_suffix(".json").read_text())["command"].split()
    assert words[:2] == ["python", "01_resnet_beginner.py"]
    first = lesson("01")
    again = first.parse_flags(first.Config, words[2:]).resolve("folder")
    saved = json.loads((finished / "config.json").read_text())
    here = {"lesson", "data_dir", *first.Config.FREE_ON_RESUME}
    assert {k: v for k, v in again.to_dict().items() if k not in here} == {
        k: v for k, v in saved.items() if k not in here
    }
    assert set(words) >= {"--no-zero-init-residual", "--epochs", "--batch-size", "DIR"}
    assert not {"--lr", "--warmup", "--augment"} & set(words)  # the recipe gives them


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda run: (run / "result.json").unlink(),
            "holds no result.json: the run isn't finished",
        ),
        (lambda run: (run / "config.json").unlink(), "holds no config.json: it is no run folder"),
        (lambda run: (run / "result.json").write_text("{"), "result.json can't be read"),
        (lambda run: (run / "best.pt").unlink(), "no such checkpoint"),
        (lambda run: edit(run / "result.json", best_epoch=7), "of two different runs"),
        (lambda run: edit(run / "config.json", smoke=True), "a smoke run"),
        (lambda run: edit(run / "config.json", shortcut="B"), "another form today"),
    ],
)
def test_only_a_finished_and_whole_run_is_packed(
    damage: Callable, said: str, a_run: Path, weights: Path, capsys: pytest.CaptureFixture
) -> None:
    damage(a_run)
    with pytest.raises(SystemExit) as leaving:
        bundle.main([str(a_run)])
    err = capsys.readouterr().err
    assert leaving.value.code == 2 and said in err and err.count("\n") == 1
    assert not weights.exists()


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def a_run(tmp_path: Path) -> Path:
    """What a run leaves, without the training."""
    folder = tmp_path / "run"
    folder.mkdir()
    first = lesson("01")
    config = first.Config(model="resnet20", dataset="cifar10").resolve("cifar10")
    saved = {"lesson": first.__name__, **config.to_dict()}
    (folder / "config.json").write_text(json.dumps(saved))
    told = dict.fromkeys(
        "val_top1 epochs seed train_seconds images_per_second device hardware amp "
        "torch_version".split()
    )
    (folder / "result.json").write_text(json.dumps({**told, "best_epoch": 3, "test_top1": 0.5}))
    torch.manual_seed(0)
    best = {
        "lesson": first.__name__,
        "config": config.to_dict(),
        "model": resnet20().state_dict(),
        "class_names": TEN,
        "mean": torch.tensor([0.1, 0.2, 0.3]),
        "std": torch.tensor([0.4, 0.5, 0.6]),
        "best": {"epoch": 3},
    }
    checkpoint.save(folder / "best.pt", best)
    return folder


@pytest.fixture
def packed(a_run: Path, no_network: None) -> stored.Bundle:
    bundle.pack(a_run, "made-up images")
    return stored.find_bundle("resnet20")


# ------------------------------------------------------------------------------- using it


def test_the_classifier_stays_for_the_same_classes_and_no_others(
    packed: stored.Bundle,
) -> None:
    body = {k for k in packed.state if not k.startswith("head.")}
    for names in (TEN, TEN[::-1], [str(i) for i in range(10)], list("abc"), None):
        model = resnet20(len(names or TEN))
        pretrained.load_pretrained(model, "resnet20", names)
        state = model.state_dict()
        assert all(torch.equal(state[k], packed.state[k]) for k in body)
        kept = state["head.2.weight"].shape == packed.state["head.2.weight"].shape and torch.equal(
            state["head.2.weight"], packed.state["head.2.weight"]
        )
        assert kept == (names == TEN)
        assert model.get_classifier().out_features == len(names or TEN)


def test_digits_are_normalised_and_sized_as_the_weights_were_trained(
    packed: stored.Bundle, cli: Callable, tmp_path: Path, no_figures: None
) -> None:
    """In lesson 1 and lesson 8: in what the model sees, and in what the run saves."""
    flags = ["--dataset", "digits", "--pretrained", "--model", "resnet20", "--device", "cpu"]
    for number, more in (("01", []), ("08", ["--strategy", "full", "--no-compare"])):
        code, out, err = cli(number, *flags, "--smoke", *more)
        assert code == 0, err
        assert (
            "weights    resnet20 of the course, trained on made-up images: 10 classes at 32 px, "
            "test top-1 50.00%; its classifier is new" in out
            if number == "01"
            else "transfer   full, from the course's own resnet20" in out
        )
        (best,) = (tmp_path / "runs" / lesson(number).__name__).rglob("best.pt")
        saved = checkpoint.load(best)
        assert torch.equal(saved["mean"], packed.mean) and torch.equal(saved["std"], packed.std)
        assert saved["config"]["image_size"] == 32

    config = lesson("01").Config(dataset="digits", model="resnet20", pretrained=True)
    config = config.resolve("digits", 32)
    loaded = data.load_data(config, CPU, pretrained.weights_mean_std("resnet20"))
    x, pixels = loaded.test.take(range(2)), loaded.test.pixels[:2].float() / 255
    normal = (pixels - packed.mean.view(3, 1, 1)) / packed.std.view(3, 1, 1)
    torch.testing.assert_close(x, F.interpolate(normal, size=32, mode="bilinear"))


def test_the_classes_it_knows_keep_their_classifier_in_both_lessons(
    packed: stored.Bundle, cli: Callable, tmp_path: Path, no_figures: None
) -> None:
    images = str(make_pictures(tmp_path / "pictures", TEN))
    flags = ["--pretrained", "--model", "resnet20", "--device", "cpu", "--smoke", "--lr", "1e-30"]
    flags += ["--batch-size", "8", "--weight-decay", "0"]
    code, out, err = cli("01", "--dataset", "folder", "--data-dir", images, *flags)
    assert code == 0 and "classifier is kept: the classes are the same" in out, err
    code, out, err = cli("08", "--dataset", images, *flags, "--strategy", "full")
    assert code == 0 and "own resnet20 was trained on classes of these names (class0, " in out, err
    for best in (tmp_path / "runs").rglob("best.pt"):
        state = checkpoint.load(best)["model"]
        torch.testing.assert_close(state["head.2.weight"], packed.state["head.2.weight"])


def test_its_name_stands_for_a_run_to_predict_with_and_to_start_from(
    packed: stored.Bundle, cli: Callable, tmp_path: Path, no_figures: None
) -> None:
    from PIL import Image

    images = make_pictures(tmp_path / "pictures", ["one", "two"], side=40)
    picture = images / "one" / "0.png"
    code, out, err = cli("08", "--from", "resnet20", "--predict", str(picture), "--device", "cpu")
    assert code == 0, err
    assert (tmp_path / "runs" / lesson("08").__name__ / "resnet20" / "predictions.png").is_file()
    model = resnet20()
    model.load_state_dict(packed.state)
    with Image.open(picture) as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    x = F.interpolate(pixels.float() / 255, size=32, mode="bilinear", antialias=True)
    x = (x - packed.mean.view(3, 1, 1)) / packed.std.view(3, 1, 1)
    best = packed.class_names[int(model.eval()(x).argmax())]
    (line,) = (line for line in out.splitlines() if line.startswith("predict "))
    assert line.split()[2] == best

    code, out, err = cli(
        "08", "--from", "resnet20", "--dataset", str(images), "--smoke", "--batch-size", "4",
        "--strategy", "features", "--device", "cpu",
    )  # fmt: skip
    assert code == 0 and "features, from the course's own resnet20" in out, err
    assert "2 classes, 32 px" in out


@pytest.mark.parametrize(
    ("number", "flags", "said"),
    [
        ("01", ["--image-size", "96"], "--image-size 96: these weights are for 32 px"),
        ("08", ["--image-size", "224"], "--image-size 224: these weights are for 32 px"),
        ("01", ["--image-size", "96", "--summary"], "--image-size 96: these weights are for 32 px"),
        ("01", ["--shortcut", "B"], "don't fit this form of the model (stages.1.0.shortcut.0"),
    ],
)
def test_another_form_of_the_model_is_refused_in_one_line(
    number: str, flags: list[str], said: str, packed: stored.Bundle, cli: Callable
) -> None:
    shared = ["--dataset", "digits", "--pretrained", "--model", "resnet20", "--smoke"]
    code, _, err = cli(number, *shared, *flags)
    assert code == 2 and said in err and err.count("\n") == 1


def test_summary_is_of_the_size_of_the_weights(packed: stored.Bundle, cli: Callable) -> None:
    flags = ["--dataset", "digits", "--pretrained", "--model", "resnet20", "--summary"]
    code, out, err = cli("01", *flags)
    assert code == 0 and "resnet20 for digits: 10 classes, 32 px" in out, err


def test_a_damaged_or_missing_file_is_one_line(
    packed: stored.Bundle, weights: Path, cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = weights / "resnet20.pt"
    flags = ["--dataset", "digits", "--pretrained", "--model", "resnet20", "--smoke"]
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content, said in (
        (bytes(flipped), "fails its checksum"),
        (whole[:-1000], "is truncated"),
        (b"version https://", "is truncated"),
    ):
        path.write_bytes(content)
        code, _, err = cli("01", *flags)
        assert code == 2 and said in err and "get it anew" in err and err.count("\n") == 1
    checkpoint.save(path, {"model": {}})
    code, _, err = cli("01", *flags)
    assert code == 2 and "has no name: it was not made by" in err and err.count("\n") == 1
    path.unlink()
    monkeypatch.undo()  # torchvision is asked, and knows no resnet20; the network is not needed
    monkeypatch.setattr(stored, "WEIGHTS", weights)
    with pytest.raises(UserError, match="torchvision has no weights for it, nor"):
        pretrained.load_pretrained(resnet20(), "resnet20")


def test_half_precision_becomes_float32_and_only_the_main_process_speaks(
    a_run: Path, no_network: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    best = checkpoint.load(a_run / "best.pt")
    best["model"] = {k: v.half() if v.is_floating_point() else v for k, v in best["model"].items()}
    checkpoint.save(a_run / "best.pt", best)
    bundle.pack(a_run)
    state = stored.find_bundle("resnet20").state
    assert {v.dtype for v in state.values()} == {torch.float32, torch.int64}
    monkeypatch.setattr(processes, "is_main", lambda: False)
    pretrained.load_pretrained(resnet20(), "resnet20", TEN)
    assert capsys.readouterr().out == ""


def test_half_the_bytes_for_eleven_bits_of_each_number(
    a_run: Path, weights: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = bundle.pack(a_run).stat().st_size
    bundle.main([str(a_run), "--half"])
    assert (weights / "resnet20.pt").stat().st_size < 0.6 * whole
    state = checkpoint.load(a_run / "best.pt")["model"]
    for name, value in stored.find_bundle("resnet20").state.items():
        assert value.dtype == state[name].dtype
        torch.testing.assert_close(value, state[name], rtol=2**-11, atol=2**-24)

    best = checkpoint.load(a_run / "best.pt")
    best["model"]["stem.1.running_var"][0] = 1e5
    checkpoint.save(a_run / "best.pt", best)
    with pytest.raises(SystemExit):
        bundle.main([str(a_run), "--half"])
    assert "stem.1.running_var of best.pt is not finite in torch.float16" in capsys.readouterr().err
    bundle.pack(a_run)


# ------------------------------------------------------------------------------- the shipped file


@pytest.mark.parametrize("name", ["resnet20", "resnet9_wide"])
def test_the_shipped_networks_are_those_that_their_records_describe(
    name: str, monkeypatch: pytest.MonkeyPatch, no_network: None, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(stored, "WEIGHTS", SHIPPED)
    record = json.loads((SHIPPED / f"{name}.json").read_text(encoding="utf-8"))
    found = stored.find_bundle(name)
    assert found.describe() == (
        f"{name} of the course, trained on {record['trained_on']}: 10 classes at 32 px, "
        f"test top-1 {record['test_top1']:.2%}"
    )
    assert record["test_top1"] > 0.88 and "CIFAR-10" in record["trained_on"]
    assert found.class_names == record["class_names"] == CIFAR10
    file = SHIPPED / f"{name}.pt"
    assert bundle.digest(torch.load(file, weights_only=True)["state"]) == record["sha256"]
    assert file.stat().st_size < 10e6

    first = lesson("01")
    model = first.MODELS[name](num_classes=10)
    pretrained.load_pretrained(model, name, CIFAR10)
    assert "classifier is kept" in capsys.readouterr().out
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    assert model.eval()(torch.randn(2, 3, 32, 32)).isfinite().all()

    # The record's command is one of lesson 1, and every BatchNorm has counted the steps of its
    # epochs up to the best one, after those of the training that it went on from (34).
    words = record["command"].split()
    config = first.parse_flags(first.Config, words[2:]).resolve("folder")
    assert words[1] == f"{first.__name__}.py" and config.model == name
    assert config.epochs == record["epochs"] and config.seed == record["seed"]
    assert config.image_size == record["image_size"] == 32 and config.data_dir == "DIR"
    counts = {int(v) for n, v in found.state.items() if n.endswith("num_batches_tracked")}
    steps = round(50_000 * (1 - config.val_share)) // config.batch_size
    assert counts == {(record["best_epoch"] + (34 if config.pretrained else 0)) * steps}
    # The mean and deviation that the literature normalises CIFAR-10 with.
    assert found.mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.003)
    assert found.std.tolist() == pytest.approx([0.2470, 0.2435, 0.2616], abs=0.003)
