"""Holds only the trainer: nnU-Net imports every file of the folder in which it looks for one."""
