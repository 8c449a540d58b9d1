"""Pages of a checkpoint that a packed weight replaces leave memory, and nothing is lost."""

import torch

from sparse_rt.benchmarking.processes import status_bytes
from sparse_rt.benchmarking.weights import held_bytes
from sparse_rt.kernels import packed
from sparse_rt.kernels.native import pages
from sparse_rt.nn import SparseLinear

NBYTES = 32 << 20


def mapped(path, nbytes=NBYTES):
    """int16 in a mapped file, all of it read once, with the sum of its elements."""
    path.write_bytes(bytes(range(256)) * (nbytes // 256))
    tensor = torch.from_file(str(path), shared=False, size=nbytes // 2, dtype=torch.int16)
    return tensor, tensor.sum()


def test_pages_of_a_file_leave_memory_and_come_back(tmp_path):
    tensor, total = mapped(tmp_path / "weights")
    tensor[5] += 1  # a page of this process alone, which no file has
    before = status_bytes("RssFile")
    pages.page_out(tensor[3:-3])
    assert before - status_bytes("RssFile") > NBYTES // 2
    assert tensor.sum() == total + 1


def test_other_memory_stays_as_it_is(tmp_path):
    tensor = torch.ones(NBYTES // 4)
    before = status_bytes("VmRSS")
    pages.page_out(tensor)
    pages.page_out(torch.ones(3))
    pages.page_out(torch.empty(0))
    assert status_bytes("VmRSS") > before - NBYTES // 2 and torch.equal(tensor, torch.ones(NBYTES // 4))


def test_a_large_tensor_keeps_no_pages_of_what_was_freed_before():
    """As when a model is loaded: all weights as they are stored, then one after the other gives way to its layout."""
    cpu, count, nbytes = torch.device("cpu"), 24, 4 << 20
    before = held_bytes(cpu)
    for _ in range(2):  # malloc takes sizes that it has freed once from its heap the next time
        stored = None
        stored = [torch.ones(nbytes + nbytes // 2, dtype=torch.uint8) for _ in range(count)]
    made = []
    while stored:
        stored.pop()
        made.append(pages.empty(nbytes).fill_(1))
    assert all(tensor.data_ptr() % pages.HUGE_PAGE == 0 for tensor in made)
    assert held_bytes(cpu) - before < 1.1 * count * nbytes


def test_the_pages_of_a_large_tensor_go_with_it():
    before = status_bytes("RssAnon")
    tensor = pages.empty(NBYTES).fill_(1)
    assert status_bytes("RssAnon") - before > 0.9 * NBYTES
    del tensor
    assert status_bytes("RssAnon") - before < 0.1 * NBYTES


def test_a_packed_layer_gives_its_part_of_the_file_back(tmp_path):
    """The whole file stays mapped: another tensor of it lives on, as the embedding of a model does."""
    m, n = 2048, 4096
    tensor, _ = mapped(tmp_path / "weights", m * n * 2)
    values = tensor[: m * n // 2].view(torch.bfloat16).view(m, n // 2)
    metadata = torch.full((m, n // 8), 0b01000100, dtype=torch.uint8)
    before = status_bytes("RssFile")
    layer = SparseLinear(n, m, "2:4", values, metadata, None).eval()
    layer.pack()
    del values
    assert before - status_bytes("RssFile") > 0.4 * m * n * 2
    assert torch.equal(layer.values.view(torch.int16).flatten(), tensor[: m * n // 2])
    assert layer.is_packed is False and packed.refusal("2:4", m, n, torch.bfloat16) is None
