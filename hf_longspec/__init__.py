"""Lossless LongSpec decoding inside `model.generate`."""
