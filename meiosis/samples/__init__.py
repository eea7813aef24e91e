"""Small, real model families that are trained on the spot from text every installation has."""
