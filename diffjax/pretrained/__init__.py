"""Files of published weights: fetched, checked by hash, read without running them."""
