"""Models whose tokenizers differ: which tokens the output has, and which row of which model each of them is."""
