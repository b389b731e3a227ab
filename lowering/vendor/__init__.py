"""Kernels of vendor libraries."""
