"""Evaluators that run code of the user."""
