"""The training loop: steps, records, metrics, rollback."""
