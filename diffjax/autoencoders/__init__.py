"""Training of autoencoders on images, and encoding data sets as latents."""
