"""Catalogue of data sets and weights with pinned versions: listing, downloading, reading."""
