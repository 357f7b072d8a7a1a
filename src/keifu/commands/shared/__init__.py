"""Shared by commands: options, inputs, tables, errors."""
