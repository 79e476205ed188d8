"""Tuning of published pipelines on captioned pictures: the config of a folder, and its data."""
