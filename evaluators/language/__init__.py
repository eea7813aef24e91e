"""Evaluators for language models."""
