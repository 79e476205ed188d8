"""Objectives of networks that sample in one to a few steps, trained from nothing."""
