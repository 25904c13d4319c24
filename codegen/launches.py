"""Kernels compiled for GPUs as C: their binaries as data, and how each is launched (runtime/launch.h)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from apollo_fuse.codegen import expressions as c
from apollo_fuse.codegen.interface import index_checks, item_count, names_in, unpack
from apollo_fuse.codegen.stitched import Kinds, runs
from apollo_fuse.codegen.table import Node, listed
from apollo_fuse.codegen.triton.compile import Binary
from apollo_fuse.codegen.triton.emit import Launch
from apollo_fuse.gpu import GpuTarget
from apollo_fuse.kernel import KernelGroup
from apollo_fuse.scop import Extent

_CODE = {"cuda": "AF_CUBIN", "hip": "AF_HSACO"}
_LINE = 64  # bytes of a binary in a line of text
_PRINTED = frozenset(range(0x20, 0x7F)) - frozenset(b'"\\?')
_AS_C = [chr(byte) if byte in _PRINTED else f"\\{byte:03o}" for byte in range(256)]


@dataclass(frozen=True, slots=True)
class GpuForm:
    """A kernel group for GPUs: its translation unit, its inputs, and the places of those that it reads.

    on_host: those whose elements are extents. on_device: those that kernels read.
    """

    source: str
    input_count: int
    on_host: frozenset[int]
    on_device: frozenset[int]
    launches: tuple[Launch, ...] = ()


@dataclass(frozen=True, slots=True)
class GpuCode:
    """What a library holds for GPUs: kernel groups by name, those that share launches, and their writer."""

    forms: Mapping[str, GpuForm] = field(default_factory=dict)
    stitched: Mapping[Kinds, Mapping[GpuTarget, Binary]] = field(default_factory=dict)
    writer: Mapping[GpuTarget, Binary] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Variant:
    """What a kernel group is for some extents: the binaries of its launches for each GPU, best for these.

    extents: in the group's order; 0 for one that is not known.
    """

    extents: tuple[int, ...]
    binaries: Mapping[GpuTarget, Sequence[Binary]]


def gpu_form(
    group: KernelGroup, name: str, launches: Sequence[Launch], variants: Sequence[Variant]
) -> GpuForm:
    """The form of the group called `name`; a run takes the binaries of the variant that is nearest."""
    values = [v.name for v in (*group.inputs, *group.outputs, *group.temporaries)]
    extents = [extent.symbol.name for extent in group.extents]
    lines = ['#include "launch.h"', '#include "scalar.h"', "", "#include <stdio.h>"]
    entries: list[str] = []
    for k, launch in enumerate(launches):
        tensors, counted = (
            [values.index(x) for x in launch.tensors],
            [extents.index(x) for x in launch.extents],
        )
        of_variants = [tuple((gpu, found[k]) for gpu, found in v.binaries.items()) for v in variants]
        names = {own: f"binaries_{k}_{place}" for place, own in enumerate(dict.fromkeys(of_variants))}
        lists = listed(names[own] for own in of_variants)
        lines += [
            f"static const int32_t tensors_{k}[] = {{{listed(tensors)}}};",
            f"static const int32_t extents_{k}[] = {{{listed(counted)}}};",
            item_count(group, launch.form, launch.items, f"items_{k}").rstrip(),
            _scratch_bytes(group, launch, f"scratch_bytes_{k}"),
            *(_images(own, dict(compiled)) for compiled, own in names.items()),
            f"static const af_binary *const binaries_{k}[] = {{{lists}}};",
        ]
        counts = f"{launch.rows}, {len(tensors)}, {len(launch.scratch)}, {len(counted)}"
        places = f"tensors_{k}, extents_{k}, items_{k}, scratch_bytes_{k}, binaries_{k}"
        entries.append(f'{{"{launch.kernel}", {counts}, {places}}}')
    numbers = listed(number for variant in variants for number in variant.extents)
    lines += [
        f"static const af_launch launches[] = {{{listed(entries)}}};",
        f"static const int64_t variants[] = {{{numbers}}};",
        _check(group),
        f"const af_gpu_op {name}_gpu = {{launches, check, {len(variants)}, variants}};",
    ]
    read = {name for launch in launches for name in launch.tensors}
    return GpuForm(
        "\n".join(lines) + "\n",
        len(group.inputs),
        frozenset(e.input for e in group.extents if isinstance(e, Extent) and e.is_element),
        frozenset(place for place, value in enumerate(group.inputs) if value.name in read),
        tuple(launches),
    )


def gpu_table(nodes: Sequence[Node], code: GpuCode) -> str:
    """The translation unit with what each node of the library's tables has for GPUs."""
    forms = code.forms
    launches = {name: form.launches for name, form in forms.items()}
    lines = ['#include "launch.h"', _images("writer", code.writer)]
    lines.append("const af_binary *const af_writer = writer;")
    lines += [f"extern const af_gpu_op {name}_gpu;" for name in sorted(forms)]
    stitched = {kinds: f"stitched_{number}" for number, kinds in enumerate(code.stitched)}
    lines += [_images(name, code.stitched[kinds]) for kinds, name in stitched.items()]
    entries: list[str] = []
    for number, node in enumerate(nodes):
        on_host = _on_host(node, forms)
        if on_host is None:
            entries.append("{NULL, NULL, 0, NULL}")
            continue
        ops = listed(f"&{name}_gpu" for name in node.ops)
        lines += [
            f"static const af_gpu_op *const ops_{number}[] = {{{ops}}};",
            f"static const uint8_t on_host_{number}[] = {{{listed(map(int, on_host))}}};",
        ]
        starts: list[str] = []
        for place, run in enumerate(runs(node.ops, launches)):
            kinds = run.kinds(node.ops)
            own = f"{number}_{place}"
            kernels, _ = kinds
            of_members = [kernels.index((node.ops[member], kernel)) for member, kernel in run.members]
            binaries = stitched[kinds] if len(run.members) > 1 else "NULL"
            lines += [
                f"static const int32_t members_{own}[] = {{{listed(member for member, _ in run.members)}}};",
                f"static const int32_t kernels_{own}[] = {{{listed(kernel for _, kernel in run.members)}}};",
                f"static const int32_t kinds_{own}[] = {{{listed(of_members)}}};",
            ]
            arrays = f"members_{own}, kernels_{own}, kinds_{own}"
            starts.append(f"{{{len(run.members)}, {arrays}, {binaries}}}")
        lines.append(f"static const af_run runs_{number}[] = {{{listed(starts)}}};")
        entries.append(f"{{ops_{number}, on_host_{number}, {len(starts)}, runs_{number}}}")
    lines.append(f"const af_gpu_node af_gpu_nodes[] = {{{listed(entries)}}};")
    return "\n".join(lines) + "\n"


