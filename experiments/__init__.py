"""The executables: flags, one-line errors, and a call into the library."""
