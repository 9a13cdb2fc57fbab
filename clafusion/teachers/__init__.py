"""What several classifiers say together, and which of them to trust."""
