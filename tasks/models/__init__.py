"""Models: a plug-in describes one (cheap, JSON); its ``load(device)`` gives the denoiser.

A description also says, without loading anything, ``process``, ``shape``, ``num_classes``, ``kind`` (image, vector or
tokens: what is stored), ``revision`` (hash of the weights) and ``reference()``, the data that samples are judged by.
"""
