"""Training: state, step, optimizer, loop, checkpoints, metrics. Knows no data set and no model by name."""
