"""Cohorts that are made on the spot from real anatomy, to try the program without data."""
