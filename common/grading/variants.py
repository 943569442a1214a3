"""Variants of an assignment: what an exercise asks for changes, and with it docstring, hint,
reference and checks, so that the lesson's own solution is no longer the answer.

A variant is a copy of the course in which texts are replaced, in the lesson and in its manifest.
Whatever marks in that copy marks the variant: the grader itself knows nothing of it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from common.grading.exercises import ROOT, Exercise, file_name, lesson_of, lesson_path, manifests

Edit = tuple[str, str]  # what stands there once, and what stands there instead


@dataclass(frozen=True)
class Option:
    """One specification of an exercise."""

    says: str = ""  # what the starter says at its head; "" where it is the lesson's own
    lesson: tuple[Edit, ...] = ()  # the solution, and the docstring that describes it
    hint: Edit = ("", "")  # in the manifest


OWN = Option()
_PAD = "return F.pad(x, (0, 0, 0, 0, 0, self.extra_channels))"
_ZEROS = "missing channels filled with zeros."
_BEHIND = "append channels of zeros behind those that are there"
_SUM = "return F.relu(residual + self.shortcut(x))\n\n\nclass SqueezeExcitation"
_GATE = "gate = torch.sigmoid(self.excite(gate))"
_SCALE = "Scale each channel by a gate in (0, 1) computed"
_BLOCK = "Two 3x3 convolutions and a shortcut."
_CONV1 = """super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)"""

# The lesson's own first, whose solution everybody has: it is never drawn.
CHOICES: dict[str, tuple[Option, ...]] = {
    "1.1": (OWN,
        Option("the zeros stand in front of the channels",
               ((_PAD, "return F.pad(x, (0, 0, 0, 0, self.extra_channels, 0))"),
                (_ZEROS, "channels of zeros in front.")),
               (_BEHIND, "put channels of zeros in front of those that are there")),
        Option("half of the zeros stand in front of the channels, half behind; an odd one behind",
               ((_PAD, "n = self.extra_channels\n"
                       "        return F.pad(x, (0, 0, 0, 0, n // 2, n - n // 2))"),
                (_ZEROS, "half of the zeros in front.")),
               (_BEHIND, "put half of the channels of zeros (n // 2) in front, the rest behind"))),
    "1.3": (OWN,
        Option("the gate is a hard sigmoid",
               ((_GATE, _GATE.replace("torch.sigmoid", "F.hardsigmoid")),
                (_SCALE, "Scale by a hard sigmoid computed")),
               ("a sigmoid after them", "a hard sigmoid after them")),
        Option("the gate is 1 + tanh",
               ((_GATE, _GATE.replace("torch.sigmoid", "1 + torch.tanh")),
                (_SCALE, "Scale by 1 + tanh computed")),
               ("a sigmoid after them", "1 + tanh after them")),
        Option("a SiLU stands between the two convolutions",
               (("gate = F.relu(self.squeeze(gate))", "gate = F.silu(self.squeeze(gate))"),),
               ("a ReLU between them", "a SiLU between them")),
        Option("the maximum of each channel goes into the gate",
               (("gate = x.mean(dim=(2, 3), keepdim=True)",
                 "gate = x.amax(dim=(2, 3), keepdim=True)"),
                ("from all channels' means.", "from all channels' maxima.")),
               ("Mean over", "Maximum over"))),
    "1.4": (OWN,
        Option("the branch ends in a ReLU, and none follows the sum",
               ((_SUM, _SUM.replace("F.relu(residual + self.shortcut(x))",
                                    "F.relu(residual) + self.shortcut(x)")),
                (_BLOCK, "Two 3x3 convolutions, each with a ReLU, and a shortcut.")),
               ("bn2, se, then add shortcut(x), then ReLU.",
                "bn2, se, ReLU, then add shortcut(x).")),
        Option("after the sum stands a ReLU6",
               ((_SUM, _SUM.replace("F.relu(", "F.relu6(")),
                (_BLOCK, "Two 3x3 convolutions, a shortcut, a ReLU6.")),
               ("then add shortcut(x), then ReLU.", "then add shortcut(x), then ReLU6.")),
        Option("after the sum stands a leaky ReLU with slope 0.1",
               ((_SUM, _SUM.replace("F.relu(residual + self.shortcut(x))",
                                    "F.leaky_relu(residual + self.shortcut(x), 0.1)")),
                (_BLOCK, "Two 3x3 convolutions, a shortcut, a leaky ReLU.")),
               ("then add shortcut(x), then ReLU.",
                "then add shortcut(x), then a leaky ReLU (0.1).")),
        Option("the first convolution is 5x5",
               ((_CONV1, _CONV1.replace("3, stride, padding=1", "5, stride, padding=2")),
                (_BLOCK, "A 5x5 and a 3x3 convolution and a shortcut.")),
               ("conv1, bn1, ReLU,", "conv1 (5x5), bn1, ReLU,"))),
    "1.6": (OWN,
        Option("every shortcut starts from x",
               (("""        same = isinstance(self.shortcut, nn.Identity)
        return residual + (x if same else self.shortcut(activated))
