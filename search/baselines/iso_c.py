"""Iso-C of all sources (Marczak 2025, https://arxiv.org/abs/2502.04959), whose lambda the paper tunes."""

from __future__ import annotations

from search.scale_sweep import ScaleSweep

PLUGIN = ScaleSweep("iso_c", scales=(0.5, 0.75, 1.0, 1.5, 2.0))
