"""Plots of decision boundaries."""
