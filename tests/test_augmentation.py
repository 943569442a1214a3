"""Batched augmentation, against slicing by hand and torchvision's per-image operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from common import augmentation as A


def draws(n: int, **columns: float) -> torch.Tensor:
    """(n, DRAWS) zeros with some columns set, by the constants' names in lower case."""
    table = torch.zeros(n, A.DRAWS)
    for name, value in columns.items():
        table[:, getattr(A, name.upper())] = value
    return table


def test_each_image_gets_its_own_crop() -> None:
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    padded = F.pad(images, (1, 1, 1, 1))
    table = torch.rand(4, A.DRAWS)
    index = torch.tensor([4, 0, 0, 2])
    cut = A.random_crop(padded, index, (8, 8), table)
    for i, row in enumerate(index):
        top, left = int(table[i, A.CROP_Y] * 3), int(table[i, A.CROP_X] * 3)
        assert torch.equal(cut[i], padded[row, :, top : top + 8, left : left + 8])


def test_crops_reach_every_place_and_no_further() -> None:
    padded = torch.arange(100.0).view(1, 1, 10, 10)
    table = torch.rand(2000, A.DRAWS, generator=torch.Generator().manual_seed(0))
    corners = A.random_crop(padded, torch.zeros(2000, dtype=torch.long), (8, 8), table)[:, 0, 0, 0]
    assert set(corners.tolist()) == {10.0 * y + x for y in range(3) for x in range(3)}


def test_half_of_the_images_are_mirrored_each_by_its_own_coin() -> None:
    x = torch.randn(1000, 1, 4, 4)
    table = torch.rand(1000, A.DRAWS, generator=torch.Generator().manual_seed(0))
    y = A.random_flip(x, table)
    mirrored = torch.tensor([torch.equal(b, a.flip(2)) for a, b in zip(x, y)])
    kept = torch.tensor([torch.equal(b, a) for a, b in zip(x, y)])
    assert (mirrored ^ kept).all()
    assert 440 < mirrored.sum() < 560
    assert torch.equal(mirrored, table[:, A.FLIP] < 0.5)


def test_cutout_blanks_a_square_of_its_own_in_each_image() -> None:
    x = torch.ones(200, 3, 16, 16)
    y = A.cutout(x, 4, torch.rand(200, A.DRAWS, generator=torch.Generator().manual_seed(0)))
    blank = (y == 0).all(1)
    assert (blank.sum((1, 2)) <= 16).all() and (blank.sum((1, 2)) >= 4).all()
    assert len({tuple(b.flatten().tolist()) for b in blank}) > 50
    centre = A.cutout(x[:1], 4, draws(1, cutout_y=0.5, cutout_x=0.5))
    expected = torch.ones(16, 16)
    expected[6:10, 6:10] = 0
    assert torch.equal(centre[0, 0], expected)


IMAGES = torch.randint(
    256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
)
STRENGTHS, SIGNS = torch.tensor([0.2, 0.5, 0.9]), torch.tensor([1.0, -1.0, 1.0])


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("brightness", TF.adjust_brightness),
        ("color", TF.adjust_saturation),
        ("contrast", TF.adjust_contrast),
        ("sharpness", TF.adjust_sharpness),
    ],
)
def test_blends_are_torchvisions(name: str, reference: object) -> None:
    ours = A.apply_operation(name, IMAGES, STRENGTHS, SIGNS)
    for i in range(3):
        theirs = reference(IMAGES[i], float(1 + STRENGTHS[i] * SIGNS[i]))
        assert (ours[i].int() - theirs.int()).abs().max() <= 1  # one grey level of rounding


def test_posterize_and_solarize_are_torchvisions() -> None:
    bits = torch.tensor([1.0, 3.0, 6.0])
    ours = A.apply_operation("posterize", IMAGES, bits, SIGNS)
    for i in range(3):
        assert torch.equal(ours[i], TF.posterize(IMAGES[i], 8 - int(bits[i])))
    ours = A.apply_operation("solarize", IMAGES, STRENGTHS, SIGNS)
    for i in range(3):
        assert torch.equal(ours[i], TF.solarize(IMAGES[i], 255 * (1 - float(STRENGTHS[i]))))


