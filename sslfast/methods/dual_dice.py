"""`dual-dice`: `dual-networks` with Dice between the two networks; our own."""

from __future__ import annotations

from sslfast.methods.dual_networks import DualNetworks
from sslfast.options import MethodOptions


class DualDice(DualNetworks):
    """`dual-networks` teaches where a network is sure and draws both together everywhere, every voxel alike: a small structure, unsure
    and outnumbered, has no say in either. Here 1 - Dice(p_a, p_b) of each foreground class over all voxels is added: a structure
    counts as much as any other whatever its size, and no class is decided for either network. Where both agree that a class is
    there, it raises both: the less the networks overlap as a whole, the more.
    """

    def __init__(self, num_classes: int, steps: int, seed: int, options: MethodOptions) -> None:
        super().__init__(num_classes, steps, seed, options)
        self.dice_weight = options.pseudo_dice_weight
