"""Building blocks used by two backbones or more."""
