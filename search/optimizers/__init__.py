"""Optimisers behind ask and tell."""
