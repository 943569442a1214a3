"""What the machine decides: here, the layout in memory."""

from __future__ import annotations

import torch
from torch import nn

from common import runtime


def test_depthwise_nets_are_channels_last_at_any_size() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2))
    depthwise = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
    assert runtime.memory_format(32, plain) is torch.channels_last
    assert runtime.memory_format(8, plain) is torch.contiguous_format
    assert runtime.memory_format(8, depthwise) is torch.channels_last
