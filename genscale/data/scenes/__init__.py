"""Procedural scenes with captions, and the oracle that reads them back from pixels."""
