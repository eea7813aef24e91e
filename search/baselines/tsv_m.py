"""TSV-M of all sources (Gargiulo 2025, https://arxiv.org/abs/2412.00081): the paper's lambda 1, and others."""

from __future__ import annotations

from search.scale_sweep import ScaleSweep

PLUGIN = ScaleSweep("tsv_m", scales=(0.5, 0.75, 1.0, 1.25, 1.5))
