"""Which layers of one network correspond to which of another: cross-layer alignment."""
