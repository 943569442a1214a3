"""The grader against mistakes, other right solutions and hostile files: `python -m
tests.grading_cases` prints what it found, `--all` tries every case and not a sample.

A case is an edit of a solution in `grading_solutions`, or a solution of its own.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.grading.checks import agree
from common.grading.exercises import (
    ROOT,
    exercises,
    file_name,
    lesson_of,
    lesson_path,
    manifests,
    worth,
)
from common.grading.holes import put_in
from common.grading.marking import Grader, References, Result, Submission
from common.grading.sandbox import Limits
from common.starter import make_starter
from tests.grading_hostile import HARM, PREFIX, THEFT
from tests.grading_solutions import SOLUTIONS


@dataclass(frozen=True)
class Edit:
    """A solution with some text replaced. `new` may be empty; `old` must be there once or more."""

    exercise: str
    what: str
    old: str
    new: str
    also: tuple[tuple[str, str], ...] = ()

    def code(self) -> str:
        text = SOLUTIONS[self.exercise]
        for old, new in ((self.old, self.new), *self.also):
            assert old in text, (self.exercise, self.what, old)
            text = text.replace(old, new)
        return text


def submission_with(exercise: str, code: str) -> str:
    """The lesson with `code` in place of the exercise's parts."""
    return put_in(lesson_path(lesson_of(exercise)).read_text(encoding="utf-8"), code)


def M(exercise: str, what: str, old: str, new: str = "", *also: str) -> Edit:
    pairs = tuple(zip(also[::2], also[1::2]))
    return Edit(exercise, what, old, new, pairs)


