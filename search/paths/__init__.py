"""Data-flow space: which layers of which models run, in which order, with which scale."""
