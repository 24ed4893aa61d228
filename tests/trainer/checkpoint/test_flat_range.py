"""A range of a flattened tensor as boxes."""

from __future__ import annotations

import itertools

import pytest
import torch

from collab_megatron.trainer.checkpoint.flat_range import boxes_of_range


@pytest.mark.parametrize("shape", [(7,), (4, 5), (1, 6), (5, 1), (3, 2, 4), (2, 3, 2, 2), ()])
def test_boxes_are_contiguous_few_and_make_up_the_stretch(shape: tuple[int, ...]) -> None:
    numbered = torch.arange(torch.Size(shape).numel()).view(shape)
    total = numbered.numel()
    for start, end in itertools.combinations(range(total + 1), 2):
        found = []
        for box in boxes_of_range(shape, start, end):
            inside = numbered[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))].flatten()
            assert inside.numel() == box.numel
            assert inside.tolist() == list(range(box.start, box.start + box.numel))
            found += inside.tolist()
        assert found == list(range(start, end))
        assert len(list(boxes_of_range(shape, start, end))) <= max(1, 2 * len(shape) - 1)


def test_nothing_is_no_box() -> None:
    assert list(boxes_of_range((4, 5), 3, 3)) == []
    assert list(boxes_of_range((4, 5), 5, 3)) == []
