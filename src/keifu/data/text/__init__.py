"""Text: documents, token shards, packed rows, mixtures, and corruption for masking and denoising objectives."""
