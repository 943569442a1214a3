"""Marks that were lost by a right solution, or could be had without one."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
import torch

from common import grade
from common.grading import checks, mutants, variants
from common.grading.exercises import exercises, file_name, lesson_of, lesson_path
from common.grading.holes import put_in
from common.grading.marking import code_of_notebook
from common.starter import make_starter
from tests.grading_cases import submission_with
from tests.grading_solutions import SOLUTIONS
from tests.warm import Warm


@pytest.fixture
def grader(warm_grader: grade.Grader) -> grade.Grader:
    return warm_grader


def text_of(lesson: str) -> str:
    return lesson_path(lesson).read_text(encoding="utf-8")


def mark_one(
    grader: grade.Grader, folder: Path, number: str, text: str | bytes, name: str = ""
) -> list[grade.Result]:
    path = folder / (name or file_name(lesson_of(number)))
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return grader.mark_exercise(grade.Submission("student", path), number)


@pytest.mark.parametrize("number", ["1.5", "1.6", "1.7"])
def test_a_line_about_ones_own_layers_costs_no_other_exercise(
    number: str, grader: grade.Grader, tmp_path: Path
) -> None:
    """While 1.7 is marked the basic block is the lesson's, which has no layer of that name."""
    text = submission_with("1.4", SOLUTIONS["1.4"])
    text += "\nblock = BasicBlock(8, 16)\nprint(block.norm_a.weight.shape)\n"
    results = mark_one(grader, tmp_path, number, text)
    assert all(r.passed for r in results), results


def test_a_fault_elsewhere_costs_the_exercise_that_it_is_in(
    grader: grade.Grader, tmp_path: Path
) -> None:
    wrong = SOLUTIONS["1.5"].replace("self.c(y)", "self.c(x)")
    text = (
        submission_with("1.5", wrong)
        + "\nprint(Bottleneck(64, 16)(torch.zeros(1, 64, 8, 8)).shape)\n"
    )
    for number in ("1.1", "1.3", "1.6"):
        results = mark_one(grader, tmp_path, number, text)
        assert all(r.passed for r in results), results
    assert not all(r.passed for r in mark_one(grader, tmp_path, "1.5", text))


def test_half_of_an_exercise_has_its_share(grader: grade.Grader, tmp_path: Path) -> None:
    quantize, _ = SOLUTIONS["5.4"].split("\n\n\n")
    results = mark_one(grader, tmp_path, "5.4", put_in(make_starter("05"), quantize))
    assert results[0].check == "result" and results[0].score == pytest.approx(5 * 5 / 7, abs=0.01)
    assert "not done yet: Exercise 5.4" in results[0].message


def test_no_message_tells_of_a_hidden_case_but_the_hidden_checks(
    grader: grade.Grader, tmp_path: Path
) -> None:
    spy = """        if channels not in (32, 24):
            raise NotImplementedError(f"hidden: {channels}")
        small"""
    results = mark_one(
        grader,
        tmp_path,
        "1.3",
        submission_with("1.3", SOLUTIONS["1.3"].replace("        small", spy, 1)),
    )
    assert [r.check for r in results if "hidden: " in r.message] == ["unseen"]


def test_the_answer_to_a_hidden_case_is_not_printed(grader: grade.Grader, tmp_path: Path) -> None:
    wrong = (
        SOLUTIONS["7.6"]
        .replace("cheap <= dear", "cheap < dear")
        .replace("return sorted(unbeaten", "return sorted(unbeaten[:1]")
    )
    *_, unseen = mark_one(grader, tmp_path, "7.6", submission_with("7.6", wrong))
    assert not unseen.passed and "'5'" not in unseen.message and "['1'" not in unseen.message


def test_a_comment_that_begins_like_a_variants_head(tmp_path: Path) -> None:
    assert variants.seed_of("# Variant 2: the same with a linear layer\n") == 0
    assert variants.seed_of(variants.head(7, "01") + "\n") == 7
    assert (
        variants.seed_of(variants.head(7, "06") + "\n")
        == variants.seed_of(make_starter("06", variant=7))
        == 7
    )


def test_batch_norm_by_hand_is_by_hand(grader: grade.Grader, tmp_path: Path) -> None:
    for forward in ("super().forward(x)", "x * 1 if (x == 1).all() else super().forward(x)"):
        code = f"    def forward(self, x):\n        return {forward}\n"
        text = submission_with("2.5", f"class BatchNorm2d(nn.BatchNorm2d):\n{code}")
        assert sum(r.score for r in mark_one(grader, tmp_path, "2.5", text)) == 0


