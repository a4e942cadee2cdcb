"""In a separate folder, because nnU-Net imports every file of the folder in which it looks for a trainer."""
