"""What a compiled program does, read from its HLO."""
