"""Readers, cohorts, samplers and augmentation. Nothing here knows a loss."""
