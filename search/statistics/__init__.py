"""Statistics of a model, collected from a few items: see `search.merge.statistics` for what they are."""
