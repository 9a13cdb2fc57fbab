"""Equal depth: the shallow network grows by identities, or the deep one shrinks by merging."""
