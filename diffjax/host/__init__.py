"""Operating-system services of a run: files, locks, signals, processes, storage, watchdog."""