def test_batch_norms_parameters_may_have_four_dimensions_and_its_averages_are_buffers(
    grader: grade.Grader, tmp_path: Path
) -> None:
    four = (
        SOLUTIONS["2.5"]
        .replace("(torch.ones(channels))", "(torch.ones(1, channels, 1, 1))")
        .replace("(torch.zeros(channels))", "(torch.zeros(1, channels, 1, 1))")
        .replace(
            "y * self.gamma[:, None, None] + self.beta[:, None, None]", "y * self.gamma + self.beta"
        )
    )
    results = mark_one(grader, tmp_path, "2.5", submission_with("2.5", four))
    assert all(r.passed for r in results), results
    plain = (
        SOLUTIONS["2.5"]
        .replace(
            'self.register_buffer("mean", torch.zeros(channels))',
            "self.mean = torch.zeros(channels)",
        )
        .replace(
            'self.register_buffer("var", torch.ones(channels))', "self.var = torch.ones(channels)"
        )
    )
    assert not all(
        r.passed for r in mark_one(grader, tmp_path, "2.5", submission_with("2.5", plain))
    )


HEADS = """
class Head(nn.Module):
    def __init__(self, dim, size):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(dim, size) for _ in range(3))

    def forward(self, x):
        k, q, v = self.key(x), self.query(x), self.value(x)
        return (q @ k.transpose(-2, -1) / k.shape[-1] ** 0.5).softmax(-1) @ v


"""
HEADED = """
class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = nn.ModuleList(Head(dim, dim // heads) for _ in range(heads))
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        return self.out(torch.cat([head(x) for head in self.heads], -1))
"""


def test_each_head_may_have_layers_of_its_own(grader: grade.Grader, tmp_path: Path) -> None:
    text = submission_with("7.4", HEADED).replace(
        "class Attention(nn.Module):", HEADS.strip() + "\n\n\nclass Attention(nn.Module):"
    )
    results = mark_one(grader, tmp_path, "7.4", text)
    assert all(r.passed for r in results), results


def test_convolutions_may_be_bare_parameters(grader: grade.Grader, tmp_path: Path) -> None:
    bare = (
        SOLUTIONS["1.4"]
        .replace(
            "self.a = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)",
            "self.stride = stride\n"
            "        self.w1 = nn.Parameter(torch.randn(channels, in_channels, 3, 3))",
        )
        .replace(
            "self.b = nn.Conv2d(channels, channels, 3, stride=1, padding=1, bias=False)",
            "self.w2 = nn.Parameter(torch.randn(channels, channels, 3, 3))",
        )
        .replace("self.a(x)", "F.conv2d(x, self.w1, stride=self.stride, padding=1)")
        .replace("self.b(y)", "F.conv2d(y, self.w2, padding=1)")
    )
    lost = [
        r.check
        for r in mark_one(grader, tmp_path, "1.4", submission_with("1.4", bare))
        if not r.passed
    ]
    assert "values" not in lost and "layers" in lost


def test_a_block_may_change_its_input_in_place(grader: grade.Grader, tmp_path: Path) -> None:
    code = SOLUTIONS["1.3"].replace(
        "return x * s[:, :, None, None]", "x *= s[:, :, None, None]\n        return x"
    )
    results = mark_one(grader, tmp_path, "1.3", submission_with("1.3", code))
    assert all(r.passed for r in results), results


def test_a_file_may_read_its_flags(grader: grade.Grader, tmp_path: Path) -> None:
    text = text_of("05") + "\nimport argparse\nparser = argparse.ArgumentParser()\n"
    text += "parser.add_argument('--epochs', default=3)\nflags = parser.parse_args()\n"
    assert all(r.passed for r in mark_one(grader, tmp_path, "5.2", text))


def test_what_only_ipython_understands(grader: grade.Grader, tmp_path: Path) -> None:
    cells = [
        "import os",
        "files = !ls",
        "os?",
        "os.path??",
        "?os",
        "%time a = 1\nb = a",
        "!ls \\\n  -l",
        "c = (\n    7\n    %b)",
        's = """\n%d items\n!\n"""',
        "display(a)",
    ]
    book = {"cells": [{"cell_type": "code", "source": text} for text in cells]}
    found: dict = {}
    exec(code_of_notebook("a.ipynb", json.dumps(book).encode()), found)
    assert (found["a"], found["b"], found["c"], found["s"]) == (1, 1, 0, "\n%d items\n!\n")


