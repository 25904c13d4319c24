"""Compiles kernels in a process of its own: ``python -m apollo_fuse.codegen.triton.worker FOLDER``.

Reads one job as JSON from each line of stdin, writes the binary where the job says, and answers each with a
line of JSON: what the compiler says of the kernel, or an error.  FOLDER is for Triton's own files.
"""

import contextlib
import importlib.util
import io
import json
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

_PTX_VERSION = 80  # that of CUDA 12.0, which every driver since then compiles


def main() -> None:
    warnings.simplefilter("ignore")
    from triton import knobs

    knobs.cache.dir = sys.argv[1]
    knobs.compilation.always_compile = True  # the compiler says nothing of what it takes from a cache
    knobs.compilation.disable_line_info = True  # which names files that are gone then
    knobs.nvidia.dump_ptxas_log = True  # where spilled registers are told
    modules: dict[str, ModuleType] = {}
    for line in sys.stdin:
        job = json.loads(line)
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                source = job["source"]
                if source not in modules:
                    modules[source] = _module(source)
                answer = _compile(modules[source], job, said)
        except Exception as error:  # whatever the compiler raises is the answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


def _compile(module: ModuleType, job: dict[str, Any], said: io.StringIO) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend = job["backend"]
    architecture = int(job["architecture"]) if backend == "cuda" else job["architecture"]
    # onnxruntime aligns what it allocates by far more than vectors of 16 bytes need
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(job["pointers"])}
    source = ASTSource(getattr(module, job["kernel"]), job["signature"], job["constants"], aligned)
    # nothing is contracted, and small numbers are no zeros, as in C
    options = {"num_warps": job["warps"], "enable_fp_fusion": False}
    if backend == "cuda":
        options |= {"enable_reflect_ftz": False, "ptx_version": _PTX_VERSION}
    compiled = triton.compile(source, target=GPUTarget(backend, architecture, job["warp"]), options=options)
    if compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size:
        raise ValueError("the kernel needs memory that no launch gives it")
    if backend == "cuda":
        # what was compiled for 90 is for that alone where it is code; nothing in the text has to be
        text = re.sub(r"^(\.target sm_\d+)a", r"\1", compiled.asm["ptx"], flags=re.MULTILINE)
        Path(job["output"]).with_suffix(".ptx").write_text(text)
    found = _ptxas(said.getvalue()) if backend == "cuda" else _amdgcn(compiled.asm["amdgcn"])
    Path(job["output"]).write_bytes(compiled.asm["cubin" if backend == "cuda" else "hsaco"])
    return {**found, "shared_bytes": compiled.metadata.shared}


def _ptxas(said: str) -> dict[str, int]:
    """What ``ptxas -v`` says of a thread."""
    return {
        "registers": int(_number(r"Used (\d+) registers", said)),
        "spills": int(_number(r"(\d+) bytes spill stores", said)),
    }


def _amdgcn(assembly: str) -> dict[str, int]:
    """What stands in the metadata of the assembly."""
    return {
        "registers": int(_number(r"\.vgpr_count:\s+(\d+)", assembly)),
        "spills": 4 * int(_number(r"\.vgpr_spill_count:\s+(\d+)", assembly)),
    }


def _number(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's words hold no {pattern!r}")
    return found[1]


def _module(source: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"program_{Path(source).stem}", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
