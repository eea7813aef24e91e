"""What a candidate would score on all items, from what it scored on some."""