ADD = "return torch.relu(y + self.skip(x))"
MISTAKES: tuple[Edit, ...] = (
    # -------------------------------------------------------------------------------- lesson 0
    M("0.1", "upside down", "dims=[3]", "dims=[2]"),
    M("0.1", "the other half", "< 0.5", ">= 0.5"),
    M("0.1", "<= for <", "< 0.5", "<= 0.5"),
    M("0.1", "in place", "out = x.clone()", "out = x"),
    M("0.1", "another column", "FLIP", "CROP_Y"),
    M("0.1", "all of them", "coin = draws[:, FLIP] < 0.5", "coin = draws[:, FLIP] < 2"),
    M("0.1", "none of them", "coin = draws[:, FLIP] < 0.5", "coin = draws[:, FLIP] < 0"),
    M("0.1", "the batch turned round", "dims=[3]", "dims=[0]"),
    M("0.2", "not centred", " - side // 2", ""),
    M("0.2", "one too many", "y + side)", "y + side + 1)", "z + side)", "z + side + 1)"),
    M("0.2", "rows and columns exchanged", "CUTOUT_Y", "_Y_", "CUTOUT_X", "CUTOUT_Y", "_Y_", "CUTOUT_X"),
    M("0.2", "ones", "] = 0", "] = 1"),
    M("0.2", "in place", "out = x.clone()", "out = x"),
    M("0.2", "the first image's place", "draws[i,", "draws[0,"),
    M("0.2", "returns the input", "return out", "return x"),
    M("0.3", "one place too few", " + 1, padded", ", padded", "- w + 1", "- w"),
    M("0.3", "rows and columns exchanged", "CROP_Y", "_Y_", "CROP_X", "CROP_Y", "_Y_", "CROP_X"),
    M("0.3", "by the image's number", "draws[place, CROP_Y]", "draws[i % len(draws), CROP_Y]", "draws[place, CROP_X]", "draws[i % len(draws), CROP_X]"),
    M("0.3", "the first image's place", "draws[place,", "draws[0,"),
    M("0.3", "index ignored", "padded[i,", "padded[place,"),
    # -------------------------------------------------------------------------------- lesson 1
    M("1.1", "average pool", "x = x[:, :, :: self.step, :: self.step]", "x = F.avg_pool2d(x, self.step)"),
    M("1.1", "max-pool", "x = x[:, :, :: self.step, :: self.step]", "x = F.max_pool2d(x, self.step)"),
    M("1.1", "zeros in front", "[x, x.new_zeros(n, self.more, h, w)]", "[x.new_zeros(n, self.more, h, w), x]"),
    M("1.1", "channels along 2", "dim=1", "dim=2"),
    M("1.1", "no stride", "x = x[:, :, :: self.step, :: self.step]", "x = x"),
    M("1.1", "one direction only", ":: self.step, :: self.step", ":: self.step"),
    M("1.2", "bias", "bias=False", "bias=True"),
    M("1.2", "no norm", "nn.Sequential(conv, nn.BatchNorm2d(out_channels))", "conv"),
    M("1.2", "identity with a stride", " and stride == 1", ""),
    M("1.2", "never the identity", 'if option != "C" and in_channels == out_channels and stride == 1:', "if False:"),
    M("1.2", "option C as option B", 'option != "C" and ', ""),
    M("1.2", "no stride", "stride=stride, bias", "bias"),
    M("1.2", "3x3", "kernel_size=1, stride=stride", "kernel_size=3, padding=1, stride=stride"),
    M("1.2", "a ReLU", "nn.BatchNorm2d(out_channels))", "nn.BatchNorm2d(out_channels), nn.ReLU())"),
    M("1.3", "no ReLU", "s = torch.relu(self.down(s))", "s = self.down(s)"),
    M("1.3", "no sigmoid", "s = torch.sigmoid(self.up(s))", "s = self.up(s)"),
    M("1.3", "sigmoid twice", "torch.relu(self", "torch.sigmoid(self"),
    M("1.3", "softmax", "torch.sigmoid(self.up(s))", "self.up(s).softmax(1)"),
    M("1.3", "max for mean", "x.mean((2, 3))", "x.amax((2, 3))"),
    M("1.3", "sum for mean", "x.mean((2, 3))", "x.sum((2, 3))"),
    M("1.3", "tanh", "torch.sigmoid", "torch.tanh"),
    M("1.3", "added", "x * s[", "x + s["),
    M("1.3", "1 + gate", "x * s[:, :, None, None]", "x * (1 + s[:, :, None, None])"),
    M("1.3", "gate only", "x * s[:, :, None, None]", "s[:, :, None, None].expand_as(x)"),
    M("1.3", "no bias", "nn.Linear(channels, small)", "nn.Linear(channels, small, bias=False)"),
    M("1.3", "reduction fixed", "channels // reduction", "channels // 16"),
    M("1.3", "GELU", "torch.relu", "F.gelu"),
    M("1.4", "no last ReLU", "return torch.relu(y)", "return y"),
    M("1.4", "no first ReLU", "        y = torch.relu(y)\n        y = self.bn2", "        y = self.bn2"),
    M("1.4", "ReLU before the sum", "y = y + self.skip(x)\n        return torch.relu(y)", "return torch.relu(y) + self.skip(x)"),
    M("1.4", "no shortcut", "y = y + self.skip(x)\n", "\n"),
    M("1.4", "shortcut of the input", "self.skip(x)", "x"),
    M("1.4", "norm after ReLU", "y = self.norm_a(self.a(x))\n        y = torch.relu(y)", "y = self.norm_a(torch.relu(self.a(x)))"),
    M("1.4", "stride on the second", "3, stride=stride, padding=1", "3, stride=1, padding=1", "channels, channels, 3, stride=1", "channels, channels, 3, stride=stride"),
    M("1.4", "bias", "stride=1, padding=1, bias=False", "stride=1, padding=1"),
    M("1.4", "momentum", "self.norm_a = nn.BatchNorm2d(channels)", "self.norm_a = nn.BatchNorm2d(channels, momentum=0.01)"),
    M("1.4", "eps", "self.bn2 = nn.BatchNorm2d(channels)", "self.bn2 = nn.BatchNorm2d(channels, eps=1e-3)"),
    M("1.4", "no norm", "self.norm_a(self.a(x))", "self.a(x)"),
    M("1.4", "one norm twice", "self.norm_a(self.a(x))", "self.bn2(self.a(x))"),
    M("1.4", "se forgotten", "y = self.gate(y)\n", "\n"),
    M("1.4", "se behind the sum", "y = self.gate(y)\n        y = y + self.skip(x)", "y = self.gate(y + self.skip(x))"),
    M("1.4", "detached", "self.skip(x)", "self.skip(x).detach()"),
    M("1.4", "option always B", "make_shortcut(shortcut,", 'make_shortcut("B",'),
    M("1.4", "no padding", "3, stride=1, padding=1", "3, stride=1"),
    M("1.4", "reflection", "self.b = nn.Conv2d(channels, channels, 3, stride=1, padding=1,", "self.b = nn.Conv2d(channels, channels, 3, stride=1, padding=1, padding_mode='reflect',"),
    M("1.4", "leaky", "return torch.relu(y)", "return F.leaky_relu(y)"),
    M("1.4", "shortcut twice", "y = y + self.skip(x)", "y = y + 2 * self.skip(x)"),
    M("1.4", "5x5", "self.b = nn.Conv2d(channels, channels, 3, stride=1, padding=1", "self.b = nn.Conv2d(channels, channels, 5, stride=1, padding=2"),
    M("1.5", "no last ReLU", ADD, "return y + self.skip(x)"),
    M("1.5", "no ReLU after the first", "y = torch.relu(self.norm_a(self.a(x)))", "y = self.norm_a(self.a(x))"),
    M("1.5", "no ReLU after the 3x3", "y = torch.relu(self.norm_b(self.b(y)))", "y = self.norm_b(self.b(y))"),
    M("1.5", "stride on the 1x1", "in_channels, mid, 1, bias", "in_channels, mid, 1, stride=stride, bias", "3, stride=stride, padding", "3, padding"),
    M("1.5", "groups forgotten", "groups=groups, ", ""),
    M("1.5", "base_width forgotten", "channels * base_width // 64 * groups", "channels * groups"),
    M("1.5", "width without groups", " // 64 * groups", " // 64"),
    M("1.5", "ReLU before the sum", ADD, "return torch.relu(y) + self.skip(x)"),
    M("1.5", "a ReLU too many", "y = self.gate(self.bn3(self.c(y)))", "y = torch.relu(self.gate(self.bn3(self.c(y))))"),
    M("1.5", "se forgotten", "self.gate(self.bn3(self.c(y)))", "self.bn3(self.c(y))"),
    M("1.6", "a last ReLU", "return y + (x if self.same else self.skip(z))", "return torch.relu(y + (x if self.same else self.skip(z)))"),
    M("1.6", "projection of the input", "self.skip(z)", "self.skip(x)"),
    M("1.6", "identity activated", "(x if self.same else self.skip(z))", "self.skip(z)"),
    M("1.6", "no second ReLU", "y = torch.relu(self.n2(y))", "y = self.n2(y)"),
    M("1.6", "post-activation", "y = self.c1(z)\n        y = torch.relu(self.n2(y))\n        y = self.c2(y)", "y = self.c2(torch.relu(self.c1(z)))\n        y = self.n2(y)"),
    M("1.6", "no first ReLU", "z = torch.relu(self.n1(x))", "z = self.n1(x)"),
    M("1.7", "first stage halves", "number > 0 and place == 0", "place == 0"),
    M("1.7", "no stage halves", "2 if number > 0 and place == 0 else 1", "1"),
    M("1.7", "every block halves", "number > 0 and place == 0", "number > 0"),
    M("1.7", "zero_init ignored", "self.init_weights(zero_init_residual)", "self.init_weights(True)"),
    M("1.7", "no init", "        self.init_weights(zero_init_residual)\n", "\n"),
    M("1.7", "options not handed on", ", stride, **block_options", ", stride"),
    M("1.7", "no pool", "            layers += [nn.MaxPool2d(3, 2, 1)]", "            pass"),
    M("1.7", "no stem ReLU", "nn.BatchNorm2d(stem_channels), nn.ReLU()", "nn.BatchNorm2d(stem_channels)"),
    M("1.7", "max for mean", "AdaptiveAvgPool2d", "AdaptiveMaxPool2d"),
    M("1.7", "no last norm", "[nn.BatchNorm2d(now), nn.ReLU()] if early else []", "[]"),
    M("1.7", "bias in the stem", "nn.Conv2d(3, stem_channels, 7, 2, 3, bias=False)", "nn.Conv2d(3, stem_channels, 7, 2, 3)"),
    # -------------------------------------------------------------------------------- lesson 2
    M("2.1", "no ReLU", "            steps.append(nn.ReLU())\n", ""),
    M("2.1", "one ReLU at the end", "            steps.append(nn.ReLU())\n", "", "self.steps(x))", "self.steps(x).relu())"),
    M("2.1", "average", "nn.MaxPool2d", "nn.AvgPool2d"),
    M("2.1", "ceil ignored", "ceil_mode=ceil_mode)", "ceil_mode=False)"),
    M("2.1", "no bias", "3, padding=1)", "3, padding=1, bias=False)"),
    M("2.1", "no padding", "3, padding=1)", "3)"),
    M("2.1", "pool of 3", "nn.MaxPool2d(2, stride=2,", "nn.MaxPool2d(3, stride=2, padding=1,"),
    M("2.1", "one too few", "range(depth)", "range(depth - 1)"),
    M("2.1", "leaky", "nn.ReLU()", "nn.LeakyReLU(0.1)"),
    M("2.1", "no pool", "self.down(self.steps(x))", "self.steps(x)"),
    M("2.2", "norm after ReLU", "            if batch_norm:\n                steps.append(nn.BatchNorm2d(out_channels))\n            steps.append(nn.ReLU())", "            steps.append(nn.ReLU())\n            if batch_norm:\n                steps.append(nn.BatchNorm2d(out_channels))"),
    M("2.2", "norm forgotten", "if batch_norm:", "if False:"),
    M("2.2", "one norm", "if batch_norm:", "if batch_norm and i == 0:"),
    M("2.2", "no running statistics", "nn.BatchNorm2d(out_channels)", "nn.BatchNorm2d(out_channels, track_running_stats=False)"),
    M("2.2", "instance norm", "nn.BatchNorm2d(out_channels)", "nn.InstanceNorm2d(out_channels, affine=True)"),
    M("2.3", "no init", "        self.init_weights()\n", "\n"),
    M("2.3", "always rounds up", "ceil_mode=small_input", "ceil_mode=True"),
    M("2.3", "never rounds up", "ceil_mode=small_input", "ceil_mode=False"),
    M("2.3", "norm not handed on", "batch_norm=batch_norm, ", ""),
    M("2.3", "heads exchanged", "if small_input else", "if not small_input else"),
    M("2.3", "width stays", "            now = width\n", "            now = channels[0]\n"),
    M("2.3", "pooled again", "return self.head(self.forward_features(x))", "return self.head(self.forward_features(x).mean((2, 3), keepdim=True).relu() * 2)"),
    M("2.4", "k for k - 1", "(k - 1) * jump", "k * jump"),
    M("2.4", "jump first", "size = size + (k - 1) * jump\n            jump = jump * s", "jump = jump * s\n            size = size + (k - 1) * jump"),
    M("2.4", "no jump", "(k - 1) * jump", "(k - 1)"),
    M("2.4", "strides added", "jump * s", "jump + s"),
    M("2.4", "no stride", "jump = jump * s", "jump = jump"),
    M("2.4", "pools left out", "(nn.Conv2d, nn.MaxPool2d)", "nn.Conv2d"),
    M("2.4", "starts at 0", "size = 1", "size = 0"),
    M("2.5", "running variance by n", " * n / (n - 1)", ""),
    M("2.5", "batch by n - 1", "unbiased=False", "unbiased=True"),
    M("2.5", "momentum turned", "(1 - self.momentum) * self.mean + self.momentum * mean", "self.momentum * self.mean + (1 - self.momentum) * mean", "(1 - self.momentum) * self.var + self.momentum * var", "self.momentum * self.var + (1 - self.momentum) * var"),
    M("2.5", "eps outside", "torch.sqrt(var[:, None, None] + self.eps)", "(torch.sqrt(var[:, None, None]) + self.eps)"),
    M("2.5", "batch in eval mode", "if self.training:", "if True:"),
    M("2.5", "no gamma", "y * self.gamma[:, None, None] + self.beta[:, None, None]", "y"),
    # -------------------------------------------------------------------------------- lesson 3
    M("3.1", "eps", ", eps=0.001", ""),
    M("3.1", "bias", "bias=not batch_norm", "bias=True"),
    M("3.1", "no ReLU", "return torch.relu(x)", "return x"),
    M("3.1", "padding ignored", "if padding is None:", "if True:"),
    M("3.1", "no padding by default", "padding = tuple(k // 2 for k in kernel_size)", "padding = 0"),
    M("3.1", "stride ignored", "kernel_size, stride, padding", "kernel_size, 1, padding"),
    M("3.1", "norm behind the ReLU", "            x = self.bn(x)\n        return torch.relu(x)", "            return self.bn(torch.relu(x))\n        return torch.relu(x)"),
    M("3.1", "ReLU6", "torch.relu(x)", "nn.functional.relu6(x)"),
    M("3.2", "plain list", "nn.ModuleList(branches)", "list(branches)"),
    M("3.2", "reversed", "in self.branches]", "in list(self.branches)[::-1]]"),
    M("3.2", "one after the other", "parts = [branch(x) for branch in self.branches]\n        return torch.cat(parts, 1)", "for branch in self.branches:\n            x = branch(x)\n        return x"),
    M("3.2", "summed", "torch.cat(parts, 1)", "sum(p.mean(1, keepdim=True) for p in parts)"),
    M("3.2", "along the height", "torch.cat(parts, 1)", "torch.cat([p[:, :1] for p in parts], 2)"),
    M("3.2", "a ReLU", "torch.cat(parts, 1)", "torch.cat(parts, 1).relu()"),
    M("3.3", "always 3x3", "5 if five_by_five else 3", "3"),
    M("3.3", "always 5x5", "5 if five_by_five else 3", "5"),
    M("3.3", "average pool", "nn.MaxPool2d", "nn.AvgPool2d"),
    M("3.3", "no pool", "nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(in_channels, w.pool_proj, 1))", "conv(in_channels, w.pool_proj, 1)"),
    M("3.3", "branches exchanged", "self.three(x), self.five(x)", "self.five(x), self.three(x)"),
    M("3.3", "reductions exchanged", "w.reduce3x3, 1), conv(w.reduce3x3", "w.reduce5x5, 1), conv(w.reduce5x5"),
    M("3.3", "projection before the pool", "nn.MaxPool2d(3, 1, 1), conv(in_channels, w.pool_proj, 1)", "conv(in_channels, w.pool_proj, 1), nn.MaxPool2d(3, 1, 1)"),
    M("3.3", "conv ignored", "conv=ConvBnReLU):\n        super().__init__()", "conv=ConvBnReLU):\n        super().__init__()\n        conv = ConvBnReLU"),
    M("3.4", "all 7x7", "c(width, width, (1, 7)), c(width, 192, (7, 1))", "c(width, 192, 7)"),
    M("3.4", "1x7 twice", "c(width, width, (1, 7)), c(width, 192, (7, 1))", "c(width, width, (1, 7)), c(width, 192, (1, 7))"),
    M("3.4", "third branch the other way round", "            c(width, width, (7, 1)),\n            c(width, width, (1, 7)),\n            c(width, width, (7, 1)),\n            c(width, 192, (1, 7)),", "            c(width, width, (1, 7)),\n            c(width, width, (7, 1)),\n            c(width, width, (1, 7)),\n            c(width, 192, (7, 1)),"),
    M("3.4", "max-pool", "nn.AvgPool2d(3, stride=1, padding=1)", "nn.MaxPool2d(3, stride=1, padding=1)"),
    M("3.4", "padding not counted", "nn.AvgPool2d(3, stride=1, padding=1)", "nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)"),
    M("3.4", "branches exchanged", "self.two(x), self.three(x)", "self.three(x), self.two(x)"),
    M("3.4", "factors exchanged", "(1, 7)), c(width, 192, (7, 1))", "(7, 1)), c(width, 192, (1, 7))"),
    M("3.5", "half the rate", "nn.Dropout(0.7)", "nn.Dropout(0.35)"),
    M("3.5", "rate 0.5", "nn.Dropout(0.7)", "nn.Dropout(0.5)"),
    M("3.5", "keeps 0.7", "nn.Dropout(0.7)", "nn.Dropout(0.3)"),
    M("3.5", "no dropout", "self.out(self.drop(x))", "self.out(x)"),
    M("3.5", "dropout before the hidden layer", "torch.relu(self.hidden(x.flatten(1)))\n        return self.out(self.drop(x))", "torch.relu(self.hidden(self.drop(x.flatten(1))))\n        return self.out(x)"),
    M("3.5", "dropout behind the classifier", "self.out(self.drop(x))", "self.drop(self.out(x))"),
    M("3.5", "no ReLU", "torch.relu(self.hidden(x.flatten(1)))", "self.hidden(x.flatten(1))"),
    M("3.5", "max-pool", "AdaptiveAvgPool2d", "AdaptiveMaxPool2d"),
    M("3.5", "softmax", "return self.out(self.drop(x))", "return self.out(self.drop(x)).softmax(1)"),
    M("3.6", "no weight", "self.weight * self.criterion", "self.criterion"),
    M("3.6", "mean", "self.weight * self.criterion", "self.weight / len(outputs[1:]) * self.criterion"),
    M("3.6", "all weighted", "total = self.criterion(outputs[0], targets)", "total = self.weight * self.criterion(outputs[0], targets)"),
    M("3.6", "first only", "outputs[1:]", "outputs[1:2]"),
    M("3.6", "detached", "self.criterion(aux, targets)", "self.criterion(aux.detach(), targets)"),
    M("3.6", "the last is the main one", "outputs[0]", "outputs[-1]", "outputs[1:]", "outputs[:-1]"),
    # -------------------------------------------------------------------------------- lesson 4
    M("4.1", "cut off", "channels / divisor + 0.5", "channels / divisor"),
    M("4.1", "banker", "int(channels / divisor + 0.5)", "round(channels / divisor)"),
    M("4.1", "no step up", "    if nearest < 0.9 * channels:\n        nearest += divisor\n", ""),
    M("4.1", "always up", "int(channels / divisor + 0.5)", "math.ceil(channels / divisor)"),
    M("4.1", "divisor ignored", "divisor=8):", "divisor=8):\n    divisor = 8"),
    M("4.2", "int", "math.ceil(stage.layers * depth_mult)", "int(stage.layers * depth_mult)"),
    M("4.2", "round", "math.ceil(stage.layers * depth_mult)", "round(stage.layers * depth_mult)"),
    M("4.2", "widths not rounded", "round_channels(stage.channels * width_mult)", "int(stage.channels * width_mult)"),
    M("4.2", "multipliers exchanged", "channels * width_mult", "channels * depth_mult", "layers * depth_mult", "layers * width_mult"),
    M("4.2", "depths left", "deep = math.ceil(stage.layers * depth_mult)", "deep = stage.layers"),
    M("4.2", "a list", "tuple(scaled)", "scaled[1:] and tuple(scaled[1:]) or tuple(scaled)"),
    M("4.3", "not scaled up", " / (1 - self.rate)", ""),
    M("4.3", "rate is kept", "< 1 - self.rate", "< self.rate", "/ (1 - self.rate)", "/ self.rate"),
    M("4.3", "one draw", "torch.rand(x.shape[0], 1, 1, 1)", "torch.rand(1, 1, 1, 1)"),
    M("4.3", "per channel", "torch.rand(x.shape[0], 1, 1, 1)", "torch.rand(x.shape[0], x.shape[1], 1, 1)"),
    M("4.3", "per value", "torch.rand(x.shape[0], 1, 1, 1)", "torch.rand(x.shape)"),
    M("4.3", "in eval mode too", "not self.training or self.rate == 0", "self.rate == 0"),
    M("4.3", "never", "not self.training or self.rate == 0", "True"),
    M("4.4", "shortcut with a stride", "stride == 1 and in_channels == out_channels", "in_channels == out_channels"),
    M("4.4", "shortcut never", "stride == 1 and in_channels == out_channels", "False"),
    M("4.4", "drop of the sum", "y = x + self.drop(y)", "y = self.drop(x + y)"),
    M("4.4", "drop of the input", "y = x + self.drop(y)", "y = self.drop(x) + y"),
    M("4.4", "half the rate", "StochasticDepth(drop_rate)", "StochasticDepth(drop_rate / 2)"),
    M("4.4", "no drop", "self.drop(y)", "y"),
    M("4.4", "drop always", "        if self.add:\n            y = x + self.drop(y)", "        y = self.drop(y)\n        if self.add:\n            y = x + y"),
    M("4.4", "activation at the end", ", activation=nn.Identity", ""),
    M("4.4", "expansion of 1", "if expansion > 1:", "if True:"),
    M("4.4", "no groups", "groups=wide, ", ""),
    M("4.4", "se by the middle", "4 * expansion", "4"),
    M("4.4", "norm not handed on", "kernel_size, stride, groups=wide, norm=norm", "kernel_size, stride, groups=wide"),
    M("4.4", "se forgotten", "        steps.append(SqueezeExcitation(wide, 4 * expansion))\n", ""),
    # -------------------------------------------------------------------------------- lesson 5
    M("5.1", "no attribute", "        self.stride = stride\n", ""),
    M("5.1", "no groups", ", groups=in_channels", ""),
    M("5.1", "order exchanged", "ConvBN(in_channels, in_channels, kernel=3, stride=stride, groups=in_channels)", "ConvBN(out_channels, out_channels, kernel=3, stride=stride, groups=out_channels)", "self.mix(self.filter(x))", "self.filter(self.mix(x))"),
    M("5.1", "stride on the 1x1", "kernel=3, stride=stride", "kernel=3", "kernel=1", "kernel=1, stride=stride"),
    M("5.1", "no activation", "kernel=1)", "kernel=1, activation=None)"),
    M("5.1", "5x5", "kernel=3", "kernel=5"),
    M("5.1", "ReLU6", "kernel=1)", "kernel=1, activation=nn.ReLU6)"),
    M("5.2", "sigmoid", "nn.functional.hardsigmoid", "torch.sigmoid"),
    M("5.2", "no ReLU", "torch.relu(self.a(g))", "self.a(g)"),
    M("5.2", "a quarter, not rounded", "make_divisible(channels / 4)", "channels // 4"),
    M("5.2", "max", "adaptive_avg_pool2d", "adaptive_max_pool2d"),
    M("5.2", "h-swish", "torch.relu", "nn.functional.hardswish"),
    M("5.2", "added", "return g * x", "return g + x"),
    M("5.2", "gate only", "return g * x", "return g.expand_as(x)"),
    M("5.3", "shortcut with a stride", "stride == 1 and in_channels == out_channels", "in_channels == out_channels"),
    M("5.3", "no attribute", "        self.stride = stride\n", ""),
    M("5.3", "activation at the end", "activation=None", "activation=activation"),
    M("5.3", "no shortcut", "return x + y if self.add else y", "return y"),
    M("5.3", "a ReLU of the sum", "x + y if", "torch.relu(x + y) if"),
    M("5.3", "always expands", "if expanded != in_channels:", "if True:"),
    M("5.3", "kernel ignored", "expanded, kernel, stride", "expanded, 3, stride"),
    M("5.3", "activation ignored", "groups=expanded, activation=activation", "groups=expanded, activation=nn.ReLU6"),
    M("5.3", "se first", "        steps.append(ConvBN(expanded, expanded, kernel, stride, groups=expanded, activation=activation, norm=norm))\n        if se:\n            steps.append(SqueezeExcitation(expanded))\n", "        if se:\n            steps.append(SqueezeExcitation(expanded))\n        steps.append(ConvBN(expanded, expanded, kernel, stride, groups=expanded, activation=activation, norm=norm))\n"),
    M("5.3", "norm ignored", "activation=None, norm=norm", "activation=None"),
    M("5.4", "cut off", "torch.round(x / scale)", "torch.trunc(x / scale)"),
    M("5.4", "halves up", "torch.round(x / scale)", "torch.floor(x / scale + 0.5)"),
    M("5.4", "no clamp", "    q = torch.clamp(q, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)\n    return q", "    return q.long()"),
    M("5.4", "symmetric", "-(2 ** (bits - 1)),", "1 - 2 ** (bits - 1),"),
    M("5.4", "overflow", "(q.to(torch.float32) - zero_point)", "(q - torch.tensor(zero_point, dtype=torch.int8))"),
    M("5.4", "no zero point", "torch.round(x / scale) + zero_point", "torch.round(x / scale)"),
    # -------------------------------------------------------------------------------- lesson 6
    M("6.1", "no dropout", "self.drop(self.steps(x))", "self.steps(x)"),
    M("6.1", "dropout of the input", "self.drop(self.steps(x))", "self.steps(self.drop(x))"),
    M("6.1", "half the rate", "nn.Dropout(dropout)", "nn.Dropout(dropout / 2)"),
    M("6.1", "channel dropout", "nn.Dropout(dropout)", "nn.Dropout2d(dropout)"),
    M("6.1", "no first ReLU", "nn.BatchNorm2d(in_channels), nn.ReLU()]", "nn.BatchNorm2d(in_channels)]"),
    M("6.1", "no second ReLU", "nn.BatchNorm2d(4 * growth_rate), nn.ReLU()]", "nn.BatchNorm2d(4 * growth_rate)]"),
    M("6.1", "ReLU before the norm", "[nn.BatchNorm2d(in_channels), nn.ReLU()]", "[nn.ReLU(), nn.BatchNorm2d(in_channels)]"),
    M("6.1", "two times", "4 * growth_rate", "2 * growth_rate"),
    M("6.1", "reversed", "torch.cat(features, 1)", "torch.cat(list(features)[::-1], 1)"),
    M("6.1", "last map only", "torch.cat(features, 1)", "torch.cat([features[-1]] * 9, 1)[:, : sum(f.shape[1] for f in features)]"),
    M("6.1", "concatenates itself", "return self.drop(self.steps(x))", "return torch.cat([x, self.drop(self.steps(x))], 1)"),
    M("6.1", "bias", "growth_rate, 3, padding=1, bias=False", "growth_rate, 3, padding=1"),
    M("6.2", "input left out", "return torch.cat(maps, 1)", "return torch.cat(maps[1:] or maps, 1)"),
    M("6.2", "growth twice", "in_channels + i * growth_rate", "in_channels + 2 * i * growth_rate"),
    M("6.2", "new maps first", "maps + [new]", "[new] + maps"),
    M("6.2", "out_channels wrong", "in_channels + depth * growth_rate if dense else growth_rate", "depth * growth_rate"),
    M("6.2", "dense ignored", "maps + [new] if self.dense else [new]", "maps + [new]", "if not dense and i > 0:", "if False:"),
    M("6.2", "options ignored", ", growth_rate, **layer_options)", ", growth_rate)"),
    M("6.3", "max-pool", "nn.AvgPool2d(2)", "nn.MaxPool2d(2)"),
    M("6.3", "no ReLU", "            nn.ReLU(),\n", ""),
    M("6.3", "bias", ", bias=False", ""),
    M("6.3", "norm behind", "            nn.BatchNorm2d(in_channels),\n            nn.ReLU(),\n            nn.Conv2d(in_channels, out_channels, 1, bias=False),", "            nn.Conv2d(in_channels, out_channels, 1, bias=False),\n            nn.BatchNorm2d(out_channels),\n            nn.ReLU(),"),
    M("6.3", "stride for the pool", "1, bias=False),\n            nn.AvgPool2d(2),", "1, stride=2, bias=False),"),
    M("6.3", "no pool", "            nn.AvgPool2d(2),\n", ""),
    M("6.4", "dropout not handed on", '"dropout": dropout, ', ""),
    M("6.4", "bottleneck not handed on", '"bottleneck": bottleneck, ', ""),
    M("6.4", "no init", "        self.init_weights()\n", "\n"),
    M("6.4", "no compression", "int(now * compression)", "now"),
    M("6.4", "no last norm", "            nn.BatchNorm2d(now),\n            nn.ReLU(),\n            nn.AdaptiveAvgPool2d(1)", "            nn.AdaptiveAvgPool2d(1)"),
    M("6.4", "no last ReLU", "            nn.ReLU(),\n            nn.AdaptiveAvgPool2d(1)", "            nn.AdaptiveAvgPool2d(1)"),
    M("6.4", "stem_channels ignored", "stem_channels if stem_channels is not None else 2 * growth_rate", "2 * growth_rate"),
    M("6.4", "dense ignored, compression rounded up", "int(now * compression)", "math.ceil(now * compression)"),
    # -------------------------------------------------------------------------------- lesson 7
    M("7.1", "half the rate", "nn.Dropout(0.5)", "nn.Dropout(0.25)"),
    M("7.1", "no dropout", "            nn.Dropout(0.5),\n", ""),
    M("7.1", "dropout before the hidden layer", "            nn.Linear(16 * c, wide),\n            nn.ReLU(),\n            nn.Dropout(0.5),", "            nn.Dropout(0.5),\n            nn.Linear(16 * c, wide),\n            nn.ReLU(),"),
    M("7.1", "softmax", "nn.Linear(wide, num_classes),", "nn.Linear(wide, num_classes), nn.Softmax(1),"),
    M("7.1", "no hidden ReLU", "            nn.ReLU(),\n            nn.Dropout", "            nn.Dropout"),
    M("7.1", "average pools", "nn.MaxPool2d", "nn.AvgPool2d"),
    M("7.1", "tanh", "nn.ReLU()", "nn.Tanh()"),
    M("7.1", "no padding", "nn.Conv2d(b, c, 3, padding=1)", "nn.Conv2d(b, c, 3)"),
    M("7.2", "max-pool", "nn.AvgPool2d", "nn.MaxPool2d"),
    M("7.2", "ReLU", "nn.Tanh()", "nn.ReLU()"),
    M("7.2", "sigmoid", "nn.Tanh()", "nn.Sigmoid()"),
    M("7.2", "no init", "        self.init_weights()\n", "\n"),
    M("7.2", "no tanh between", "            nn.Linear(c, d),\n            nn.Tanh(),", "            nn.Linear(c, d),"),
    M("7.2", "tanh behind the pool", "nn.Tanh(), nn.AvgPool2d(2))", "nn.AvgPool2d(2), nn.Tanh())"),
    M("7.2", "width ignored", "scaled(n, width_mult)", "scaled(n, 1.0)"),
    M("7.3", "half the rate", "nn.Dropout(0.5)", "nn.Dropout(0.25)"),
    M("7.3", "one dropout", "            nn.Dropout(0.5),\n            nn.Linear(wide, wide)", "            nn.Linear(wide, wide)"),
    M("7.3", "dropout before the last", "            nn.Dropout(0.5),\n            nn.Linear(wide, wide),\n            nn.ReLU(),", "            nn.Linear(wide, wide),\n            nn.ReLU(),\n            nn.Dropout(0.5),"),
    M("7.3", "a pool missing", "nn.Conv2d(a, b, 5, padding=2), nn.ReLU(), pool()", "nn.Conv2d(a, b, 5, padding=2), nn.ReLU()"),
    M("7.3", "a ReLU missing", "nn.Conv2d(c, d, 3, padding=1), nn.ReLU()", "nn.Conv2d(c, d, 3, padding=1)"),
    M("7.3", "max at the head", "AdaptiveAvgPool2d", "AdaptiveMaxPool2d"),
    M("7.3", "no padding", "nn.Conv2d(3, a, 11, 4, 2)", "nn.Conv2d(3, a, 11, 4)"),
    M("7.4", "no scale", " / self.size**0.5", ""),
    M("7.4", "scale by d", "self.size**0.5", "self.size"),
    M("7.4", "scale by the width", "self.size**0.5", "d**0.5"),
    M("7.4", "softmax over the queries", "softmax(dim=-1)", "softmax(dim=-2)"),
    M("7.4", "no softmax", "scores.softmax(dim=-1)", "scores"),
    M("7.4", "no transpose", "mixed.transpose(1, 2).reshape(n, t, d)", "mixed.reshape(n, t, d)"),
    M("7.4", "no last layer", "self.out(mixed.transpose(1, 2).reshape(n, t, d))", "mixed.transpose(1, 2).reshape(n, t, d)"),
    M("7.4", "no bias", "nn.Linear(dim, 3 * dim)", "nn.Linear(dim, 3 * dim, bias=False)"),
    M("7.4", "keys are queries", "scores = q @ k", "scores = q @ q"),
    M("7.4", "one head", "reshape(n, t, self.heads, self.size)", "reshape(n, t, 1, d)"),
    M("7.4", "heads of the tokens", "reshape(n, t, self.heads, self.size).transpose(1, 2)", "reshape(n, self.heads, t, self.size)"),
    M("7.5", "post-norm", "y = self.att(self.n1(x))\n        x = x + y\n        y = self.b(nn.functional.gelu(self.a(self.n2(x))))\n        return x + y", "x = self.n1(x + self.att(x))\n        return self.n2(x + self.b(nn.functional.gelu(self.a(x))))"),
    M("7.5", "ReLU", "nn.functional.gelu", "torch.relu"),
    M("7.5", "no activation", "nn.functional.gelu(self.a(self.n2(x)))", "self.a(self.n2(x))"),
    M("7.5", "eps", "self.n1 = nn.LayerNorm(dim, eps=1e-6)", "self.n1 = nn.LayerNorm(dim)"),
    M("7.5", "no first shortcut", "x = x + y\n", "x = y\n"),
    M("7.5", "no second shortcut", "return x + y", "return y"),
    M("7.5", "norm twice the same", "self.n2(x)", "self.n1(x)"),
    M("7.5", "shortcut of the norm", "y = self.att(self.n1(x))\n        x = x + y", "x = self.n1(x)\n        x = x + self.att(x)"),
    M("7.5", "tanh GELU", "nn.functional.gelu(self.a(self.n2(x)))", "nn.functional.silu(self.a(self.n2(x)))"),
    M("7.6", "< for <=", "cheap <= dear", "cheap < dear"),
    M("7.6", "> for >=", "b.top1 >= a.top1", "b.top1 > a.top1"),
    M("7.6", "ties dropped", "(cheap < dear or b.top1 > a.top1)", "b is not a"),
    M("7.6", "or for and", "cheap <= dear and", "cheap <= dear or"),
    M("7.6", "not sorted", "sorted(unbeaten, key=lambda a: getattr(a, cost))", "unbeaten"),
    M("7.6", "the dearest first", "getattr(a, cost))", "-getattr(a, cost))"),
    M("7.6", "what has no cost stays", "None not in (getattr(c, cost), c.top1)", "c.top1 is not None"),
    # -------------------------------------------------------------------------------- lesson 8
    M("8.1", "statistics run on", "            m.register_forward_pre_hook(hold_still)", "            pass"),
    M("8.1", "children", "part.modules()", "part.children()"),
    M("8.1", "eval only", "m.register_forward_pre_hook(hold_still)", "m.eval()"),
    M("8.1", "never thawed", "p.requires_grad = True", "p.requires_grad = p.requires_grad"),
    M("8.1", "held for ever", "if all(not p.requires_grad for p in norm.parameters()):", "if True:"),
    M("8.1", "weights learn", "p.requires_grad = False", "pass"),
    M("8.2", "first part fastest", "count - 1 - i", "i"),
    M("8.2", "off by one", "count - 1 - i", "count - i"),
    M("8.2", "multiplied", "lr / decay", "lr * decay"),
    M("8.2", "linear", "lr / decay ** (count - 1 - i)", "lr / max(1, decay * (count - 1 - i))"),
    M("8.2", "empty groups", 'if len(group["params"]) > 0:', "if True:"),
    M("8.2", "one rate", "lr / decay ** (count - 1 - i)", "lr"),
    M("8.2", "no decay", "parameter_groups(part, weight_decay)", "parameter_groups(part, 0.0)"),
    M("8.3", "no super()._apply()", "        super()._apply()\n", ""),
    M("8.3", "requires_grad_ only", "freeze(part)", "part.requires_grad_(False)"),
    M("8.3", "first parts first", "if i < first:", "if i >= count:"),
    M("8.3", "none at first", "1 + self.taken // self.every", "self.taken // self.every"),
    M("8.3", "newest only", "if i < first:", "if i != first:"),
    M("8.3", "every ignored", "self.taken // self.every", "self.taken"),
    M("8.3", "a step late", "self.taken // self.every", "max(0, self.taken - 1) // self.every"),
    M("8.4", "p for 1 - p", "(1 - log_p.exp())", "log_p.exp()"),
    M("8.4", "sum", ".mean()", ".sum()"),
    M("8.4", "sign", "(-weight * log_p)", "(weight * log_p)"),
    M("8.4", "detached", "weight = (1 - log_p.exp())", "weight = (1 - log_p.exp().detach())"),
    M("8.4", "times gamma", "** self.gamma", "* self.gamma"),
    M("8.4", "no weight", "(-weight * log_p)", "(-log_p)"),
    M("8.5", "not centred", "a = source - source.mean(0)\n    b = target - target.mean(0)", "a = source\n    b = target"),
    M("8.5", "n for n - 1", "(len(source) - 1)", "len(source)", "(len(target) - 1)", "len(target)"),
    M("8.5", "4 d", "(4 * d * d)", "(4 * d)"),
    M("8.5", "no 4", "(4 * d * d)", "(d * d)"),
    M("8.5", "root", "((a - b) ** 2).sum()", "((a - b) ** 2).sum().sqrt()"),
    M("8.5", "absolute", "((a - b) ** 2)", "(a - b).abs()"),
    M("8.6", "no sign", "gradient * -ctx.strength", "gradient * ctx.strength"),
    M("8.6", "no strength", "gradient * -ctx.strength", "-gradient"),
    M("8.6", "forward negated", "x.clone()", "-x"),
    M("8.6", "forward scaled", "x.clone()", "x * strength"),
    M("8.7", "no reset", "            m.reset_running_stats()\n", ""),
    M("8.7", "moving average", "            m.momentum = None\n", ""),
    M("8.7", "momentum not set back", "        m.momentum = momentum\n", "        pass\n"),
    M("8.7", "left in train mode", "    model.eval()\n    return model", "    return model.train()"),
    M("8.7", "all of it in train mode", "    model.eval()\n    old", "    model.train()\n    old"),
    M("8.7", "nothing given back", "    return model\n", ""),
    M("8.7", "eval mode all along", "            m.train()\n", ""),
)  # fmt: skip


