"""Trackers by name; see `search.tracker`."""
