"""The Inception network of FID."""
