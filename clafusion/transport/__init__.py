"""Which neurons of one network correspond to which of another: optimal transport."""
