"""Likelihoods of data under a model: by the probability-flow ODE and by variational bounds."""
