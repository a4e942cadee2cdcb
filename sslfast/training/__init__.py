"""The trainer: settings, loop, checkpoints, log and plots of a run. Nothing else in the package imports it but the commands."""
