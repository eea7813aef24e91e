"""The `meiosis` command: thin commands over the public functions."""
