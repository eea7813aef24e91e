"""Evaluators of models that see images."""