R = M
RIGHT: tuple[Edit, ...] = (
    *(Edit(number, "in a student's words", "", "") for number in SOLUTIONS),
    R("0.1", "torch.where", "out = x.clone()\n    out[coin] = torch.flip(out[coin], dims=[3])\n    return out", "return torch.where(coin[:, None, None, None], x.flip(-1), x)"),
    R("1.1", "F.pad", "n, _, h, w = x.shape\n        return torch.cat([x, x.new_zeros(n, self.more, h, w)], dim=1)", "return F.pad(x, (0, 0, 0, 0, 0, self.more))"),
    R("1.1", "a pool of size 1", "x = x[:, :, :: self.step, :: self.step]", "x = F.max_pool2d(x, 1, self.step)"),
    R("1.3", "bare parameters", "self.down = nn.Linear(channels, small)\n        self.up = nn.Linear(small, channels)", "self.w1 = nn.Parameter(torch.randn(small, channels))\n        self.b1 = nn.Parameter(torch.zeros(small))\n        self.w2 = nn.Parameter(torch.randn(channels, small))\n        self.b2 = nn.Parameter(torch.zeros(channels))", "self.down(s)", "s @ self.w1.T + self.b1", "self.up(s)", "s @ self.w2.T + self.b2"),
    R("1.3", "bare parameters, the other way round", "self.down = nn.Linear(channels, small)\n        self.up = nn.Linear(small, channels)", "self.w1 = nn.Parameter(torch.randn(channels, small))\n        self.b1 = nn.Parameter(torch.zeros(small))\n        self.w2 = nn.Parameter(torch.randn(small, channels))\n        self.b2 = nn.Parameter(torch.zeros(channels))", "self.down(s)", "s @ self.w1 + self.b1", "self.up(s)", "s @ self.w2 + self.b2"),
    R("1.3", "convolutions registered the other way round", "self.down = nn.Linear(channels, small)\n        self.up = nn.Linear(small, channels)", "self.up = nn.Linear(small, channels)\n        self.down = nn.Linear(channels, small)"),
    R("1.4", "the shortcut between convolution and norm", "y = self.norm_a(self.a(x))", "y = self.a(x)\n        skip = self.skip(x)\n        y = self.norm_a(y)", "y + self.skip(x)", "y + skip"),
    R("1.4", "the shortcut first", "y = self.norm_a(self.a(x))", "skip = self.skip(x)\n        y = self.norm_a(self.a(x))", "y + self.skip(x)", "skip + y"),
    R("1.4", "registered in another order", "self.a = nn", "self.skip = make_shortcut(shortcut, in_channels, channels, stride)\n        self.a = nn"),
    R("1.4", "in place", "torch.relu(y)", "F.relu(y, inplace=True)"),
    R("1.4", "clamp", "return torch.relu(y)", "return y.clamp(min=0)"),
    R("1.4", "padding by name", "3, stride=1, padding=1, bias=False", "3, padding='same', bias=False"),
    R("1.5", "shortcut first", "y = torch.relu(self.norm_a(self.a(x)))", "skip = self.skip(x)\n        y = torch.relu(self.norm_a(self.a(x)))", "y + self.skip(x)", "y + skip"),
    R("1.5", "norms registered first", "self.a = nn.Conv2d", "self.bn3 = nn.BatchNorm2d(out)\n        self.a = nn.Conv2d"),
    R("1.6", "shortcut first", "y = self.c1(z)", "skip = x if self.same else self.skip(z)\n        y = self.c1(z)", "(x if self.same else self.skip(z))", "skip"),
    R("2.1", "functional", "self.down = nn.MaxPool2d(2, stride=2, ceil_mode=ceil_mode)", "self.ceil = ceil_mode", "self.down(self.steps(x))", "nn.functional.max_pool2d(self.steps(x), 2, ceil_mode=self.ceil)"),
    R("2.3", "a list of blocks, appended", "self.stages = nn.Sequential(*blocks)", "self.stages = nn.Sequential()\n        for b in blocks:\n            self.stages.append(b)"),
    R("3.1", "modules", "return torch.relu(x)", "return nn.ReLU()(x)"),
    R("3.2", "one by one", "parts = [branch(x) for branch in self.branches]\n        return torch.cat(parts, 1)", "out = self.branches[0](x)\n        for branch in self.branches[1:]:\n            out = torch.cat([out, branch(x)], 1)\n        return out"),
    R("3.3", "branches computed from the last", "return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)", "d = self.pool(x)\n        c = self.five(x)\n        b = self.three(x)\n        return torch.cat([self.one(x), b, c, d], 1)"),
    R("3.4", "branches computed from the last", "return torch.cat([self.one(x), self.two(x), self.three(x), self.four(x)], 1)", "d = self.four(x)\n        c = self.three(x)\n        b = self.two(x)\n        return torch.cat([self.one(x), b, c, d], 1)"),
    R("3.4", "third branch first", "return torch.cat([self.one(x), self.two(x), self.three(x), self.four(x)], 1)", "c = self.three(x)\n        return torch.cat([self.one(x), self.two(x), c, self.four(x)], 1)"),
    R("3.5", "functional dropout", "self.drop = nn.Dropout(0.7)\n", "pass\n", "self.drop(x)", "nn.functional.dropout(x, 0.7, self.training)"),
    R("3.6", "a sum", "total = self.criterion(outputs[0], targets)\n        for aux in outputs[1:]:\n            total = total + self.weight * self.criterion(aux, targets)\n        return total", "losses = [self.criterion(o, targets) for o in outputs]\n        return losses[0] + self.weight * sum(losses[1:])"),
    R("4.1", "no least", "    if nearest < divisor:\n        nearest = divisor\n", ""),
    R("4.3", "rand >= rate", "torch.rand(x.shape[0], 1, 1, 1) < 1 - self.rate", "torch.rand(x.shape[0], 1, 1, 1) >= self.rate"),
    R("4.3", "bernoulli", "torch.rand(x.shape[0], 1, 1, 1) < 1 - self.rate", "torch.bernoulli(torch.full((len(x), 1, 1, 1), 1 - self.rate))"),
    R("4.3", "floor", "torch.rand(x.shape[0], 1, 1, 1) < 1 - self.rate", "torch.floor(1 - self.rate + torch.rand(len(x), 1, 1, 1))"),
    R("4.3", "dropout of ones", "keep = torch.rand(x.shape[0], 1, 1, 1) < 1 - self.rate\n        return x * keep / (1 - self.rate)", "return x * nn.functional.dropout(torch.ones(len(x), 1, 1, 1), self.rate)"),
    R("4.4", "sum the other way round", "y = x + self.drop(y)", "y = self.drop(y) + x"),
    R("5.1", "a Sequential", "self.mix(self.filter(x))", "nn.Sequential(self.filter, self.mix)(x)"),
    R("5.2", "linear layers", "self.a = nn.Conv2d(channels, small, 1)\n        self.b = nn.Conv2d(small, channels, 1)", "self.a = nn.Linear(channels, small)\n        self.b = nn.Linear(small, channels)", "nn.functional.adaptive_avg_pool2d(x, 1)", "x.mean((2, 3))", "return g * x", "return g[..., None, None] * x"),
    R("5.2", "relu6 by hand", "nn.functional.hardsigmoid(self.b(g))", "nn.functional.relu6(self.b(g) + 3) / 6"),
    R("5.3", "the sum in place", "return x + y if self.add else y", "if self.add:\n            y += x\n        return y"),
    R("6.1", "functional dropout", "self.drop(self.steps(x))", "nn.functional.dropout(self.steps(x), self.drop.p, self.training)"),
    R("6.2", "concatenated as it goes", "maps = [x]\n        for layer in self.layers:\n            new = layer(maps)\n            maps = maps + [new] if self.dense else [new]\n        return torch.cat(maps, 1)", "for layer in self.layers:\n            new = layer([x])\n            x = torch.cat([x, new], 1) if self.dense else new\n        return x"),
    R("6.3", "pool before the convolution", "            nn.Conv2d(in_channels, out_channels, 1, bias=False),\n            nn.AvgPool2d(2),", "            nn.AvgPool2d(2),\n            nn.Conv2d(in_channels, out_channels, 1, bias=False),"),
    R("7.2", "C5 as a convolution", "            nn.Flatten(),\n            nn.Linear(25 * b, c),\n            nn.Tanh(),", "            nn.Conv2d(b, c, 5),\n            nn.Flatten(),\n            nn.Tanh(),"),
    R("7.4", "qkv as (heads, 3, d)", "q, k, v = self.qkv(x).chunk(3, dim=-1)\n        q = q.reshape(n, t, self.heads, self.size).transpose(1, 2)\n        k = k.reshape(n, t, self.heads, self.size).transpose(1, 2)\n        v = v.reshape(n, t, self.heads, self.size).transpose(1, 2)", "q, k, v = self.qkv(x).reshape(n, t, self.heads, 3, self.size).permute(3, 0, 2, 1, 4)"),
    R("7.4", "values, keys, queries", "q, k, v = self.qkv", "v, k, q = self.qkv"),
    R("7.4", "three linear layers", "self.qkv = nn.Linear(dim, 3 * dim)", "self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))", "self.qkv(x).chunk(3, dim=-1)", "self.q(x), self.k(x), self.v(x)"),
    R("7.4", "three linear layers, used in another order", "self.qkv = nn.Linear(dim, 3 * dim)", "self.v, self.q, self.k = (nn.Linear(dim, dim) for _ in range(3))", "q, k, v = self.qkv(x).chunk(3, dim=-1)", "v, k, q = self.v(x), self.k(x), self.q(x)"),
    R("7.4", "queries, and keys with values", "self.qkv = nn.Linear(dim, 3 * dim)", "self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)", "q, k, v = self.qkv(x).chunk(3, dim=-1)", "q, (k, v) = self.q(x), self.kv(x).chunk(2, dim=-1)"),
    R("7.4", "nn.MultiheadAttention", "self.qkv = nn.Linear(dim, 3 * dim)\n        self.out = nn.Linear(dim, dim)", "self.inner = nn.MultiheadAttention(dim, heads, batch_first=True)", "n, t, d = x.shape", "return self.inner(x, x, x, need_weights=False)[0]\n        n, t, d = x.shape"),
    R("7.4", "einsum", "q @ k.transpose(-2, -1)", "torch.einsum('nhid,nhjd->nhij', q, k)"),
    R("7.4", "scaled_dot_product_attention", "scores = q @ k.transpose(-2, -1) / self.size**0.5\n        mixed = scores.softmax(dim=-1) @ v", "mixed = nn.functional.scaled_dot_product_attention(q, k, v)"),
    R("7.5", "the mlp as a Sequential", "self.b = nn.Linear(mlp_dim, dim)", "self.b = nn.Linear(mlp_dim, dim)\n        self.mlp = nn.Sequential(self.a, nn.GELU(), self.b)", "self.b(nn.functional.gelu(self.a(self.n2(x))))", "self.mlp(self.n2(x))"),
    R("7.6", "one pass over the sorted list", "unbeaten = [a for a in everyone if not any(beats(b, a) for b in everyone)]", "unbeaten = []\n    for a in sorted(everyone, key=lambda a: (getattr(a, cost), -a.top1)):\n        if not unbeaten or not beats(unbeaten[-1], a):\n            unbeaten.append(a)"),
    R("7.6", "sorted by accuracy afterwards", "key=lambda a: getattr(a, cost))", "key=lambda a: a.top1)"),
    R("8.1", "eval in a hook of its own", "m.register_forward_pre_hook(hold_still)", "m.register_forward_pre_hook(lambda norm, inputs: hold_still(norm, inputs))"),
    R("8.4", "F.cross_entropy", "logits.log_softmax(1).gather(1, y[:, None]).squeeze(1)", "-F.cross_entropy(logits, y, reduction='none')"),
    R("8.5", "torch.cov", "a = a.T @ a / (len(source) - 1)\n    b = b.T @ b / (len(target) - 1)", "a, b = torch.cov(source.T), torch.cov(target.T)"),
    R("8.6", "neg", "gradient * -ctx.strength", "(ctx.strength * gradient).neg()"),
)  # fmt: skip


