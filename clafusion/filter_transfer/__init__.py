"""Puts the filters of one network into the architecture of another."""
