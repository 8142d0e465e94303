"""Metrics: rows folded into a few numbers, by summaries that merge.

``needs()`` names the scorer columns; ``reference(model, score)`` makes what the rows are compared with (None for most);
``check(model, num_samples)`` refuses what cannot be measured; ``better`` says which way is up for every value.
"""
