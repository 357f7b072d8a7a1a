"""The page in a browser: the engine, which computes the lineage there, and the elements of the documentation."""
