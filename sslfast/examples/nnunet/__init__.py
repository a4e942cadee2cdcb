"""A folder of its own, because nnU-Net imports every file of the folder in which it looks for a trainer."""
