"""What decoding costs: one layer's attention, the steps of a round, whole texts."""
