"""The demo: a real small model built from package-registry files, and a long prompt of real source code."""
