"""Ensembles: several training runs that one compiled program trains together."""
