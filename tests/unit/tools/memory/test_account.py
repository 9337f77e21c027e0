"""What is read from the text of a compiled program: shapes, loops, products, traffic, overlap."""

import textwrap

import pytest

from evac_jax.errors import DataError
from evac_jax.tools.memory import hlo
from evac_jax.tools.memory.account import account


def _program(entry: str, *others: str, partitions: int = 8) -> str:
    parts = [*others, "ENTRY %main (p0: f32[4,8]) -> f32[4,8] {", entry.strip("\n"), "}"]
    head = f"HloModule jit_update, is_scheduled=true, num_partitions={partitions}\n"
    return head + "\n".join(textwrap.dedent(part).strip("\n") for part in parts) + "\n"


BODY = """
%body (s: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %s = (s32[], bf16[16,8]{1,0}) parameter(0)
  %x = bf16[16,8]{1,0} get-tuple-element(%s), index=1
  %all-gather-start.1 = (bf16[16,8]{1,0}, bf16[128,8]{1,0}) all-gather-start(%x), channel_id=1,\
 replica_groups=[1,8]<=[8], dimensions={0}, use_global_device_ids=true
  %product = bf16[16,16]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %all-gather-done.1 = bf16[128,8]{1,0} all-gather-done(%all-gather-start.1)
  %reduce-scatter.1 = bf16[16,8]{1,0} reduce-scatter(%all-gather-done.1), channel_id=2,\
 replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
  ROOT %out = (s32[], bf16[16,8]{1,0}) tuple(%i, %reduce-scatter.1)
}
"""
CONDITION = """
%condition (s: (s32[], bf16[16,8])) -> pred[] {
  ROOT %go = pred[] custom-call(), custom_call_target="until_done"
}
"""
LOOP = (
    "  %w = (s32[], bf16[16,8]{1,0}) while(%t), condition=%condition, body=%body, "
    'backend_config={"known_trip_count":{"n":"5"}}'
)


def test_shapes_are_read_with_layouts_and_tuples():
    shape = "((bf16[2,3]{1,0:T(8,128)}, f32[]), s8[7]{0}, /*index=2*/token[])"
    assert [a.bytes for a in hlo.arrays_of(shape)] == [12, 4, 7, 0]
    assert hlo.elements(shape)[1:] == ["s8[7]{0}", "token[]"]
    assert hlo.elements("pred[4]{0}") == ["pred[4]{0}"]


def test_loops_count_with_every_pass():
    found = account(_program(LOOP, BODY))
    assert found.flops == 5 * 2 * 16 * 16 * 8
    assert [c.times for c in found.collectives] == [5, 5]


def test_a_chip_receives_what_a_ring_passes_to_it():
    found = account(_program(LOOP, BODY))
    assert found.received("all-gather") == 5 * 128 * 8 * 2 * 7 / 8
    assert found.received("reduce-scatter") == 5 * 16 * 8 * 2 * 3
    assert found.total_received == found.received("all-gather") + found.received("reduce-scatter")


def test_a_collective_is_hidden_where_a_product_stands_between_start_and_done():
    found = account(_program(LOOP, BODY))
    assert found.received("all-gather", hidden=True) == found.received("all-gather")
    assert found.received("reduce-scatter", hidden=True) == 0
    later = BODY.replace("%product =", "%late =").splitlines()
    later.insert(7, later.pop(5))  # the product behind the done
    moved = account(_program(LOOP, "\n".join(later)))
    assert moved.received("all-gather", hidden=True) == 0
    assert moved.flops == found.flops


@pytest.mark.parametrize(
    ("groups", "chips"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("{}", 8),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", 2),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", 4),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", 4),
    ],
)
def test_every_notation_of_groups_tells_how_many_chips_take_part(groups, chips):
    line = f"  %r = f32[64]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%add"
    found = account(_program(line))
    assert found.collectives[0].chips == chips
    assert found.received("all-reduce") == 2 * 256 * (chips - 1) / chips


def test_results_of_a_start_are_the_second_half_of_its_shape():
    line = (
        "  %rs = ((bf16[64], bf16[32]), (bf16[8], bf16[4])) reduce-scatter-start(%a, %b), "
        "replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add\n"
        "  %cp = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%c), "
        "source_target_pairs={{0,1},{1,0}}"
    )
    found = account(_program(line))
    assert found.received("reduce-scatter") == 7 * 2 * 12
    assert found.received("collective-permute") == 16


def test_products_of_libraries_and_fusions_count_like_others():
    gemm = (
        "  %a = bf16[6,10]{1,0} parameter(0)\n  %b = bf16[10,4]{1,0} parameter(1)\n"
        "  %g = (bf16[6,4]{1,0}, s8[4096]{0}) custom-call(%a, %b), "
        'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":'
        '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
        '"rhs_contracting_dimensions":["0"]}}}\n'
        "  %f = f32[6,4]{1,0} fusion(%a, %b), kind=kOutput, calls=%fused"
    )
    fused = """
    %fused (x: bf16[6,10], y: bf16[10,4]) -> f32[6,4] {
      %x = bf16[6,10]{1,0} parameter(0)
      %y = bf16[10,4]{1,0} parameter(1)
      ROOT %c = f32[6,4]{1,0} convolution(%x, %y), dim_labels=bf_io->bf
    }
    """
    assert account(_program(gemm, fused)).flops == 2 * (2 * 6 * 4 * 10)


def test_fused_attention_is_found_and_counted():
    line = (
        "  %q = bf16[2,440,4,64]{3,2,1,0} parameter(0)\n"
        "  %k = bf16[2,448,4,64]{3,2,1,0} parameter(1)\n"
        "  %o = (bf16[2,4,440,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), "
        'custom_call_target="__cudnn$fmhaSoftmax"'
    )
    found = account(_program(line))
    assert found.fused_attention
    assert found.flops == 4 * (2 * 440 * 4 * 64) * 448
    assert not account(_program(LOOP, BODY)).fused_attention


