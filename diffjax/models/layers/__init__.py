"""What the networks are made of: layers, attention, normalisations, and where they are placed."""
