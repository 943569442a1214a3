"""A run's life outside the loop: what `auto` means here,
its folder, its checkpoints, its results and its report.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from common import inspection, plotting
from common.augmentation import Views
from common.config import TrainConfig
from common.data import Data
from common.engine import processes, report, sources
from common.engine.baselines import baselines
from common.engine.device import amp_dtype, describe, pick_device, set_up_torch
from common.engine.errors import Locked, UserError
from common.engine.files import write_csv, write_json
from common.engine.records import EpochRecord, Evaluation, Profile
from common.engine.run_folder import RunFolder
from common.engine.surroundings import command
from common.engine.verdicts import wilson
from common.engine.weights import size_for_weights
from common.evaluation import evaluate, most_wrong
from common.profiling import count_macs, count_parameters

ConfigT = TypeVar("ConfigT", bound=TrainConfig)


def prepare(config: ConfigT) -> tuple[ConfigT, torch.device]:
    """Processes, device and seeds set up; the config with everything that the flags left open
    filled in.

    Raises:
        UserError: the device, the dataset or the package of --track isn't there.
    """
    if config.track and find_spec("tensorboard") is None:
        raise UserError("--track tensorboard needs a package: pip install tensorboard")
    processes.join_processes(config.device)
    device = pick_device(config.device)
    set_up_torch(device, config.seed, config.deterministic)
    # One process downloads; the others find what it left.
    choice = None
    if processes.is_main():
        choice = sources.choose_dataset(config.dataset, config.data_dir, device.type == "cuda")
    name, why = processes.from_main(choice)
    image_size = images = None
    if name == "folder":
        image_size, images = sources.size_of_folder(config.data_dir)
    if config.pretrained:
        # The stems of official weights are made for large images; below about 96 px little is left
        # of them.
        official = 224 if device.type == "cuda" else 96
        image_size = size_for_weights(config.model, config.image_size, official)
    config = config.resolve(name, image_size, processes.world_size(), images)
    if why and processes.is_main():
        print(f"dataset    {why}", flush=True)
    return config, device


def banner(
    config: TrainConfig, device: torch.device, data: Data, model: nn.Module, run: Run
) -> None:
    """What is about to happen, in five lines."""
    if not processes.is_main():
        return
    amp = amp_dtype(device, config.amp, config.image_size)
    precision = f"mixed precision in {str(amp)[6:]}" if amp else "float32"
    world = processes.world_size()
    together = f", {world} processes" if world > 1 else ""
    print(f"device     {device.type}: {describe(device)}{together}, {precision}")
    print(f"data       {data.describe()}")
    macs = count_macs(model, data.input_size) / 1e6
    size = f"{count_parameters(model):,} parameters, {macs:,.1f} M multiply-adds an image"
    print(f"model      {config.model}, {size}")
    steps = len(data.train) // data.train.accumulate
    length = f"{config.epochs} epochs of {steps} steps of {data.train.images_per_step} images"
    rate = f"{config.schedule} from lr {config.lr:.3g}"
    print(f"recipe     {length}, {rate}, augment {config.augment}, seed {config.seed}")
    print(f"folder     {run.folder}", flush=True)


class Run(RunFolder):
    """The folder runs/<lesson>/<run name>/ and what is written there, by the main process alone.

    `Run.open(config, lesson)` makes it, or finds the one to resume; `save`, `load`, `save_best` and
    `load_best` are its checkpoints.
    """

    def note_epoch(self, history: list[EpochRecord], epochs: int) -> None:
        if not processes.is_main():
            return
        try:
            write_csv(self.folder / "history.csv", history)
        except Locked as error:  # by a spreadsheet; last.pt has it all
            if not self.warned:
                print(f"warning    {error}: close it, and the next epoch writes all", flush=True)
            self.warned = True
        r = history[-1]
        if self.config.track:  # see it with `tensorboard --logdir runs`
            for name, value in dataclasses.asdict(r).items():
                if name != "epoch":
                    self.tensorboard.add_scalar(name, value, r.epoch)
            self.tensorboard.flush()
        scores = f"loss {r.train_loss:.4f}  train {r.train_top1:6.2%}  val {r.val_top1:6.2%}"
        speed = f"{r.seconds:.1f} s  {r.images_per_second:,.0f} images/s"
        number = f"{r.epoch:>{len(str(epochs))}}/{epochs}"
        print(f"epoch {number}  {scores}  lr {r.lr:<8.3g} {speed}", flush=True)

    def figure(self, name: str, figure: Any) -> Path:
        path = plotting.save(figure, self.folder / f"{name}.png")
        if path not in self.figures:
            self.figures.append(path)
        if "ipykernel" in sys.modules:  # a notebook shows it
            from IPython.display import Image, display

            display(Image(path))
        return path

    def finish(
        self,
        model: nn.Module,
        data: Data,
        history: list[EpochRecord],
        test: Evaluation,
        cost: Profile,
        notes: Sequence[str] = (),
        tables: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Write result.json and report.html, print the outcome, and return what result.json holds,
        with `more` in it; `notes` and `tables` are for the report.
        """
        if self.config.views:  # kept apart: what it gains is no property of the network
            views = Views(model, data.test.part.flips)
            more["test_top1_views"] = evaluate(views, data.test, data.class_names).top1
        best = self.load_best()["best"]
        device = next(model.parameters()).device
        # The first epoch pays for start-up; its rate is told only where it is all there is.
        steady = history[1:] or history
        result = {
            "lesson": self.lesson,
            "model": self.config.model,
            "dataset": self.config.dataset,
            "image_size": self.config.image_size,
            "device": device.type,
            "hardware": cost.device,
            "amp": amp_dtype(device, self.config.amp, self.config.image_size) is not None,
            "seed": self.config.seed,
            "epochs": len(history),
            "best_epoch": best["epoch"],
            "params": cost.params,
            "macs": cost.macs,
            "val_top1": best["top1"],
            "test_top1": test.top1,
            "test_top1_interval": wilson(round(test.top1 * len(test.targets)), len(test.targets)),
            "test_top5": test.top5,
            "test_loss": test.loss,
            "per_class": [dataclasses.asdict(c) for c in test.per_class],
            "train_seconds": sum(r.seconds for r in history),
            "images_per_second": float(np.median([r.images_per_second for r in steady])),
            "latency_ms": cost.latency_ms,
            "latency_iqr_ms": cost.latency_iqr_ms,
            "peak_memory_mb": cost.peak_memory_mb,
            "torch_version": torch.__version__,
            "baselines": baselines(data) if processes.is_main() else {},
            "smoke": self.config.smoke,
            **more,
        }
        if not processes.is_main():
            return result
        write_json(self.folder / "result.json", result)
        facts = {"Data": data.describe(), **report.facts_of(result), "Command": command()}
        epochs = [dataclasses.asdict(r) for r in history]
        tables = {**(tables or {}), "Per class": result["per_class"], "Epochs": epochs}
        title = f"{self.config.model} on {self.config.dataset}"
        page = report.write_report(self.folder, title, facts, tables, self.figures, notes=notes)
        print(f"{report.outcome_of(result)}\nreport     {page}{self.where()}", flush=True)
        return result


