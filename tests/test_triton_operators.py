"""Every operator's tests once more, with kernels in Triton, which Triton's interpreter runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests import test_operators, test_quantized_operators, test_transformer_operators
from tests.interpreted import Interpreted, interpreted
from tests.interpreter import Interpreter
from tests.test_operators import (  # noqa: F401  collected here again
    Table,
    test_cast_chains,
    test_cast_from,
    test_division_and_both_remainders_of_integers,
    test_division_that_integers_cannot_do_does_not_end_the_process,
    test_elements_chosen_by_indices,
    test_functions_of_one_float,
    test_functions_of_one_integer,
    test_functions_of_two_floats,
    test_functions_of_two_integers,
    test_linear_resizes,
    test_linear_resizes_of_open_extents,
    test_logic,
    test_maxima_pass_nan_on_from_any_place,
    test_movement,
    test_nearest_resizes,
    test_nearest_resizes_of_open_extents,
    test_no_index_is_read_outside_of_its_axis,
    test_normalisations,
    test_operators_with_several_results,
    test_padding,
    test_places,
    test_powers_of_mixed_types,
    test_prelu,
    test_quantisation,
    test_reductions,
    test_reductions_of_infinities_and_nan,
    test_reductions_of_nothing,
    test_shifts,
    test_sine_and_cosine,
    test_softmax,
    test_where,
    test_windows,
)
from tests.test_quantized_operators import (  # noqa: F401  but sums: the interpreter rounds each product
    test_quantized_functions,
    test_quantized_pools,
    test_quantized_softmax,
)
from tests.test_transformer_operators import (  # noqa: F401
    test_bits_of_one_type_as_another,
    test_gated_activations_and_norms,
    test_newest_operators,
    test_other_operators,
    test_rotary_positions,
)

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def in_triton(
    monkeypatch: pytest.MonkeyPatch, interpreter: Interpreter, request: pytest.FixtureRequest
) -> None:
    if request.node.name in ("test_movement[bfloat16]", "test_bits_of_one_type_as_another[int16]"):
        pytest.skip("the interpreter has no subnormal numbers of bfloat16")

    def fused(
        table: Table,
        folder: Path,
        cache: Path,
        shapes: Mapping[str, Sequence[int]] | None = None,
        seed: int = 0,
    ) -> Interpreted:
        return interpreted(table.model(table.runnable()), folder, interpreter)

    for tests in (test_operators, test_quantized_operators, test_transformer_operators):
        monkeypatch.setattr(tests, "fused", fused)
