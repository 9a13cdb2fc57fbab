"""Networks in files: safetensors, graphs as JSON, other people's checkpoints."""
