"""Token ownership and valid labels, on examples small enough to read."""

import torch
from span_kernels.segments import owners, valid_labels


def test_owners_of_windows_in_any_order_with_gaps_and_empty_windows():
    segments_B2 = torch.tensor([(5, 2), (1, 3), (5, 0), (9, 1), (0, 0)])
    nobody = 5
    assert owners(segments_B2, 11).tolist() == [
        nobody, 1, 1, 1, nobody, 0, 0, nobody, nobody, 3, nobody,
    ]  # fmt: skip


def test_owners_of_an_empty_batch_and_of_no_tokens():
    assert owners(torch.zeros(0, 2, dtype=torch.int32), 3).tolist() == [0, 0, 0]
    assert owners(torch.zeros(2, 2, dtype=torch.int32), 0).tolist() == []


def test_labels_are_valid_inside_their_own_window_only():
    segments_B2 = torch.tensor([(0, 3), (3, 0)])
    labels_B2, valid_B2 = valid_labels(
        segments_B2, torch.tensor([2, 0]), torch.tensor([3, -1], dtype=torch.int32)
    )
    assert labels_B2.tolist() == [[2, 3], [0, -1]]
    assert valid_B2.tolist() == [[True, False], [False, False]]
