"""Sweeps: axes, cells, workers, engines and the live status table."""
