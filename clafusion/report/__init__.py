"""Reports of fusions and experiments: one HTML file each."""
