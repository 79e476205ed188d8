"""How probable data are under a model: by the probability-flow ODE, and by variational bounds."""
