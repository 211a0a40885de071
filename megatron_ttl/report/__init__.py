"""Figures and tables, from the files that runs and evaluations leave."""
