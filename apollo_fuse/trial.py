"""The model with some of its kernels in it: as sessions to try, and as the files that are written."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from apollo_fuse import onnx_io
from apollo_fuse.atomic import replacing
from apollo_fuse.bodies import nodes
from apollo_fuse.codegen import link
from apollo_fuse.codegen.launches import GpuCode, gpu_table
from apollo_fuse.codegen.table import tables
from apollo_fuse.layout import pin
from apollo_fuse.measure import session_options
from apollo_fuse.region import relocated, swap
from apollo_fuse.stitching import Swap, entry, members


def open_session(path: Path, threads: int) -> ort.InferenceSession:
    """The model at `path` in onnxruntime with all its optimisations."""
    return ort.InferenceSession(str(path), session_options(threads), providers=["CPUExecutionProvider"])


@dataclass(frozen=True, slots=True)
class Trial:
    """What it takes to make the fused model; `clean` is not changed, `folder` takes the files of trials.

    `build` holds the kernels that this machine tries.
    """

    clean: ir.Model
    build: link.Build
    cache: Path
    threads: int
    folder: Path

    def fused(self, chosen: Sequence[Swap]) -> ort.InferenceSession:
        """The model with these candidates in it, which may be none."""
        model = self._swapped(chosen)
        settings = onnx_io.beside_weights(session_options(self.threads), model)
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            library = Path(place, "fused.so")
            if chosen:
                self.library(chosen, library)
                settings.register_custom_ops_library(str(library))
            proto = ir.to_proto(model).SerializeToString()
            return ort.InferenceSession(proto, settings, providers=["CPUExecutionProvider"])

    def library(self, chosen: Sequence[Swap], path: Path) -> None:
        """Links the kernels of these candidates, for this machine."""
        self._link(chosen, path, [self.build], GpuCode())

    def write(
        self,
        chosen: Sequence[Swap],
        path: Path,
        builds: Sequence[link.Build],
        on_gpus: GpuCode,
    ) -> Path:
        """Writes the model with these candidates, and its library beside it; gives the library's path.

        The library holds what was built for its targets, and what of `on_gpus` the candidates need. Where
        anything fails, neither file has changed.
        """
        library = path.with_suffix(".so")
        with replacing(library) as temporary:
            self._link(chosen, temporary, builds, on_gpus)
            onnx_io.write(self._swapped(chosen), path)
        return library

    def write_alone(self, path: Path) -> None:
        """Writes the model without a kernel, as it was rewritten and laid out."""
        onnx_io.write(self._swapped(()), path)

    def _link(
        self,
        chosen: Sequence[Swap],
        path: Path,
        builds: Sequence[link.Build],
        on_gpus: GpuCode,
    ) -> None:
        entries = {x.name: entry(x) for x in chosen}
        table = [entries[name] for name in sorted(entries)]
        names = sorted({kernel.name for x in chosen for kernel in members(x)})
        levels = [build.toolchain.cpu.level for build in builds]
        objects = [build.objects[name] for build in builds for name in names]
        forms = {name: on_gpus.forms[name] for name in names if name in on_gpus.forms}
        sources = [form.source for form in forms.values()]
        sources += [gpu_table(table, replace(on_gpus, forms=forms))] if forms else []
        link.link_library(objects, tables(table, levels), path, builds[0].toolchain, self.cache, sources)

    def _swapped(self, chosen: Sequence[Swap]) -> ir.Model:
        model = self.clean.clone()
        positions = dict(enumerate(nodes(model.graph)))
        for candidate in chosen:
            copies = {o.node: positions[o.position] for o in candidate.micro_graph.operators}
            swap(model, relocated(candidate.part, copies), candidate.name, candidate.micro_graph.outputs)
        pin(model)
        model.graph.sort()
        return model
