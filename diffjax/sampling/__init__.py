"""The way back from noise to data: grids, solvers, guidance, and the scan that joins them."""
