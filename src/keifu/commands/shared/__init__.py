"""What several verbs share: options, inputs, tables, errors."""
