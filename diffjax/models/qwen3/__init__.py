"""Qwen3 (Qwen Team 2025, arXiv:2505.09388), whose states condition Flux.2 Klein."""
