"""Evaluation of samples: feature extractors, distances, and metrics with their provenance."""
