"""The models, one file per paper. Each has Config, SIZES, build and, if weights were published, their names."""
