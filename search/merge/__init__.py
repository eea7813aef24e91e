"""Merging: source tensors in, the candidate's tensors out, one file per operator."""
