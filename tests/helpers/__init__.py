"""What tests share: inputs, comparisons, processes. No test is in here, and no fixture."""
