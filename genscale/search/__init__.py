"""Test-time scaling: spend more computation on a sample to raise its reward, with any sampler."""
