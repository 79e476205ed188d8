"""The machine below a run: files, locks, signals, processes, storage."""
