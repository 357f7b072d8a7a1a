"""Files in, tensors out: the catalogue, tokenizers, texts, pairs, conversations, tables and pictures, in batches."""
