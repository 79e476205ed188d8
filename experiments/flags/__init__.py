"""Flags that executables share, and what they open."""
