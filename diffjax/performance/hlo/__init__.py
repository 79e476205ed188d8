"""Analysis of a compiled program's HLO: FLOPs, traffic, buffers and saved activations."""
