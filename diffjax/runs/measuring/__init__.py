"""Measurements of a run: evaluations and evaluators, likelihoods, probes, and their results."""
