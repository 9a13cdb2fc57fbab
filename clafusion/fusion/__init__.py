"""`fuse`, the averaging of moved parents, and the checks of every result."""
