"""The trainer: settings, loop, checkpoints, log and plots of a run. Only the commands import it."""
