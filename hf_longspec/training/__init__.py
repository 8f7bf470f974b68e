"""Training of LongSpec drafts: a draft learns its target's next-token distribution from token ids alone."""
