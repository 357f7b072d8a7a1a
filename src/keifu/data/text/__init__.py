"""Text: documents, token shards, packed rows, mixtures, and corruption for masked and denoising objectives."""
