"""`as-released`: what the code published with arXiv 2311.12617 computes, for comparison only.

Its unlabelled losses stand on detached probabilities, so unlabelled volumes give no gradient; they act through the
statistics of BatchNorm.
"""

from __future__ import annotations

from sslfast.losses import DualContrastiveLoss
from sslfast.methods.method import Method
from sslfast.methods.ssl_contrastive import SSLContrastive
from sslfast.options import MethodOptions


class AsReleased(SSLContrastive):
    """The preset `as-released` of `DualContrastiveLoss`; the options of the run do not reach it."""

    views = False

    def __init__(self, num_classes: int, steps: int, seed: int, options: MethodOptions) -> None:
        Method.__init__(self, num_classes, steps, seed, options)
        self.criterion = DualContrastiveLoss(num_classes, preset="as-released", ramp_steps=steps, seed=seed)
