"""The models, one file a paper: each offers Config, SIZES, build and, where weights were published, their names."""
