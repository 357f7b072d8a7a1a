"""Options, inputs, tables, errors."""