""", "        return residual + self.shortcut(x)\n"),
                ("""Where the shape changes the shortcut starts from
    the activated input here, as in the authors' code.""", "So it is here, everywhere.")),
               ("A projection starts from the activated input, the identity from the input itself.",
                "Every shortcut starts from the input itself."))),
    "2.1": (OWN,
        Option("the block ends in an average pool",
               (("self.pool = nn.MaxPool2d(2, ceil_mode", "self.pool = nn.AvgPool2d(2, ceil_mode"),
                ("with ReLU, then a 2x2 max-pool.", "with ReLU, then a 2x2 average pool.")),
               ("then a 2x2 max-pool.", "then a 2x2 average pool."))),
    "3.1": (OWN,
        Option("the activation is a ReLU6",
               (("(conv, norm, nn.ReLU())", "(conv, norm, nn.ReLU6())"),
                ("Convolution, BatchNorm, ReLU; the", "Convolution, BatchNorm, ReLU6; the")),
               ("its eps is 0.001.", "its eps is 0.001; then a ReLU6."))),
    "4.1": (OWN,
        Option("rounding may take away a twentieth at most",
               (("rounded >= 0.9 * channels", "rounded >= 0.95 * channels"),
                ("never down by more than a tenth.", "never down by more than a twentieth."),
                ("(24, 24 * 1.1, 16 * 0.7, 3)]\n    [24, 24, 16, 8]",
                 "(24, 24 * 1.1, 16 * 0.7, 3)]\n    [24, 32, 16, 8]")),
               ("lost more than a tenth.", "lost more than a twentieth."))),
    "5.2": (OWN,
        Option("the gate is a sigmoid",
               ((_GATE.replace("torch.sigmoid", "F.hardsigmoid"), _GATE),
                (_SCALE.replace("(0, 1)", "[0, 1]"), "Scale by a sigmoid's gate computed")),
               ("1x1 convolution back, hard sigmoid;", "1x1 convolution back, sigmoid;"))),
    "6.3": (OWN,
        Option("the transition ends in a max-pool",
               (("mix, nn.AvgPool2d(2))", "mix, nn.MaxPool2d(2))"),
                ("Between two blocks: mix the channels, halve the resolution.",
                 "Between two blocks: mix the channels, then max-pool.")),
               ("a 2x2 average pool; give", "a 2x2 max-pool; give"))),
    "8.5": (OWN,
        Option("the sum is divided by d^2 alone",
               ((".square().sum() / (4 * d**2)", ".square().sum() / d**2"),
                ("Squared distance of two covariances, (N, D)",
                 "Squared distance over d^2, (N, D)")),
               ("summed, over 4 d^2.", "summed, over d^2."))),
}  # fmt: skip

# As `head` makes it: a comment of the student's own may begin alike.
_LINE = r"^# Variant (\d{1,10}): (?=\d\.\d: |as in the lesson\.)"
HEAD = re.compile(_LINE, re.MULTILINE | re.ASCII)


def drawn(seed: int) -> dict[str, Option]:
    """The option of each exercise that varies. 0 is the course as it is."""
    rng = random.Random(seed)
    return {n: rng.choice(options[1:]) if seed else OWN for n, options in CHOICES.items()}


def head(seed: int, lesson: str) -> str:
    """The line of a starter that names its variant, and what differs in it."""
    told = [f"{n}: {o.says}" for n, o in drawn(seed).items() if o.says and lesson_of(n) == lesson]
    return f"# Variant {seed}: " + ("; ".join(told) or "as in the lesson") + "."


def with_hint(exercise: Exercise, seed: int) -> Exercise:
    """The exercise with its variant's hint."""
    option = drawn(seed).get(exercise.number, OWN)
    return replace(exercise, hint=exercise.hint.replace(*option.hint))


def seed_of(text: str) -> int:
    """The variant that a file names at its head; 0 where it names none."""
    found = HEAD.search(text)
    return int(found[1]) if found else 0


def _edited(text: str, edits: tuple[Edit, ...], where: str) -> str:
    for old, new in edits:
        if text.count(old) != 1:
            raise ValueError(f"{where}: {old!r} stands there {text.count(old)} times, not once")
        text = text.replace(old, new)
    return text


def _without_mistakes(manifest: str, number: str) -> str:
    """The mistakes that are known of an exercise's own form are none of another form's."""
    before, head, rest = manifest.partition(f"[{number}]\n")
    section, mark, after = rest.partition("\n[")
    return before + head + section.partition("\nmistakes =\n")[0] + "\n" * bool(mark) + mark + after


def texts(chosen: Mapping[str, Option]) -> dict[Path, str]:
    """The files that differ from the course's, by path below its folder.

    Raises:
        ValueError: an edit does not fit the lesson any more.
    """
    changed: dict[Path, str] = {}
    for number, option in chosen.items():
        if not option.says:
            continue
        lesson = lesson_of(number)
        where = f"variant of {number}, {file_name(lesson)}"
        manifest = manifests()[lesson]
        for path, edits in ((lesson_path(lesson), option.lesson), (manifest, (option.hint,))):
            short = path.relative_to(ROOT)
            text = changed.get(short) or path.read_text(encoding="utf-8")
            if path == manifest:
                text = _without_mistakes(text, number)
            changed[short] = _edited(text, edits, where)
    return changed


def course_files() -> dict[str, bytes]:
    """What marking needs, name to content: `common`, the lessons, and the packages to install."""
    paths = [p for p in sorted((ROOT / "common").rglob("*")) if p.suffix in (".py", ".ini", ".csv")]
    paths += [lesson_path(lesson) for lesson in manifests() if lesson_path(lesson).parent == ROOT]
    files = {str(p.relative_to(ROOT)): p.read_bytes() for p in paths}
    packages = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    packages, *_ = packages.split("# for the tests")  # which a kit does not need
    return {**files, "requirements.txt": packages.encode()}


def make_course(chosen: Mapping[str, Option], folder: Path) -> None:
    """The course with the variant in it, below `folder`."""
    changed = {str(path): text.encode() for path, text in texts(chosen).items()}
    for name, data in {**course_files(), **changed}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
