"""Comparison of runs: arms, statistics of verdicts, provenance, results."""
