"""What is known of objectives and solvers without samples: weights, legality, convergence."""
