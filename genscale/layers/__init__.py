"""Building blocks shared by backbones: plain torch modules and functions, no framework."""
