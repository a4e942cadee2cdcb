"""Public datasets: readers of their published formats, and their published splits."""
