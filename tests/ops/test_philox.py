"""The random generator against its published vectors."""

from __future__ import annotations

import pytest
import torch

from sslfast.ops.philox import philox, voxel_priority


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known-answer vectors of Philox4x32-10 (Salmon et al. 2011, Random123)
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 0xFFFFFFFFFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "digits of pi"],
)
def test_words_are_those_of_the_published_vectors(counter: list[int], key: int, words: list[int]) -> None:
    result = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert [int(word) for word in result] == words


def test_the_index_of_a_voxel_counts_beyond_32_bits() -> None:
    index = torch.tensor([5, 2**32 + 5, 7 * 2**32 + 5])
    priority = voxel_priority(index, seed=3, step=9, stream=4)
    expected = [philox(tuple(torch.tensor(w) for w in (5, high, 9, 4)), 3)[0] for high in (0, 1, 7)]
    assert priority.tolist() == [int(word) for word in expected]
    assert len(set(priority.tolist())) == 3
