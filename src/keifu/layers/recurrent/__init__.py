"""Recurrent networks, and the decoder with additive attention."""
