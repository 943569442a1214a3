"""`--find-lr`: a learning-rate range test.  Smith 2017, "Cyclical learning rates", sec. 3.3.

One short training in which the rate rises with every step. Where the loss falls steeply the rate is
good; where it turns upwards it is too large.

NOTE: Smith's rate rises linearly over some epochs. Here it rises by a constant factor, so that one
test covers six decades.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from common import plotting
from common.config import TrainConfig
from common.data import load_data
from common.engine.device import amp_dtype, autocast
from common.engine.errors import UserError
from common.engine.surroundings import script
from common.experiments import conclude
from common.pretrained import load_pretrained, weights_mean_std
from common.runs import Run, prepare
from common.training import make_optimizer, measure_layers

LOWEST, HIGHEST, STEPS = 1e-5, 10.0, 120
SMOOTHING = 0.9  # weight of the losses before; single batches are noisy


def find_lr(config: TrainConfig, build: Callable[[Any, int], nn.Module]) -> dict[str, Any]:
    """Train through all rates until the loss is four times its lowest, and draw it.

    Raises:
        UserError: the loss never fell.
    """
    if getattr(config, "from_run", ""):
        raise UserError("--find-lr starts from random or --pretrained weights: leave out --from")
    config, device = prepare(replace(config, experiment="find-lr"))
    data = load_data(config, device, weights_mean_std(config.model) if config.pretrained else None)
    model = build(config, data.num_classes).to(device).train()
    if config.pretrained:
        load_pretrained(model, config.model, data.class_names)
    else:
        measure_layers(model, data)
    optimizer = make_optimizer(model, replace(config, lr=1.0))
    shares = [group["lr"] for group in optimizer.param_groups]  # Muon's groups differ in theirs
    loss_fn = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    run = Run.open(config, Path(script()).stem or "notebook")
    batches = itertools.chain.from_iterable(map(data.train.batches, itertools.count()))
    rates = np.geomspace(LOWEST, HIGHEST, STEPS)
    losses: list[float] = []
    mean = 0.0
    for step, rate in enumerate(rates, 1):
        for group, share in zip(optimizer.param_groups, shares):
            group["lr"] = rate * share
        optimizer.zero_grad()
        for x, y in itertools.islice(batches, data.train.accumulate):
            with autocast(device, amp_dtype(device, config.amp, config.image_size)):
                output = model(x)
                # GoogLeNet's auxiliary heads come after the logits.
                loss = loss_fn(output[0] if isinstance(output, tuple) else output, y)
            (loss / data.train.accumulate).backward()
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss.item()
        losses.append(mean / (1 - SMOOTHING**step))  # as Adam corrects its averages
        if not math.isfinite(losses[-1]) or losses[-1] > 4 * min(losses):
            break
        if config.clip:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()

    lowest = int(np.nanargmin(losses))
    if lowest == 0:
        raise UserError("--find-lr: the loss rose from the first step on; nothing can be said")
    title = f"Loss while the rate rises; lowest at {rates[lowest]:.2g}"
    x = rates[: len(losses)]
    figure = plotting.curves(
        {"": losses}, "learning rate (log scale)", "smoothed training loss", title, x=x, log_x=True
    )
    # The rise at the end would flatten all that is to be seen.
    figure.axes[0].set_ylim(0.95 * min(losses), 1.3 * losses[0])
    run.figure("find_lr", figure)
    rows = [{"rate": f"{r:.2g}", "loss": round(loss, 3)} for r, loss in zip(rates, losses)][::8]
    sentences = [
        f"the loss is lowest at a rate of {rates[lowest]:.2g}: there it is about to turn",
        f"a tenth of that is a sound peak, to be tried with its neighbours: --lr "
        f"{rates[lowest] / 10:.2g} (the recipe has {config.lr:.2g})",
    ]
    return conclude(run, rows, sentences, rates=x.tolist(), losses=losses)
