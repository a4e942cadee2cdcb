"""The buffers of gradients: memory that is used again once nobody else uses it."""

from __future__ import annotations

import torch

from sslfast.ops.buffers import empty_like, keep_freed_memory, reuse_blocks, zeros_like


def test_memory_is_used_again_once_no_tensor_shows_it() -> None:
    reuse_blocks(6)  # a run in this process may have turned it off
    like = torch.empty(2, 3, 50, 50, 50)
    first, second = empty_like(like), zeros_like(like)
    pointers = first.data_ptr(), second.data_ptr()
    assert len(set(pointers)) == 2
    part = first[1:]
    del first
    third = empty_like(like)
    assert third.data_ptr() not in pointers  # a view still shows the first
    del part
    assert empty_like(like).data_ptr() == pointers[0]
    second.fill_(7)
    del second
    assert not zeros_like(like).any()


def test_a_process_that_keeps_freed_memory_needs_no_blocks() -> None:
    keep_freed_memory()
    try:
        like = torch.empty(2, 3, 50, 50, 50)
        buffer = empty_like(like)
        assert buffer.untyped_storage().resizable()  # torch's own, not a block's
    finally:
        reuse_blocks(6)


def test_a_buffer_has_the_layout_and_the_dtype_of_what_it_is_like() -> None:
    like = torch.empty(2, 3, 5, 5, 5, dtype=torch.float16).to(memory_format=torch.channels_last_3d)
    buffer = empty_like(like)
    assert buffer.is_contiguous(memory_format=torch.channels_last_3d)
    assert buffer.dtype == torch.float16
