"""Folders of image files: what is in them, and the data sets that they make."""
