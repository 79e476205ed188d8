"""What a run will need on machines that are not there: memory, arithmetic, traffic and time."""
