"""Labelled examples: tables, input transformations, and batches."""
