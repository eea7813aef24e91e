"""Hidden states that candidates share: those that leave the first layers, where these are the same."""
