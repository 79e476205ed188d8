"""Optimizers and their learning rates: from a gradient to an update of the parameters."""
