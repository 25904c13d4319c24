"""Opens a fused model in onnxruntime together with its library of kernels."""

import os
import platform
import tempfile
from pathlib import Path

import onnxruntime

from apollo_fuse.errors import UsageError


def session(
    path: str | os.PathLike[str],
    *,
    library: str | os.PathLike[str] | None = None,
    **session_kwargs: object,
) -> onnxruntime.InferenceSession:
    """An `onnxruntime.InferenceSession` on the model at `path`, with its kernels.

    The kernels are those of `library`, or else of the file beside the model that has the suffix `.so`. Where
    there is none, the model runs through the functions that it carries. `session_kwargs` go to onnxruntime as
    they are; the library is added to their `sess_options`, which hold one such library at most. Raises
    UsageError where they hold one already, and where the library does not exist or is for another machine.
    """
    model = Path(path)
    kernels = model.with_suffix(".so") if library is None else Path(library)
    options = session_kwargs.pop("sess_options", None)
    if options is None:
        options = onnxruntime.SessionOptions()
    if not isinstance(options, onnxruntime.SessionOptions):
        raise UsageError(
            f"sess_options is a {type(options).__name__}, expected an onnxruntime.SessionOptions; pass one"
        )
    if kernels.is_file():
        _register(options, kernels)
    elif library is not None:
        raise UsageError(f"there is no library at {kernels}; give the path that apollo-fuse wrote, or none")
    try:
        return onnxruntime.InferenceSession(str(model), options, **session_kwargs)
    except Exception as error:
        if "Domain already set in registry" in str(error):
            raise UsageError(
                "sess_options hold a library of apollo-fuse already, expected none; pass new session options"
            ) from error
        raise


def _register(options: onnxruntime.SessionOptions, library: Path) -> None:
    """Under a name of its own: the system opens no file of a name that it holds, be it another one by now."""
    try:
        with tempfile.TemporaryDirectory(prefix="apollo-fuse-") as folder:
            name = Path(folder, library.name)
            name.symlink_to(library.absolute())
            options.register_custom_ops_library(str(name))
    except Exception as error:  # onnxruntime raises classes of its own for each status
        raise UsageError(
            f"the library {library} does not load on this machine ({platform.machine()}): it is damaged, or "
            "for another architecture; make one with --cpu, or take it away and the model runs without"
        ) from error