def draw_figures(
    run: Run, model: nn.Module, data: Data, history: list[EpochRecord], test: Evaluation
) -> None:
    """The figures that every run has: curves, confusion,
    filters, activations, Grad-CAM, the worst mistakes.
    """
    if not processes.is_main():
        return
    names = data.class_names
    model.eval()

    def pictures(rows: np.ndarray) -> np.ndarray:
        return inspection.to_images(data.test.take(rows), data.mean, data.std)

    def said(row: int) -> str:
        guess, truth = test.predictions[row], test.targets[row]
        share = f"{names[guess]} ({test.probabilities[row, guess]:.0%})"
        return share if guess == truth else f"{share}, is {names[truth]}"

    run.figure("learning_curves", plotting.learning_curves(history))
    run.figure("confusion_matrix", plotting.confusion_matrix(test, names))
    run.figure("filters", plotting.filters(inspection.first_filters(model)))
    one = np.array([0])
    stages = inspection.stage_activations(model, data.test.take(one))
    run.figure("activations", plotting.activations(pictures(one)[0], stages))
    # One image of each of the first classes, so that the maps can be compared.
    shown = np.array([np.flatnonzero(test.targets == c)[0] for c in np.unique(test.targets)[:8]])
    maps = inspection.grad_cam(model, data.test.take(shown))
    run.figure("grad_cam", plotting.grad_cam(pictures(shown), maps, [said(r) for r in shown]))
    worst = most_wrong(test)
    images = pictures(worst) if len(worst) else np.zeros((0, data.image_size, data.image_size, 3))
    wrong = int((test.predictions != test.targets).sum())
    heading = f"Most confidently wrong: {len(worst)} of {wrong} mistakes"
    run.figure("most_wrong", plotting.image_grid(images, [said(r) for r in worst], heading))
