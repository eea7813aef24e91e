"""Several objectives at once: dominance, fronts, hypervolume, and how one point of a front is chosen."""
