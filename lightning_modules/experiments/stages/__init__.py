"""The kinds of stages."""
