"""Metrics with mergeable state; every value stands beside its protocol."""
