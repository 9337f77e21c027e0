import mmap
import os

import numpy as np
import pytest

from evac_jax.bridge import slots as slots_module
from evac_jax.bridge.slots import CudaSlots, SharedSlots, SlotLayout
from evac_jax.bridge.types import EnvSpec
from evac_jax.errors import ConfigError
from policies.spec import ActionSpec

ENV = EnvSpec(3, (2, 5, 7, 3), 7, ActionSpec(7, 4), ("push",), 1, 8, clip_envs=2)


@pytest.fixture
def memory():
    fd = os.memfd_create("test")
    yield fd
    os.close(fd)


def test_slots_are_apart_and_page_aligned_when_sizes_are_odd(memory):
    slots = SharedSlots(memory, SlotLayout.of(ENV), 3, create=True)
    spans = []
    for slot in range(3):
        frames, clip = slots.frames(slot), slots.clip(slot)
        assert frames.shape == (3, 2, 5, 7, 3)
        assert clip.shape == (2, 4, 2, 5, 7, 3)
        spans += [(a.ctypes.data, a.nbytes) for a in (frames, clip)]
    assert all(start % mmap.PAGESIZE == 0 for start, _ in spans)
    assert all(a + size <= b for (a, size), (b, _) in zip(spans, spans[1:], strict=False))


def test_both_sides_see_the_same_memory_when_mapped_twice(memory):
    layout = SlotLayout.of(ENV)
    trainer = SharedSlots(memory, layout, 2, create=True)
    worker = SharedSlots(memory, layout, 2)
    frames, clip = worker.tensors(1)
    frames.fill_(9)
    clip.fill_(8)
    worker.publish(1, 5)
    assert (trainer.frames(1) == 9).all()
    assert (trainer.clip(1) == 8).all()
    assert (trainer.frames(0) == 0).all()
    assert [trainer.sequence(slot) for slot in range(2)] == [0, 5]
    worker.begin(1)
    assert trainer.sequence(1) == 0


def test_clip_is_empty_when_no_environment_is_filmed(memory):
    layout = SlotLayout((2, 1, 4, 4, 3), (0, 4, 1, 4, 4, 3))
    slots = SharedSlots(memory, layout, 2, create=True)
    assert slots.clip(0).shape == (0, 4, 1, 4, 4, 3)
    assert layout.payload_bytes == mmap.PAGESIZE


def test_views_stay_readable_when_slots_and_file_are_gone(memory):
    fd = os.dup(memory)
    slots = SharedSlots(fd, SlotLayout.of(ENV), 2, create=True)
    view = slots.frames(0)
    view[:] = 3
    del slots
    os.close(fd)
    assert (view == 3).all()


def test_slots_explain_when_memory_does_not_suffice(memory, monkeypatch):
    monkeypatch.setattr(slots_module, "available_bytes", lambda: 2**13)
    with pytest.raises(ConfigError, match="0 MiB of free memory for 2 slots.*simulator.slots"):
        SharedSlots(memory, SlotLayout.of(ENV), 2, create=True)
    assert os.fstat(memory).st_size == 0


@pytest.mark.gpu
def test_cuda_slots_share_memory_when_opened_from_handles(memory):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    import multiprocessing

    layout = SlotLayout.of(ENV)
    slots = CudaSlots(memory, layout, 2, device="cuda:0")
    context = multiprocessing.get_context("spawn")
    os.set_inheritable(memory, True)
    path = f"/proc/{os.getpid()}/fd/{memory}"
    child = context.Process(target=_fill_cuda, args=(path, layout, slots.handles()))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    assert slots.sequence(1) == 4
    assert (slots.tensors(1)[0] == 77).all()
    np.testing.assert_array_equal(slots.clip(1), np.full(layout.clip_shape, 78, np.uint8))


def _fill_cuda(path, layout, handles):
    fd = os.open(path, os.O_RDWR)
    slots = CudaSlots(fd, layout, 2, device="cuda:0", handles=handles)
    frames, clip = slots.tensors(1)
    frames.fill_(77)
    clip.fill_(78)
    slots.finish()
    slots.publish(1, 4)


@pytest.mark.gpu
def test_cuda_slots_are_refused_when_expandable_segments_are_on(memory, monkeypatch):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with pytest.raises(ConfigError, match="expandable_segments"):
        CudaSlots(memory, SlotLayout.of(ENV), 2, device="cuda:0")
