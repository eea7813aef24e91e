"""Merge operators. The name of a file here is the registered name of the operator in it."""
