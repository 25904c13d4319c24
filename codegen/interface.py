"""The C interface of an op: its types, how extents follow from input shapes, and its output shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

from apollo_fuse.codegen import expressions as c
from apollo_fuse.graph import Shape, Value
from apollo_fuse.index import ONE, Index, Indirect
from apollo_fuse.kernel import Compute, Kernel, KernelGroup, walk
from apollo_fuse.scop import Derived, Extent, tensor_size


def op_interface(group: KernelGroup, name: str) -> str:
    """The definition of ``const af_op AF_OP(NAME)``, after the kernels it names."""
    kernels = ", ".join(f"&{kernel.name}" for kernel in group.kernels)
    counts = ", ".join(
        str(len(part))
        for part in (group.inputs, group.outputs, group.temporaries, group.extents, group.kernels)
    )
    return f"""static const int32_t input_types[] = {{{_types(group.inputs)}}};
static const int32_t output_types[] = {{{_types(group.outputs)}}};
static const int32_t input_ranks[] = {{{_ranks(group.inputs)}}};
static const int32_t output_ranks[] = {{{_ranks(group.outputs)}}};
static const af_kernel *const kernels[] = {{{kernels}}};

{_bind(group)}
{_check(group)}
{_output_shapes(group)}
{_temporaries(group)}
const af_op AF_OP({name}) = {{
  "{name}", {counts},
  input_types, output_types, input_ranks, output_ranks, bind, check, output_shapes, temporary_bytes, kernels,
}};
"""


def _bind(group: KernelGroup) -> str:
    """Solves the inputs for the extents, then checks every dimension against them."""
    lines = [
        "static int bind(const int64_t *const *shapes, void *const *buffers, int64_t *n, char *message,",
        "                size_t message_size) {",
    ]
    lines += [f"  (void){name};" for name in ("shapes", "buffers", "n", "message", "message_size")]
    if any(isinstance(extent, Extent) and extent.is_element for extent in group.extents):
        lines.append("  if (!buffers) return 1; /* a model is being loaded, and extents are no data yet */")
    for place, extent in enumerate(group.extents):
        lines.append(f"  const int64_t {extent.symbol} = n[{place}] = {_solution(extent, group)};")
        lines.append(f"  (void){extent.symbol};")
    for input_, value in enumerate(group.inputs):
        for axis, dim in enumerate(value.shape):
            if not any(_is_solved_by(e, input_, axis) for e in group.extents):
                text = f"input {input_} has %lld elements along axis {axis}, expected %lld"
                lines += _expect(f"shapes[{input_}][{axis}]", c.index(dim), text)
    for found, expected in group.required:
        text = "extents are %lld and %lld, expected equal ones"
        lines += _expect(c.index(found), c.index(expected), text)
    return "\n".join([*lines, "  return 0;", "}"]) + "\n"


def _solution(extent: Extent | Derived, group: KernelGroup) -> str:
    if isinstance(extent, Derived):
        return c.formula(extent.formula)
    solution = f"shapes[{extent.input}][{extent.axis}]"
    if extent.is_element:
        kind = c.STORAGE[group.inputs[extent.input].dtype]
        solution = f"((const {kind} *)buffers[{extent.input}])[{extent.axis}]"
    if not extent.rest.is_zero:
        solution = f"({solution} - ({c.index(extent.rest)}))"
    if not extent.divisor.is_one:
        divisor = f"({c.index(extent.divisor)})"
        solution = f"{divisor} ? {solution} / {divisor} : 0"
    return solution


def _is_solved_by(extent: Extent | Derived, input_: int, axis: int) -> bool:
    """Whether the dimension is what the extent was read from, as it is."""
    return (
        isinstance(extent, Extent)
        and (extent.input, extent.axis, extent.is_element) == (input_, axis, False)
        and extent.divisor.is_one
        and extent.rest.is_zero
    )


def _expect(found: str, expected: str, text: str) -> list[str]:
    return [
        f"  if ({found} != {expected}) {{",
        f'    snprintf(message, message_size, "{text}",',
        f"             (long long)({found}), (long long)({expected}));",
        "    return 1;",
        "  }",
    ]


@dataclass(frozen=True, slots=True)
class IndexCheck:
    """The elements ``[start:size:step]`` of an input point into an axis of `extent` elements."""

    input: int
    start: int
    step: Index
    size: Index
    extent: Index


def index_checks(group: KernelGroup) -> tuple[IndexCheck, ...]:
    """What has to hold of the index tensors before a kernel runs.

    Where a read always takes the same column of the tensor's last axis, that column alone is looked at.
    """
    places = {value.name: place for place, value in enumerate(group.inputs)}
    checks: dict[IndexCheck, None] = {}
    for read in sorted({a for k in group.kernels for a in _indirect_reads(k)}, key=str):
        place = places[read.tensor]
        value = group.inputs[place]
        column = _column(read, value.shape)
        start, step = (0, ONE) if column is None else (column, value.shape[-1])
        checks[IndexCheck(place, start, step, tensor_size(value), read.extent)] = None
    return tuple(checks)


def _check(group: KernelGroup) -> str:
    """Compares the least and the greatest index of each index tensor with the axis it points into."""
    checks = index_checks(group)
    lines = [
        "static int check(void *const *buffers, const int64_t *n, char *message, size_t message_size) {",
        *("  (void)buffers;", "  (void)n;", "  (void)message;", "  (void)message_size;"),
    ]
    lines += unpack(group, names_in(i for check in checks for i in (check.size, check.extent))).splitlines()
    for check in checks:
        value, end = group.inputs[check.input], c.index(check.extent)
        lines += [
            "  {",
            f"    const {c.STORAGE[value.dtype]} *{value.name} = buffers[{check.input}];",
            "    int64_t least = 0, most = -1;",
            "#pragma omp simd reduction(min : least) reduction(max : most)",
            f"    for (int64_t i = {check.start}; i < {c.index(check.size)}; i += {c.index(check.step)}) {{",
            f"      least = {value.name}[i] < least ? {value.name}[i] : least;",
            f"      most = {value.name}[i] > most ? {value.name}[i] : most;",
            "    }",
            f"    if (least < -({end}) || most >= {end}) {{",
            "      snprintf(message, message_size,",
            '               "input %d holds the index %lld, expected one from %lld to %lld",',
            f"               {check.input}, (long long)(most >= {end} ? most : least), -(long long)({end}), "
            f"(long long)({end}) - 1);",
            "      return 1;",
            "    }",
            "  }",
        ]
    return "\n".join([*lines, "  return 0;", "}"]) + "\n"


def _column(read: Indirect, shape: Shape) -> int | None:
    """The place along the index tensor's last axis that the read takes, where it is one and the same."""
    return (read.indices[0] % shape[-1]).constant if shape else None


