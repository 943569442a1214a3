"""What the lessons share, in floors: imports go down only.

What a lesson's reader opens, one file after the other:

config, cli                  from flags to a frozen config, from an outcome to an exit code
data, augmentation           batches of images, in the same order always
training, schedule           the loop, the optimizer, the learning rate
evaluation, profiling        how good a model is, and what it costs
inspection, plotting         looks inside a model; figures from records and arrays
pretrained, runs             trained weights; a run's folder, its results and its page
experiments                  arms, seeds and claims
lessons, find_lr, live       finds a lesson or a model; a rate; cells that act in a notebook
limits                       what a machine can't do is refused before it starts
classifier, optimizers       what every network has; Muon
resnet9, branches, costs, integers      what single lessons stand on

Doors for `python -m`: starter, grade, bundle, notebook, slides, index, kit.

What nobody has to open to understand a lesson:

comparison/, transfer/       what lessons 7 and 8 stand on
grading/                     what marks exercises
engine/                      machine, processes, files, signals, checkpoints, worker pool
"""

import sys

try:
    from common.engine import signals
except KeyboardInterrupt:
    sys.stderr.write("stopped before anything was saved: there is nothing to resume\n")
    raise SystemExit(130) from None

if signals.in_script():  # from here on, while torch is imported too, Ctrl-C ends in one line
    signals.catch()
