"""How good the samples are: features, distances, recognition, and the report."""