@pytest.mark.parametrize("name", ["shear_x", "shear_y", "translate_x", "translate_y", "rotate"])
def test_geometry_is_torchvisions(name: str) -> None:
    strengths = {"rotate": [30.0, 45.0, 90.0]}.get(name, [0.25, 0.5, 0.125])
    ours = A.apply_operation(name, IMAGES, torch.tensor(strengths), SIGNS)
    for i, strength in enumerate(strengths):
        signed = strength * float(SIGNS[i])
        grid = torch.eye(3)
        if name == "rotate":
            theirs = TF.rotate(IMAGES[i], -signed, InterpolationMode.NEAREST)
        elif name.startswith("translate"):
            shift = [int(-16 * signed), 0] if name.endswith("x") else [0, int(-16 * signed)]
            theirs = TF.affine(IMAGES[i], 0.0, shift, 1.0, [0.0, 0.0])
        else:
            # Shearing by hand: output (y, x) comes from x + s*y, about the centre.
            grid = torch.arange(16) - 7.5
            yy, xx = torch.meshgrid(grid, grid, indexing="ij")
            sx, sy = (xx + signed * yy, yy) if name == "shear_x" else (xx, yy + signed * xx)
            column, row = (sx + 7.5).round().long(), (sy + 7.5).round().long()
            inside = (column >= 0) & (column < 16) & (row >= 0) & (row < 16)
            theirs = IMAGES[i][:, row.clamp(0, 15), column.clamp(0, 15)] * inside
        assert (ours[i] != theirs).float().mean() < 0.03  # pixels that fall on a border between two


def test_trivial_augment_gives_each_image_one_operation_of_its_own() -> None:
    x = IMAGES[:1].expand(1400, -1, -1, -1)
    table = torch.rand(1400, A.DRAWS, generator=torch.Generator().manual_seed(0))
    y = A.trivial_augment(x, table)
    kinds = (table[:, A.OPERATION] * len(A.OPERATIONS)).long()
    names = list(A.OPERATIONS)
    assert torch.equal(y[kinds == names.index("identity")][0], IMAGES[0])
    assert len(kinds.unique()) == len(A.OPERATIONS)
    # The same draws give the same picture, alone or in a batch.
    for i in range(0, 1400, 100):
        assert torch.equal(A.trivial_augment(x[i : i + 1], table[i : i + 1])[0], y[i])


def test_flips_in_turn_show_both_sides_of_every_image_in_two_epochs() -> None:
    x, rows = torch.rand(64, 3, 4, 4), torch.randperm(64)

    def shown(epoch: int) -> torch.Tensor:
        table = draws(64)
        table[:, A.FLIP] = A.flip_in_turn(rows, 7, epoch)
        return A.random_flip(x[rows], table)[rows.argsort()]

    first, second, third = map(shown, range(3))
    as_it_is = (first == x).flatten(1).all(1)
    assert 0 < as_it_is.sum() < 64
    assert torch.equal(second, first.flip(3)) and torch.equal(third, first)


def test_mirrored_padding_is_torchs_own_for_bytes_too() -> None:
    x = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    padded = A.pad(x, 2, mirror=True)
    assert padded.dtype == torch.uint8
    assert torch.equal(padded.float(), F.pad(x.float(), (2, 2, 2, 2), mode="reflect"))


def test_views_are_six_and_weighted() -> None:
    class Corner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :, 0, 0]

    x = torch.randn(2, 3, 5, 7)
    # By hand: the corner of the image and of its mirror image; a shift by one pixel under
    # reflection, towards either side, brings row 1 and column 1 there.
    there, shifted = (x[:, :, 0, 0] + x[:, :, 0, -1]) / 2, (x[:, :, 1, 1] + x[:, :, 1, -2]) / 2
    torch.testing.assert_close(A.Views(Corner(), flips=True)(x), there / 2 + shifted / 2)
    plain = A.Views(Corner(), flips=False)(x)
    torch.testing.assert_close(plain, x[:, :, 0, 0] / 2 + x[:, :, 1, 1] / 2)
