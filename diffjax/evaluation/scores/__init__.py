"""What is computed of a set of samples: distances, shares and scores, one idea a file."""
