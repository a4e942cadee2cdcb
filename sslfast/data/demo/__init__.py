"""Demo cohorts, made from real anatomy at their first use, for trying the program without data."""
