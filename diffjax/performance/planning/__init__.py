"""Plans a run for hardware that is not attached: memory, FLOPs, traffic and time."""
