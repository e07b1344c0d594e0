"""Bytes saved for backward, and peaks, on computations that can be counted by hand."""

import torch
from torch import nn

from attnres.bench.memory import peak_bytes, saved_bytes

CPU = torch.device("cpu")
KIB = 256  # float32 numbers in 1024 bytes


def test_a_storage_that_is_saved_several_times_counts_once():
    leaf = torch.ones(KIB, requires_grad=True)

    def forward():
        value = leaf * 2  # saves nothing: the other factor is a number
        return (value * value + value.view(16, 16).flatten() * value[:]).sum()

    assert saved_bytes(forward, []) == 1024


def test_a_view_counts_with_its_whole_storage():
    base = torch.ones(4 * KIB)
    weight = torch.ones(KIB, requires_grad=True)
    assert saved_bytes(lambda: weight * base[:KIB], [weight]) == 4 * 1024


def test_parameters_are_excluded_and_so_are_views_of_them():
    layer = nn.Linear(16, 16, bias=False)
    inputs = torch.ones(16, 16, requires_grad=True)
    assert saved_bytes(lambda: layer(inputs), layer.parameters()) == 1024  # the inputs; the transposed weight is a view
    assert saved_bytes(lambda: layer(inputs), []) == 2 * 1024


def test_what_is_freed_on_the_way_cannot_lend_its_address_to_another():
    leaf = torch.ones(KIB, requires_grad=True)

    def forward():
        for _ in range(4):
            torch.sigmoid(leaf).sum()  # its graph is dropped at once
        return torch.sigmoid(leaf).sum()

    assert saved_bytes(forward, []) == 5 * 1024


def test_nothing_is_saved_without_gradients():
    with torch.no_grad():
        assert saved_bytes(lambda: torch.ones(KIB) ** 2, []) == 0


def test_peak_is_the_most_at_a_time_and_not_the_sum():
    def run():
        for _ in range(3):
            torch.empty(KIB)
        first, second = torch.empty(KIB), torch.empty(KIB)
        del first, second

    assert peak_bytes(run, CPU) == 2 * 1024


def test_peak_does_not_count_what_there_was_before_nor_what_earlier_runs_left():
    kept = [torch.empty(64 * KIB)]
    assert peak_bytes(lambda: kept.append(torch.empty(KIB)), CPU) == 1024
    assert peak_bytes(lambda: kept.append(torch.empty(KIB)), CPU) == 1024


def test_peak_of_a_run_that_allocates_nothing_is_zero():
    assert peak_bytes(lambda: None, CPU) == 0
