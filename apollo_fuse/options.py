"""The options of one compilation, as one frozen value that is handed down from the command line.

The two environment variables that apollo-fuse knows, `APOLLO_FUSE_CACHE_DIR` and `CC`, are read here and
nowhere else, when an `Options` is made.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import platformdirs

from apollo_fuse.cpu import CpuTargets
from apollo_fuse.errors import UsageError
from apollo_fuse.gpu import GpuTarget, gpus_of

LAYOUTS = ("portable", "ort", "auto")
LAYERS = ("I", "I,II", "I,II,III")
MOST_THREADS = 1024
"""Each of onnxruntime's sessions starts all of its threads."""


def default_cache_dir() -> Path:
    """The folder of compiled kernels: `$APOLLO_FUSE_CACHE_DIR`, else the user's own cache folder."""
    override = os.environ.get("APOLLO_FUSE_CACHE_DIR")
    return Path(override).expanduser() if override else platformdirs.user_cache_path("apollo-fuse")


def environment_compiler() -> str | None:
    """The C compiler command that `$CC` asks for, arguments included, or None where it asks for none."""
    return os.environ.get("CC", "").strip() or None


@dataclass(frozen=True, slots=True)
class InputShape:
    """The dimensions that one graph input takes, instead of the ones the model leaves open.

    `name` is the input's name in the graph; `dims` are its extents, outermost first, none below 1.
    """

    name: str
    dims: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.name:
            raise UsageError("a shape has no input name; write NAME:1,128")
        if not self.dims or min(self.dims) < 1:
            raise UsageError(
                f"the shape of input {self.name!r} is {list(self.dims)}; give extents of 1 or more"
            )

    @classmethod
    def parse(cls, text: str) -> "InputShape":
        """Read `NAME:1,128`. The name ends at the last colon, since exporters write names like `input:0`.

        Raises UsageError, with the expected form, for anything else.
        """
        name, colon, extents = text.rpartition(":")
        if not colon or not name:
            raise UsageError(f"{text!r} is not a shape; write NAME:1,128 with the name of a graph input")
        try:
            dims = tuple(int(extent) for extent in extents.split(","))
        except ValueError:
            raise UsageError(
                f"{extents!r} in {text!r} is not a list of extents; write NAME:1,128 with whole numbers"
            ) from None
        return cls(name, dims)


@dataclass(frozen=True, slots=True)
class Options:
    """Everything that a caller may choose about one compilation.

    shapes: extents for inputs with open dimensions, used to measure and to verify; one entry an input.
    inputs: a `.npz` file with arrays for inputs by name, to measure and verify with; others are made up.
    target: `cpu`, or `auto` for what the machine has. GPUs may follow, as in `cpu,cuda:90`: then the library
        has kernels for them too, and the report tells what those take; no GPU has run one yet.
    cpu: the processors that the library is made for; the machine's own unless others are named.
    layout: `portable` for a model that runs anywhere; `ort` for one in onnxruntime's own layout, which runs
        on machines like this one alone; `auto` for the faster one of both.
    layers: the layers of the fusion phase: `I` is loop fusion, `I,II` adds memory stitching, and `I,II,III`
        parallelism stitching; to see what each gains.
    feedback: whether what a kernel is refused for groups its operators anew; False leaves them unfused.
    measure: decide what is kept by measuring on this machine; False decides by the cost model alone.
    strict: a kernel that fails verification is an error, instead of being dropped with a warning.
    cache_dir: where compiled kernels are kept between runs.
    compiler: the command of the C compiler; None looks for gcc, clang, then the ziglang package.
    threads: threads to compile, measure and verify with, at most MOST_THREADS; None takes all cores.
    max_area_operators: most primitive operators in one micro-graph; five times as many in one that puts
        elementwise parts together.
    max_depth_operators: most primitive operators that a broadcast or reduction rule adds in depth.
    isl_max_operations: isl operations that one scheduling call may spend before it is refused.
    fuse_all: make kernels also of what cannot gain (operators alone, views, tiny tensors), to test them.
    measure_seconds: least wall time, in seconds, spent on measuring one distinct kernel or model.
    remeasure: verify and measure anew what an earlier run of the same compilation decided.
    seed: seed of the random inputs that measure and verify.
    dump: a folder that takes the text of every intermediate form; None writes none.
    """

    shapes: tuple[InputShape, ...] = ()
    inputs: Path | None = None
    target: str = "auto"
    cpu: CpuTargets = field(default_factory=CpuTargets.native)
    layout: str = "portable"
    layers: str = LAYERS[-1]
    feedback: bool = True
    measure: bool = True
    strict: bool = False
    cache_dir: Path = field(default_factory=default_cache_dir)
    compiler: str | None = field(default_factory=environment_compiler)
    threads: int | None = None
    max_area_operators: int = 200
    max_depth_operators: int = 20
    isl_max_operations: int = 100_000
    fuse_all: bool = False
    measure_seconds: float = 0.05
    remeasure: bool = False
    seed: int = 0
    dump: Path | None = None

    def __post_init__(self) -> None:
        gpus_of(self.target)
        if self.layers not in LAYERS:
            raise UsageError(f"the layers are {self.layers!r}; expected one of {' or '.join(LAYERS)}")
        if self.layout not in LAYOUTS:
            raise UsageError(f"the layout is {self.layout!r}; expected one of {', '.join(LAYOUTS)}")
        if self.layout != "portable" and self.cpu != CpuTargets.native():
            raise UsageError(
                f"the layout {self.layout} is for this machine, and the processors are {self.cpu}; "
                "give portable"
            )
        if self.layout == "auto" and not self.measure:
            raise UsageError("the layout auto is decided by measuring; give portable or ort, or measure")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise UsageError(
                f"{self.threads} threads were asked for; give 1 to {MOST_THREADS}, or none for all cores"
            )
        for limit in ("max_area_operators", "max_depth_operators", "isl_max_operations"):
            if getattr(self, limit) < 1:
                raise UsageError(f"{limit} is {getattr(self, limit)}; give 1 or more")
        if self.measure_seconds <= 0:
            raise UsageError(f"measure_seconds is {self.measure_seconds}; give more than 0")
        names = [shape.name for shape in self.shapes]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise UsageError(f"input {repeated!r} is given two shapes; give one")

    @property
    def gpus(self) -> tuple[GpuTarget, ...]:
        """The GPUs that kernels are compiled for."""
        return gpus_of(self.target)

    @property
    def stitches_memory(self) -> bool:
        """Whether Layer II is on."""
        return self.layers != "I"

    @property
    def stitches_parallelism(self) -> bool:
        """Whether Layer III is on."""
        return self.layers == "I,II,III"

    def dims(self, name: str) -> tuple[int, ...] | None:
        """The extents given for the input `name`, or None where none were given."""
        return next((shape.dims for shape in self.shapes if shape.name == name), None)
