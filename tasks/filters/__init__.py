"""Filters of token probabilities: normalised log-probabilities (…, V) in, logits (…, V) out, -inf where removed."""
