"""Fusion patterns, one fusion per file: what it matches, its constraints, its examples."""
