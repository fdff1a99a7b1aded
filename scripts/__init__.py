"""Operational one-offs, each runnable by itself."""
