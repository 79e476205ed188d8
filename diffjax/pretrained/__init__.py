"""Published weights: files are downloaded, verified by hash, and read without executing code."""
