"""What lesson 7 stands on.

entries      which models take part, and in which form
counting, matching           what a model costs; widths at which all cost the same
sweeps       their times, taken so that the order holds
setup        its flags, before it starts
training     their accuracies, from arms of the harness
imagenet     the published accuracies, and what reproduces them
results      all of it as plain records: Pareto front, constraints, tables
figures, page, conclusion    what is shown and said of them
"""
