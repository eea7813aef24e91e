"""Hugging Face checkpoints: read without copies, checked, hashed and written whole or not at all."""
