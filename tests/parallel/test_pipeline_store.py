"""The store of a rank: values until their last reader, gradients until the stage that stored them."""

import gc

import pytest
import torch

from attnres.parallel.store import BlockStore


@pytest.fixture
def store():
    return BlockStore()


def source_of(scale=2.0):
    leaf = torch.arange(6.0).view(1, 2, 3).requires_grad_()
    return leaf, leaf * scale


def test_a_source_gets_the_gradients_of_all_later_readers_and_its_own(store):
    leaf, source = source_of()
    store.publish(0, 5, source, readers=2)
    readers = [store.fetch(0, 5) for _ in range(2)]
    for factor, reader in zip((10.0, 100.0), reversed(readers), strict=True):  # the last reader runs backward first
        assert reader.is_leaf and torch.equal(reader, source)
        (reader * factor).sum().backward()
        assert reader.grad is None
    assert store.waiting_gradients == 1
    (source * 3 + source * 4).sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(leaf, 2 * (10 + 100 + 3 + 4)))
    assert store.waiting_gradients == 0


def test_a_value_is_forgotten_with_its_last_reader(store):
    _, source = source_of()
    store.publish(0, 1, source, readers=2)
    store.fetch(0, 1)
    assert len(store) == 1
    store.fetch(0, 1)
    assert len(store) == 0 and store.peak_stored == 1
    with pytest.raises(KeyError):
        store.fetch(0, 1)


def test_micro_batches_do_not_mix(store):
    leaves = []
    for micro_batch, scale in enumerate((1.0, 5.0)):
        leaf, source = source_of(scale)
        store.publish(micro_batch, 0, source, readers=1)
        leaves.append((leaf, source))
    for micro_batch in (1, 0):
        fetched = store.fetch(micro_batch, 0)
        assert torch.equal(fetched, leaves[micro_batch][1])
        (fetched * (micro_batch + 1)).sum().backward()
    for micro_batch, scale in enumerate((1.0, 5.0)):
        leaf, source = leaves[micro_batch]
        source.sum().backward()
        assert torch.equal(leaf.grad, torch.full_like(leaf, scale * (micro_batch + 2)))


def test_a_received_source_passes_the_later_gradients_on_even_when_it_is_only_forwarded(store):
    received = torch.ones(1, 2, 3, requires_grad=True)
    store.publish(0, 0, received, readers=1)
    store.fetch(0, 0).mul(7).sum().backward()
    torch.autograd.backward([received], [torch.full_like(received, 4.0)])
    assert torch.equal(received.grad, torch.full_like(received, 11.0))


def test_without_gradients_values_alone_are_kept(store):
    with torch.no_grad():
        store.publish(0, 0, torch.ones(1, 1, 2), readers=1)
        assert not store.fetch(0, 0).requires_grad
    assert len(store) == store.waiting_gradients == 0


def test_a_source_is_alive_as_long_as_anybody_uses_its_memory(store):
    _, source = source_of()
    store.watch(source)
    result = (source * source).sum()  # autograd keeps the source
    del source
    gc.collect()
    assert store.alive == 1
    result.backward()
    assert store.alive == 0 and store.peak_alive == 1