def test_products_of_a_batch_written_as_a_convolution_count_once_for_each():
    # TPUs: the window walks over 3 matrices so that each meets only its own.
    line = (
        "  %x = bf16[3,6,10]{2,1,0} parameter(0)\n  %y = bf16[3,10,4]{2,1,0} parameter(1)\n"
        "  %c = bf16[3,6,4]{2,1,0} convolution(%x, %y), "
        "window={size=3 stride=2 pad=0_0 lhs_dilate=3}, dim_labels=0bf_0io->0bf"
    )
    assert account(_program(line)).flops == 3 * 2 * 6 * 10 * 4


RING = """
%condition (s: (u32[], bf16[4])) -> pred[] {
  %limit = u32[]{:T(128)} constant(4)
  %s = (u32[]{:T(128)}, bf16[4]{0:T(8)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (s: (u32[], bf16[4])) -> (u32[], bf16[4]) {
  %two = u32[]{:T(128)} constant(2)
  %s = (u32[]{:T(128)}, bf16[4]{0:T(8)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%s), index=0
  %x = bf16[4]{0:T(8)} get-tuple-element(%s), index=1
  %cp = (bf16[4], bf16[4], u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x),\
 channel_id=7, source_target_pairs={{0,1},{1,0}}
  %cpd = bf16[4]{0:T(8)} collective-permute-done(%cp)
  %more = u32[]{:T(128)} add(%i, %two)
  ROOT %t = (u32[]{:T(128)}, bf16[4]{0:T(8)}) tuple(%more, %cpd)
}
"""


def test_loops_of_a_tpu_count_by_their_condition_and_step():
    begin = (
        "  %zero = u32[]{:T(128)} constant(0)\n  %copy.1 = u32[]{:T(128)} copy(%zero)\n"
        "  %p0 = bf16[4]{0} parameter(0)\n  %t = (u32[], bf16[4]) tuple(%copy.1, %p0)\n"
        "  %w = (u32[], bf16[4]) while(%t), condition=%condition, body=%body"
    )
    found = account(_program(begin, RING))
    assert [c.times for c in found.collectives] == [2]
    assert found.received("collective-permute") == 2 * 8


def test_a_collective_that_two_fusions_repeat_counts_once():
    def fused(name):
        return f"""
        %{name} (x: f32[8]) -> f32[64] {{
          %x = f32[8]{{0}} parameter(0)
          ROOT %g = f32[64]{{0}} all-gather(%x), channel_id=3, replica_groups=[1,8]<=[8]
        }}
        """

    calls = "\n".join(
        f"  %f{name} = f32[64]{{0}} fusion(%p0), kind=kCustom, calls=%{name}" for name in ("a", "b")
    )
    assert account(_program(calls, fused("a"), fused("b"))).received("all-gather") == 256 * 7 / 8


def test_an_all_reduce_of_which_a_chip_keeps_a_slice_is_a_reduce_scatter():
    fused = """
    %all-reduce-scatter.1 (x: f32[64]) -> f32[8] {
      %x = f32[64]{0} parameter(0)
      %r = f32[64]{0} all-reduce(%x), channel_id=3, replica_groups=[1,8]<=[8], to_apply=%add
      ROOT %s = f32[8]{0} dynamic-slice(%r, %at), dynamic_slice_sizes={8}
    }
    """
    call = "  %f = f32[8]{0} fusion(%p0), kind=kCustom, calls=%all-reduce-scatter.1"
    found = account(_program(call, fused))
    assert (found.received("reduce-scatter"), found.received("all-reduce")) == (7 * 32, 0)


def test_texts_that_do_not_tell_are_refused():
    with pytest.raises(DataError, match="without ENTRY"):
        account("HloModule x")
    with pytest.raises(DataError, match="known trip count"):
        account(_program(LOOP.partition(", backend_config")[0], BODY, CONDITION))


def test_a_counter_within_fusions_is_followed():
    fused = """
%compared (a: u32[]) -> pred[] {
  %five = u32[] constant(5)
  %a = u32[] parameter(0)
  ROOT %less = pred[] compare(%a, %five), direction=LT
}

%added (b: u32[]) -> u32[] {
  %b = u32[] parameter(0)
  %one = u32[] constant(1)
  ROOT %sum = u32[] add(%b, %one)
}

%condition (s: (u32[], bf16[4])) -> pred[] {
  %s = (u32[], bf16[4]{0}) parameter(0)
  %i = u32[] get-tuple-element(%s), index=0
  ROOT %f = pred[] fusion(%i), kind=kLoop, calls=%compared
}

%body (s: (u32[], bf16[4])) -> (u32[], bf16[4]) {
  %s = (u32[], bf16[4]{0}) parameter(0)
  %i = u32[] get-tuple-element(%s), index=0
  %x = bf16[4]{0} get-tuple-element(%s), index=1
  %cp = bf16[4]{0} collective-permute(%x), channel_id=7, source_target_pairs={{0,1},{1,0}}
  %f = u32[] fusion(%i), kind=kLoop, calls=%added
  ROOT %t = (u32[], bf16[4]{0}) tuple(%f, %cp)
}
"""
    begin = (
        "  %one = u32[] constant(1)\n  %p0 = bf16[4]{0} parameter(0)\n"
        "  %t = (u32[], bf16[4]) tuple(%one, %p0)\n"
        "  %w = (u32[], bf16[4]) while(%t), condition=%condition, body=%body"
    )
    assert [c.times for c in account(_program(begin, fused)).collectives] == [4]
