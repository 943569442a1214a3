"""What the lessons share. Each module is imported where it is needed; none works at import.

errors, config, cli      from flags to a frozen config, from an outcome to an exit code
records, progress        what a run is, as plain data; how it is shown while it lasts
runtime                  device, precision, seeds, processes, signals

sources, data            where images come from; the same batches in the same order, always
augmentation             whole batches, each image by its own draw
training, checkpoint     the loop, and what it can be resumed from
evaluation, profiling    how good a model is, and what it costs
inspection, plotting     looks inside a model; figures from records and arrays
pretrained, bundle       official weights, and the course's own
runs, report             a run's folder, its results and its page
experiments              what the lessons' experiments share

comparison, transfer     what lessons 7 and 8 stand on
lessons                  finds a lesson by its number or a model's name
starter, grade, sandbox, exercises    assignments that are made from lessons and mark themselves
"""

from common.engine import signals

if signals.in_script():  # from here on, while torch is imported too, Ctrl-C ends in one line
    signals.catch()
