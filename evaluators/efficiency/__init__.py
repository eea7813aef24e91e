"""What a model costs, whatever it is asked."""
