"""One page that explains a trained model to a reader who knows no mathematics."""
