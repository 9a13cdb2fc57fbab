"""What is measured on unlabelled samples, in memory that does not grow with their number."""
