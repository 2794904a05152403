"""Merging, combining, extracting and converting adapters, and the comparison of weights."""
