"""What nobody has to open to understand a lesson: machine, processes, files, signals."""
