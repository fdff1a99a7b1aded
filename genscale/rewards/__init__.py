"""Rewards: how good a picture is for what was asked. Higher is better."""
