"""Executables: they parse flags, report errors in one line, and call the library."""