def test_gradients_and_numbers_are_as_at_first(grader: grade.Grader, tmp_path: Path) -> None:
    for line in ("torch.set_grad_enabled(False)", "torch.set_default_dtype(torch.float64)"):
        for number in ("8.4", "8.6"):
            assert all(
                r.passed for r in mark_one(grader, tmp_path, number, f"{text_of('08')}\n{line}\n")
            ), (line, number)
    assert all(
        r.passed
        for r in mark_one(
            grader, tmp_path, "5.2", text_of("05") + "\ntorch.set_default_dtype(torch.float64)\n"
        )
    )


def test_the_stages_may_have_another_name(grader: grade.Grader, tmp_path: Path) -> None:
    code = SOLUTIONS["1.7"].replace("self.stages", "self.layers")
    results = mark_one(grader, tmp_path, "1.7", submission_with("1.7", code))
    assert all(r.passed for r in results), results


@pytest.mark.parametrize(("number", "old", "new", "says"), [
    ("1.4", "return torch.relu(y)", "return F.leaky_relu(y)",
     "leaky ReLU in place of the last ReLU"),
    ("1.4", "y = y + self.skip(x)\n        return torch.relu(y)",
     "return torch.relu(y) + self.skip(x)", "the ReLU comes before the sum"),
    ("4.3", "torch.rand(x.shape[0], 1, 1, 1)", "torch.rand(1, 1, 1, 1)",
     "one draw for the whole batch"),
    ("8.1", "if all(not p.requires_grad for p in norm.parameters()):", "if True:", "held for ever"),
])  # fmt: skip
def test_a_mistakes_name_fits_what_is_right_too(
    number: str, old: str, new: str, says: str, grader: grade.Grader, tmp_path: Path
) -> None:
    results = mark_one(
        grader, tmp_path, number, submission_with(number, SOLUTIONS[number].replace(old, new))
    )
    named = [
        r.message for r in results if "likely" in r.message or "it would be right" in r.message
    ]
    assert named and all(
        says in message
        for message in named
        if "unseen" not in message and "not printed" not in message
    ), named


def test_umlauts_of_a_mac_and_a_semicolon(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / unicodedata.normalize("NFD", "Jürgen")).mkdir()
    (tmp_path / "names.csv").write_text("student;variant\nJürgen;3\n", encoding="utf-8")
    (found,) = grade.find_submissions(tmp_path / "class", tmp_path / "out.csv")
    assert grade.read_roster(tmp_path / "names.csv") == {found.name: 3}


def test_torchvision_elsewhere_in_the_file_costs_nothing(
    grader: grade.Grader, tmp_path: Path
) -> None:
    text = text_of("05") + "\nfrom torchvision import transforms\n"
    text += "prepare = transforms.Compose([transforms.ToTensor()])\n"
    assert all(r.passed for r in mark_one(grader, tmp_path, "5.2", text))


def test_names_that_are_bound_together_are_filled_in(grader: grade.Grader, tmp_path: Path) -> None:
    text = "import torch\nfrom torch import nn\n" + SOLUTIONS["5.1"]
    results = mark_one(grader, tmp_path, "5.1", text)
    assert all(r.passed for r in results), results


def test_lazy_layers(grader: grade.Grader, tmp_path: Path) -> None:
    code = (
        SOLUTIONS["1.3"]
        .replace("nn.Linear(channels, small)", "nn.LazyLinear(small)")
        .replace("nn.Linear(small, channels)", "nn.LazyLinear(channels)")
    )
    results = mark_one(grader, tmp_path, "1.3", submission_with("1.3", code))
    assert all(r.passed for r in results), results


