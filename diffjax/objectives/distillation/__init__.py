"""Objectives that train a network of few steps by a trained one, its teacher."""
