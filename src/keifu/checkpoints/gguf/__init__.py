"""GGUF files of llama.cpp: reading, writing, and the fields of each architecture."""
