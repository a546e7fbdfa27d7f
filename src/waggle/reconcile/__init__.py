"""Desired minus actual, written to the kernel."""
