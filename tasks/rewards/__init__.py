"""Rewards: one number per sample, larger is better."""
