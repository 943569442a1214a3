"""What lesson 7 stands on.

entries      flags; which models take part, in which form and width, and what each costs
sweeps       their times, taken so that the order holds
training     their accuracies, from arms of the harness
imagenet     the published accuracies, and what reproduces them
results      all of it as plain records: Pareto front, constraints, tables
page, conclusion             what is shown and said of them
"""