# --------------------------------------------------------------------------------- trying them out


@dataclass
class Outcome:
    """What the grader said of one case."""

    kind: str
    exercise: str
    what: str
    results: list[Result]

    @property
    def lost(self) -> list[Result]:
        return [r for r in self.results if not r.passed]

    @property
    def points(self) -> float:
        return sum(r.score for r in self.results)

    @property
    def named(self) -> bool:
        """Whether a message says more than by how much the numbers differ."""
        return any(is_named(r.message) for r in self.lost)

    @property
    def hidden_only(self) -> bool:
        return bool(self.lost) and all(r.visibility == "hidden" for r in self.lost)


def is_named(message: str) -> bool:
    generic = ("off by up to", "expected ", "the output's shape should be", "the shape is")
    if any(
        f"; {words}" in message for words in ("likely: ", "it is ", "it would be ", "there is a ")
    ):
        return True
    if any(
        words in message
        for words in (" is a ", "there is no ", "missing: ", "too many: ", "(line ")
    ):
        return True
    return not any(words in message for words in generic)


class Trier:
    """Runs cases, one after another, with one grader."""

    def __init__(self, folder: Path, grader: Grader) -> None:
        self.folder, self.grader = folder, grader

    def mark(self, lesson: str, text: str, numbers: list[str]) -> list[Result]:
        path = self.folder / file_name(lesson)
        path.write_text(text, encoding="utf-8")
        submission = Submission("student", path)
        return [r for n in numbers for r in self.grader.mark_exercise(submission, n)]

    def edit(self, kind: str, edit: Edit) -> Outcome:
        text = submission_with(edit.exercise, edit.code())
        results = self.mark(lesson_of(edit.exercise), text, [edit.exercise])
        return Outcome(kind, edit.exercise, edit.what, results)

    def theft(self, what: str, lesson: str) -> Outcome:
        """Twice, so that what the first worker has kept can be used by the second."""
        numbers = list(exercises(lesson))
        parts = [part for e in exercises(lesson).values() for part in e.parts]
        head = (parts, file_name(lesson), [str(ROOT)], _PLACES, sys.path)
        text = make_starter(lesson) + PREFIX.replace("HEAD", repr(head)) + THEFT[what]
        results = [r for _ in range(2) for r in self.mark(lesson, text, numbers)]
        return Outcome("theft", lesson, what, results)

    def harm(self, what: str, lesson: str) -> tuple[Outcome, bool]:
        """The outcome, and whether everything else is as it was."""
        victims = [self.folder / name for name in ("grades.csv", "neighbour.py")]
        for victim in victims:
            victim.write_text("as it was")
        code = HARM[what].replace("VICTIMS", repr([str(v) for v in victims]))
        text = lesson_path(lesson).read_text(encoding="utf-8")
        text += "\n" + code.replace("GRADER", str(os.getpid()))
        numbers = list(exercises(lesson))
        results = self.mark(lesson, text, numbers)
        whole = len(results) == len(worth((lesson,))) and all(
            victim.read_text() == "as it was" for victim in victims
        )
        return Outcome("harm", lesson, what, results), whole


