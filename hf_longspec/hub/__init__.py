"""Drafts on the Hub: their cards, their folders, and the published drafts of the paper's authors."""
