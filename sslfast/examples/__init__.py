"""`DualContrastiveLoss` in other people's training code: complete, short, and run by the tests."""