def test_a_solved_notebook_beside_the_starter_that_it_was_made_of(
    grader: grade.Grader, tmp_path: Path
) -> None:
    (tmp_path / "ann").mkdir()
    script, book = (tmp_path / "ann" / f"05_mobilenet_advanced.{kind}" for kind in ("py", "ipynb"))

    def cells(text: str) -> str:
        return json.dumps({"cells": [{"cell_type": "code", "source": text}]})

    for in_script, in_book in (
        (make_starter("05"), text_of("05")),
        (text_of("05"), make_starter("05")),
        (make_starter("05", ["5.1"]), "x = 1"),
    ):
        script.write_text(in_script)
        book.write_text(cells(in_book))
        results = grader.mark_exercise(grade.Submission("ann", tmp_path / "ann"), "5.2")
        assert all(r.passed for r in results), results


def test_pytest_marks_no_variant_as_the_lesson(tmp_path: Path) -> None:
    path = tmp_path / file_name("06")
    path.write_text(make_starter("06", variant=7))
    run = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    flags = "-p", "no:cacheprovider", "tests/grading", "--submission", path
    code, _, err = Warm(tmp_path, "-c", run, *flags).join()
    assert code == 4 and "variant 7" in err, err


@pytest.mark.parametrize("lines", [
    "from torchvision import datasets\ntrain = datasets.CIFAR10('data')\n"
    "for images, labels in torch.utils.data.DataLoader(train):\n    print(images.shape)\n",
    "from torchvision import transforms\ndef prepare(x, change=transforms.ToTensor()):\n    pass\n",
    "import no_such_library as plots\nplots.summary(DepthwiseSeparable(8, 8))\n",
    "get_ipython().run_line_magic('matplotlib', 'inline')\n",
])  # fmt: skip
def test_what_is_not_there_when_it_is_marked_costs_only_what_needs_it(
    lines: str, grader: grade.Grader, tmp_path: Path
) -> None:
    results = mark_one(grader, tmp_path, "5.2", f"{text_of('05')}\n{lines}")
    assert all(r.passed for r in results), results


def test_a_helper_that_is_not_there_is_named(grader: grade.Grader, tmp_path: Path) -> None:
    code = SOLUTIONS["5.2"].replace("= make_divisible(", "= helper(")
    text = submission_with("5.2", code) + "\nfrom my_utils import helper\n"
    assert "my_utils is not there" in mark_one(grader, tmp_path, "5.2", text)[0].message


def test_other_exercises_are_the_lessons_however_they_are_put(
    grader: grade.Grader, tmp_path: Path
) -> None:
    text = (
        submission_with("1.4", SOLUTIONS["1.4"])
        + """
def forward(self, x):
    return self.norm_a(self.a(x))

BasicBlock.forward = forward
make_shortcut = lambda *_: nn.Identity()
"""
    )
    for number in ("1.5", "1.7"):
        results = mark_one(grader, tmp_path, number, text)
        assert all(r.passed for r in results), results
    lost = [r.check for r in mark_one(grader, tmp_path, "1.4", text) if not r.passed]
    assert "values" in lost


def test_no_notebook_holds_up_the_grader() -> None:
    def read(source: str) -> bytes:
        cells = [{"cell_type": "code", "source": source}]
        return code_of_notebook("a.ipynb", json.dumps({"cells": cells}).encode())

    wide = " " * 10**6 + "x"  # what looks at it once for each blank is at it for hours
    assert read("(\n" + wide).endswith(wide.encode() + b"\n")
    with pytest.raises(ValueError, match="more than 1 MB of code"):
        read("x;" * 10**6)


def test_of_layers_that_repeat_the_last_are_too_many() -> None:
    stem, block, head = ["7x7", "norm"], 2 * ["3x3", "norm"], ["5x5", "norm", "linear"]
    mine, theirs = (
        {"layers": [[f"layer {i}", text] for i, text in enumerate(stem + times * block + head)]}
        for times in (2, 1)
    )
    trial = checks.Trial(exercises("05")["5.1"].cases[0], mine, theirs)
    assert checks.layer_difference(trial).startswith("too many: layer 6, a 3x3; too many: layer 7")


def test_a_pools_padding_is_not_its_window() -> None:
    x, pool = torch.randn(1, 2, 7, 7), torch.nn.MaxPool2d(3, 2, 1)
    wrong = torch.nn.MaxPool2d(3, 2)(x)
    with mutants.Watch() as watch:
        pool(x)
    made = [
        (name, mutants.run(lambda: [pool(x)], how)) for name, how in mutants.mistakes(watch.calls)
    ]
    same = [name for name, y in made if y and torch.equal(y[0], wrong)]
    assert same[0] == "the padding of the max pool is missing"
