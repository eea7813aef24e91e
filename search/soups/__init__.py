"""Soups whose weights are learned by gradient."""
