"""How a network is read: its graph, and which neurons every axis of every parameter names."""
