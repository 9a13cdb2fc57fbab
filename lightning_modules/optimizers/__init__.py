"""Optimizers and schedules of the learning rate: described as plain data, checked, built."""
