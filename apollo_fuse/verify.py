"""Compares what two onnxruntime sessions compute on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import ml_dtypes
import numpy as np
import onnxruntime as ort

from apollo_fuse.doubles import NotInDoublesError
from apollo_fuse.dtypes import DType
from apollo_fuse.errors import ApolloFuseError, what_onnxruntime_says
from apollo_fuse.graph import MicroGraph
from apollo_fuse.running import run
from apollo_fuse.tolerance import RELATIVE, Array, Doubles, Nearer, compare, nearer, unsteady

InDoubles: TypeAlias = Callable[[Mapping[str, Array]], Sequence[Doubles]]
"""What the outputs would be in double precision; raises NotInDoublesError where that is not known."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`note` says of an output that differs beyond tolerance why it is right all the same."""

    cases: int
    max_abs_error: float
    max_rel_error: float
    problem: str
    note: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem

    def joined(self, other: Verdict) -> Verdict:
        return Verdict(
            self.cases + other.cases,
            max(self.max_abs_error, other.max_abs_error),
            max(self.max_rel_error, other.max_rel_error),
            self.problem or other.problem,
            self.note or other.note,
        )


NOTHING = Verdict(0, 0.0, 0.0, "")


def failed(problem: str) -> Verdict:
    """The verdict on what cannot be run at all."""
    return Verdict(1, np.inf, np.inf, problem)


def coarsest(micro_graphs: Iterable[MicroGraph]) -> DType | None:
    """The floating-point type of least precision that these kernels compute in, or None if in none."""
    found = {
        item.dtype
        for micro_graph in micro_graphs
        for primitive in micro_graph.primitives
        for item in primitive.block.instructions
        if item.dtype.is_float
    }
    return max(found, key=lambda dtype: RELATIVE[dtype], default=None)


class OriginalFailsError(ApolloFuseError):
    """There is nothing to compare with; the message is what onnxruntime says."""


def verify(
    original: ort.InferenceSession,
    fused: ort.InferenceSession,
    cases: Sequence[Mapping[str, Array]],
    precision: DType | None = None,
    in_doubles: InDoubles | None = None,
    whole: bool = False,
) -> Verdict:
    """Runs both on every case; the first difference beyond tolerance is the problem.

    `precision` is the coarsest that the kernels between them compute in, as `coarsest` finds it. Where
    `in_doubles` is given, it tells who is right about what differs. Of a `whole` model, results may be off by
    what the original's own are where its inputs move by their last bit.

    Raises OriginalFailsError where onnxruntime does not run the original.
    """
    verdict = NOTHING
    names = [output.name for output in original.get_outputs()]
    for feeds in cases:
        try:
            expected = run(original, feeds)
        except Exception as error:  # onnxruntime raises classes of its own for each status
            raise OriginalFailsError(what_onnxruntime_says(error)) from error
        try:
            found = run(fused, feeds)
        except Exception as error:  # as above
            return verdict.joined(failed(what_onnxruntime_says(error)))
        for place, (name, a, b) in enumerate(zip(names, expected, found, strict=True)):
            if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
                continue  # sequences and maps are passed by
            difference = compare(name, a, b, precision)
            compared = Verdict(0, difference.absolute, difference.relative, difference.problem)
            if not difference.passed and np.isfinite(difference.absolute):
                if in_doubles is not None:
                    compared = _judged(compared, in_doubles, feeds, place, (a, b), precision)
                elif whole:
                    moved = [run(original, near)[place] for near in _nudged(feeds)]
                    compared = _excused(
                        compared, unsteady(a, b, [x for x in moved if isinstance(x, np.ndarray)])
                    )
            verdict = verdict.joined(compared)
        verdict = verdict.joined(Verdict(1, 0.0, 0.0, ""))
    return verdict


def _judged(
    verdict: Verdict,
    in_doubles: InDoubles,
    feeds: Mapping[str, Array],
    place: int,
    results: tuple[Array, Array],
    precision: DType | None,
) -> Verdict:
    """The verdict on an output that differs, with what it is in doubles in view."""
    try:
        found = nearer(in_doubles(feeds)[place], *results, precision)
    except NotInDoublesError as error:
        found = Nearer(False, str(error))
    return _excused(verdict, found)


def _excused(verdict: Verdict, found: Nearer) -> Verdict:
    told = f"{verdict.problem} ({found.evidence})" if found.evidence else verdict.problem
    return replace(verdict, problem="", note=told) if found.right else replace(verdict, problem=told)


def _nudged(feeds: Mapping[str, Array]) -> list[dict[str, Array]]:
    """The same inputs with each float moved to the next number up, to the next down, and to one of these.

    Where there are no floats, there are none.
    """
    up, down, either = ({**feeds} for _ in range(3))
    random = np.random.default_rng(0)
    floats = [name for name, array in feeds.items() if array.dtype.kind == "f" and array.dtype.itemsize > 1]
    for name in floats:
        array = feeds[name]
        up[name], down[name] = (np.nextafter(array, np.array(end, array.dtype)) for end in (np.inf, -np.inf))
        either[name] = np.where(random.random(array.shape) < 0.5, up[name], down[name])
    return [up, down, either] if floats else []


def edge_case(
    feeds: Mapping[str, Array], seed: int, *, sparse: bool = False, finite: bool = False
) -> dict[str, Array]:
    """The same inputs with NaN, infinities, signed zeros and denormals here and there in the floats.

    `sparse` puts them into few places, so that rows which are reduced stay mostly finite. `finite` leaves
    NaN and infinities out.
    """
    random = np.random.default_rng(seed)
    result: dict[str, Array] = {}
    for name, array in feeds.items():
        if not (array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16) or not array.size:
            result[name] = array
            continue
        info = ml_dtypes.finfo(array.dtype)  # type: ignore[no-untyped-call]
        numbers = [0.0, -0.0, info.smallest_subnormal, -info.tiny, 1.0, -1.0]
        special = np.array(numbers if finite else [np.nan, np.inf, -np.inf, *numbers], array.dtype)
        share = 1.0 / 512 if sparse else 1.0 / 4
        places = random.random(array.shape) < share
        result[name] = np.where(places, random.choice(special, array.shape), array)
    return result
