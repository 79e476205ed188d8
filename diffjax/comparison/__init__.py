"""Runs side by side: arms, statistics of verdicts, provenance, results."""
