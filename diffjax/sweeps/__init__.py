"""A sweep: axes, cells, workers, engines and the live table."""
