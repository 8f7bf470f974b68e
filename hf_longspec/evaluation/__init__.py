"""Evaluation: a target runs with and without a draft, and the two texts are compared."""
