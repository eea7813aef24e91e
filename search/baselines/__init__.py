"""Generation 0: parents and standard merges. The name of a file here is the registered name."""
