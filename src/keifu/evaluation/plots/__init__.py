"""Plots for people: attention maps, decision boundaries, HTML pages."""
