"""The noising process: paths, targets, preconditioning, loss weights and training times."""
