"""Weights of the classes in the cross-entropy, so that rare and difficult structures are learned early.

After DHC (arXiv 2307.11960): one network weights by frequency, the other by difficulty, so that they err differently.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sslfast.ops.class_gate import DICE, VOXELS


def class_weights(running: Tensor) -> Tensor:
    """The weights [2, C] of networks a and b, from the running averages [4, C] of `sslfast.ops.class_gate`.

    Network a: log(1 + n / n_c), where n_c is the number of labelled voxels of class c so far and n the largest of them.
    Network b: (1 - Dice_c)^1/2, with the running Dice; the background has the mean over the foreground classes. Before
    the first step all weights are alike.
    """
    voxels = running[VOXELS].clamp_min(1)
    rare = (1 + voxels.max() / voxels).log()
    difficult = (1 - running[DICE].clamp(0, 1)).sqrt()
    difficult = torch.cat((difficult[1:].mean(0, keepdim=True), difficult[1:]))
    return torch.stack((rare, difficult))
