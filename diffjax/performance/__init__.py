"""Performance: throughput, time of the training loop, analysis of compiled programs, planning."""
