"""Networks whose features distances between image sets are measured on."""
