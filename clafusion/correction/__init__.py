"""Gives back what averaging takes from the features: rescale, repair, refit."""
