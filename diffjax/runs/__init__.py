"""A trained run: its folder, checkpoints, samples, recipes and measurements."""
