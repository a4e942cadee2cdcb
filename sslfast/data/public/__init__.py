"""Public datasets: their published splits, and readers of the forms in which they are handed out."""
