"""Running a target with and without a draft, and judging the two texts."""
