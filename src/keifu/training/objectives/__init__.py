"""Objectives: functions that compute the summed loss of a model on a batch."""
