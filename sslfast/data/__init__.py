"""Readers, cohorts, samplers and augmentation, independent of the losses."""
