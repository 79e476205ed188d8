"""Training of autoencoders on images: reconstruction, KL divergence, perceptual and adversarial."""
