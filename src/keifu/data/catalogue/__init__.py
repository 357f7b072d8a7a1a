"""The catalogue of pinned data sets and weights: what there is, and how it is fetched and read."""
