"""Fitness on growing, paired subsets of the items, with early ends for hopeless candidates."""
