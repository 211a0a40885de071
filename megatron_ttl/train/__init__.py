"""Pretraining: one step, many steps, and what is said and kept along the way."""