def _indirect_reads(kernel: Kernel) -> Iterable[Indirect]:
    for step in walk(kernel.body):
        if isinstance(step, Compute):
            for load in step.block.loads:
                yield from (a for a in load.indices[0].atoms() if isinstance(a, Indirect))


def item_count(group: KernelGroup, form: int, items: Index, name: str) -> str:
    """The function that gives a kernel's work items, which are none where the run takes another form."""
    mentioned = names_in((items, *(condition.value for condition in group.forms)))
    return f"""static int64_t {name}(const int64_t *n) {{
  (void)n;
{unpack(group, mentioned)}{_choice(group, form)}  return {c.index(items)};
}}
"""


def _choice(group: KernelGroup, form: int) -> str:
    lines = [
        f"  if ({c.index(condition.value)} <= INT64_C({condition.limit})) return 0;\n"
        for condition in group.forms[:form]
    ]
    if form < len(group.forms):
        condition = group.forms[form]
        lines.append(f"  if (!({c.index(condition.value)} <= INT64_C({condition.limit}))) return 0;\n")
    return "".join(lines)


def unpack(group: KernelGroup, names: Set[str]) -> str:
    """Declarations of the extents with these names, one a line."""
    return "".join(
        f"  const int64_t {e.symbol} = n[{place}];\n"
        for place, e in enumerate(group.extents)
        if e.symbol.name in names
    )


def names_in(indices: Iterable[Index]) -> set[str]:
    """The extents that indices mention."""
    return {s.name for index in indices for s in index.symbols()}


def _output_shapes(group: KernelGroup) -> str:
    dims = [dim for value in group.outputs for dim in value.shape]
    lines = [
        "static void output_shapes(const int64_t *n, int64_t *const *shapes) {",
        "  (void)n;",
        "  (void)shapes;",
    ]
    lines += unpack(group, names_in(dims)).splitlines()
    for place, value in enumerate(group.outputs):
        for axis, dim in enumerate(value.shape):
            lines.append(f"  shapes[{place}][{axis}] = {c.index(dim)};")
    return "\n".join([*lines, "}"]) + "\n"


def _temporaries(group: KernelGroup) -> str:
    sizes = [tensor_size(value) * value.dtype.size for value in group.temporaries]
    lines = [
        "static void temporary_bytes(const int64_t *n, int64_t *bytes) {",
        "  (void)n;",
        "  (void)bytes;",
    ]
    lines += unpack(group, names_in(sizes)).splitlines()
    lines += [f"  bytes[{place}] = {c.index(size)};" for place, size in enumerate(sizes)]
    return "\n".join([*lines, "}"]) + "\n"


def _types(values: Sequence[Value]) -> str:
    return ", ".join(str(v.dtype.onnx) for v in values) or "0"


def _ranks(values: Sequence[Value]) -> str:
    return ", ".join(str(len(v.shape)) for v in values) or "0"
