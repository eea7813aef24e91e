"""Where a search runs: the Ray pool, its workers and the shards they share. The only room that knows Ray."""
