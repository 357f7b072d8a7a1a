"""Transcription of sound."""
