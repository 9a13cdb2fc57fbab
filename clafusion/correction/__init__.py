"""Corrections of the features that averaging has shrunken: rescale, repair, refit."""
