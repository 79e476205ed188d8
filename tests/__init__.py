"""The tests: a folder for each room of the library, and those of several."""
