"""Training data from files to tensors: the catalogue, tokenizers, texts, pairs, conversations, tables, pictures,
batches."""