def _on_host(node: Node, forms: Mapping[str, GpuForm]) -> list[bool] | None:
    """Which inputs of the node lie on the host; None where it has no form, as where one would lie on both."""
    places = iter(node.inputs)
    host: set[int] = set()
    device: set[int] = set()
    for name in node.ops:
        if name not in forms:
            return None
        form = forms[name]
        for own in range(form.input_count):
            place = next(places)
            host |= {place} if own in form.on_host else set()
            device |= {place} if own in form.on_device else set()
    return None if host & device else [place in host for place in range(node.input_count)]


def _scratch_bytes(group: KernelGroup, launch: Launch, name: str) -> str:
    sizes = [buffer.bytes for buffer in launch.scratch]
    lines = [f"static void {name}(const int64_t *n, int64_t *bytes) {{", "  (void)n;", "  (void)bytes;"]
    lines += unpack(group, names_in(sizes)).splitlines()
    lines += [f"  bytes[{place}] = {c.index(size)};" for place, size in enumerate(sizes)]
    return "\n".join([*lines, "}"])


def _images(name: str, compiled: Mapping[GpuTarget, Binary]) -> str:
    """The modules of a kernel: code for each GPU, the newest first, and text that newer ones compile."""
    newest_first = sorted(compiled.items(), key=lambda x: int(_architecture(x[0]), 0), reverse=True)
    found = [(target, binary, _CODE[target.backend], binary.path) for target, binary in newest_first]
    cuda = [x for x in newest_first if x[0].backend == "cuda"]
    found += [(target, binary, "AF_PTX", binary.text) for target, binary in cuda[:1]]
    lines: list[str] = []
    entries: list[str] = []
    for place, (target, binary, form, path) in enumerate(found):
        lines.append(_data(f"{name}_{place}", path.read_bytes()))
        block = f"{binary.threads}, {binary.shared_bytes}"
        entries.append(f"{{{form}, {_architecture(target)}, {block}, {name}_{place}}}")
    entries.append("{0, 0, 0, 0, NULL}")
    return "\n".join([*lines, f"static const af_binary {name}[] = {{{listed(entries)}}};"])


def _architecture(target: GpuTarget) -> str:
    """A number, as a binary in the library has it."""
    return target.architecture.replace("gfx", "0x")


def _data(name: str, content: bytes) -> str:
    """Bytes as C, with a 0 behind them, which ends a text."""
    parts = (content[start : start + _LINE] for start in range(0, len(content), _LINE))
    lines = [f'  "{"".join(_AS_C[byte] for byte in part)}"' for part in parts]
    return "\n".join([f"static const _Alignas(64) char {name}[] =", *lines]) + ";"


def _check(group: KernelGroup) -> str:
    checks = index_checks(group)
    lines = [
        "static int check(const int64_t *n, char *message, size_t message_size) {",
        *("  (void)n;", "  (void)message;", "  (void)message_size;"),
    ]
    lines += unpack(group, names_in(i for x in checks for i in (x.size, x.extent))).splitlines()
    for x in checks:
        text = f"input {x.input} holds %lld indices into an axis of no elements, expected none"
        lines += [
            f"  if ({c.index(x.size)} > {x.start} && {c.index(x.extent)} < 1) {{",
            f'    snprintf(message, message_size, "{text}", (long long)({c.index(x.size)}));',
            "    return 1;",
            "  }",
        ]
    return "\n".join([*lines, "  return 0;", "}"])
