"""Objectives: from a model and a batch to sums of losses."""
