"""What happens to data: paths, targets, weights, times, and the cases solved in closed form."""