def without_relu(seeds: Iterable[int]) -> list[int]:
    """Seeds for which squeeze-and-excitation without its ReLU would pass in some case, or for which
    the reference's numbers would be drawn again too often.
    """
    from common.grading import probes

    exercise = exercises("01")["1.3"]
    sides = []
    for code in (SOLUTIONS["1.3"], SOLUTIONS["1.3"].replace("torch.relu", "")):
        sides.append(probes.Submission())
        sides[-1].namespace = {"torch": torch, "nn": torch.nn}
        exec(code, sides[-1].namespace)
    overlooked = []
    for seed, (place, case) in itertools.product(seeds, enumerate(exercise.cases)):
        for draw in range(References.DRAWS):
            given = case.expression, case.inputs, case.as_list, seed + place + 1000 * draw
            right = sides[0].observe(*given, careful=True)
            if not right["silent"]:
                break
        if agree(right["eval"], sides[1].observe(*given)["eval"]):
            overlooked.append(seed)
    return overlooked


_PLACES = ("/tmp", "/var/tmp", "/dev/shm", ".", "/run/lock")


def main(argv: list[str] | None = None) -> int:
    """Exit code 1, if a mistake was missed, a right solution rejected, or a point stolen."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.grading_cases", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--all", action="store_true", help="every case, not a fixed sample")
    parser.add_argument("--only", metavar="N.M", help="cases of this exercise or lesson")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    step = 1 if options.all or options.only else 12

    def chosen(cases: list) -> list:
        wanted = options.only
        if wanted:
            cases = [c for c in cases if getattr(c, "exercise", "").startswith(wanted)]
        return cases[::step]

    started = time.monotonic()
    limits = replace(Limits(), import_seconds=3, case_seconds=3)
    grader = Grader(tuple(manifests()), limits, References(options.seed))
    with tempfile.TemporaryDirectory() as folder, grader:
        os.chmod(folder, 0o755)
        trier = Trier(Path(folder), grader)
        mistakes = [trier.edit("mistake", case) for case in chosen(list(MISTAKES))]
        right = [trier.edit("right", case) for case in chosen(list(RIGHT))]
        thefts, harms = [], []
        if not options.only:
            lessons = list(manifests())
            for i, what in enumerate(list(THEFT)[::step]):
                for lesson in lessons if options.all else [lessons[i % len(lessons)]]:
                    thefts.append(trier.theft(what, lesson))
            harms = [trier.harm(what, "05") for what in list(HARM)[::step]]
    seeds = range(1000) if options.all else range(0)
    overlooked = without_relu(seeds)
    print(f"1.3 without its ReLU: overlooked for {len(overlooked)} of {len(seeds)} seeds")
    return report(mistakes, right, thefts, harms, time.monotonic() - started)


def report(
    mistakes: list[Outcome],
    right: list[Outcome],
    thefts: list[Outcome],
    harms: list[tuple[Outcome, bool]],
    seconds: float,
) -> int:
    missed = [o for o in mistakes if not o.lost]
    unnamed = [o for o in mistakes if o.lost and not o.named]
    hidden = [o for o in mistakes if o.hidden_only]
    rejected = [o for o in right if o.lost]
    stolen = sum(o.points for o in thefts)
    harmed = [o for o, whole in harms if not whole]
    for title, outcomes in (
        ("missed", missed),
        ("not named", unnamed),
        ("found by a hidden check only", hidden),
        ("rejected", rejected),
        ("stole", [o for o in thefts if o.points]),
        ("harmed", harmed),
    ):
        for o in outcomes:
            message = o.lost[0].message[:220] if o.lost else ""
            print(f"{title}: {o.exercise} {o.what}: {message}")
    caught = len(mistakes) - len(missed)
    print(f"{'':32} {'tried':>6} {'found':>6} {'named':>6} {'missed':>6}")
    for lesson in sorted({lesson_of(o.exercise) for o in mistakes}):
        of = [o for o in mistakes if lesson_of(o.exercise) == lesson]
        found = [o for o in of if o.lost]
        named = sum(o.named for o in found)
        line = f"{len(of):6} {len(found):6} {named:6} {len(of) - len(found):6}"
        print(f"{f'mistakes, lesson {lesson}':32} {line}")
    line = f"{len(mistakes):6} {caught:6} {caught - len(unnamed):6} {len(missed):6}"
    print(f"{'mistakes':32} {line}")
    print(f"{'right, and accepted':32} {len(right):6} {len(right) - len(rejected):6}")
    files = len({o.what for o in thefts}) + len(harms)
    print(f"{'hostile files':32} {files:6}")
    print(f"{'points gained by theft':32} {stolen:6g}   in {len(thefts)} attempts")
    print(f"{'harmed others':32} {len(harmed):6}")
    print(f"{seconds:.0f} s")
    return 1 if missed or rejected or stolen or harmed else 0


if __name__ == "__main__":
    sys.exit(main())
