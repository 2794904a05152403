"""Data sets: sources, readers, formats, encoding, selection and cache."""
