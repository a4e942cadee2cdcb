"""`DualContrastiveLoss` in other training frameworks: short, complete programs that the tests run."""
