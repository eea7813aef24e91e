"""DARE with TIES of all sources (Yu 2024, https://arxiv.org/abs/2311.03099): density first.

The masks are drawn from the seed of the run.
"""

from __future__ import annotations

from search.ties_sweep import TiesSweep

PLUGIN = TiesSweep("dare_ties", densities=(0.1, 0.3, 0.5))
