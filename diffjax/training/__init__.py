"""The training loop and its parts: state, step, checkpoints, logging."""
