"""Recycling: the weights of an older model initialise another architecture or a larger size."""
