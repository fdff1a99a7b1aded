"""Pixels <-> what the backbone models."""
