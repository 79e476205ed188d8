"""Studies of objectives and solvers without samples: weights, legality, convergence, losses."""
