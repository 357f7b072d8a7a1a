"""Notations for the arguments of a call that are not JSON."""
