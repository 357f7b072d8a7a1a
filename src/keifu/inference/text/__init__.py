"""Text generation: sampling, beam search, likelihoods, chat, translation."""
