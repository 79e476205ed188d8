"""How often a program's own loop turns, where only its caller knows it."""

import pytest

from diffjax.performance.hlo import parser, products

# As XLA writes it, but for sizes: the limit is an argument of the program.
LOOP = """
%body (state: (s32[], f32[4,4], s32[])) -> (s32[], f32[4,4], s32[]) {
  %state = (s32[], f32[4,4]{1,0}, s32[]) parameter(0)
  %turn = s32[] get-tuple-element(%state), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%turn, %one)
  %x = f32[4,4]{1,0} get-tuple-element(%state), index=1
  %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %last = s32[] get-tuple-element(%state), index=2
  ROOT %changed = (s32[], f32[4,4]{1,0}, s32[]) tuple(%next, %y, %last)
}

%condition (state: (s32[], f32[4,4], s32[])) -> pred[] {
  %state = (s32[], f32[4,4]{1,0}, s32[]) parameter(0)
  %turn = s32[] get-tuple-element(%state), index=0
  %last = s32[] get-tuple-element(%state), index=2
  ROOT %on = pred[] compare(%turn, %last), direction=LT
}

ENTRY %main (x: f32[4,4], steps: s32[]) -> f32[4,4] {
  %x = f32[4,4]{1,0} parameter(0)
  %steps = s32[] parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,4]{1,0}, s32[]) tuple(%zero, %x, %steps)
  %end = (s32[], f32[4,4]{1,0}, s32[]) while(%start), condition=%condition, body=%body
  %h = f32[4,4]{1,0} get-tuple-element(%end), index=1
  ROOT %out = f32[4,4]{1,0} dot(%h, %h), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
PRODUCT = 2 * 4**3


@pytest.mark.parametrize("turns", [0, 1, 9])
def test_turns_that_are_said_are_counted_and_their_loop_is_no_unknown_one(turns):
    module = parser.parse(LOOP, unknown_trips=turns)
    assert module.executions["body"] == turns
    assert products.compiled_matrix_flops(module) == (turns + 1) * PRODUCT
    assert module.unknown_loops == ()


def test_turns_that_nobody_knows_count_once_and_are_reported():
    module = parser.parse(LOOP)
    assert products.compiled_matrix_flops(module) == 2 * PRODUCT
    assert module.unknown_loops == ("end",)


@pytest.mark.parametrize("turns", [None, 0, 9])
def test_of_two_such_loops_neither_is_the_one_that_was_meant(turns):
    second = (
        "  %again = (s32[], f32[4,4]{1,0}, s32[]) while(%end), condition=%condition, body=%body\n"
    )
    text = LOOP.replace("  %h = ", second + "  %h = ").replace("element(%end)", "element(%again)")
    module = parser.parse(text, unknown_trips=turns)
    assert products.compiled_matrix_flops(module) == 3 * PRODUCT
    assert module.unknown_loops == ("end", "again")
