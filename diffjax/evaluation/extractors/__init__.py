"""Feature extractors: the networks on whose features image sets are compared."""
