"""A report with every kind of entry in it, for the tests of what is done with reports."""

from dataclasses import replace
from pathlib import Path

from apollo_fuse.report import (
    CompileSeconds,
    FeedbackRound,
    KernelReport,
    LatencyReport,
    LayoutReport,
    RefusedReport,
    Report,
    VerificationReport,
)

ACCEPTED = KernelReport(
    name="mul_add_relu",
    layer=1,
    ops=("Mul", "Add", "Relu"),
    pattern="ELEMENTWISE",
    inputs=("x: float32[b, 128]", "w: float32[128]"),
    outputs=("y: float32[b, 128]",),
    bytes_before=6144,
    bytes_after=2048,
    unfused_us=12.5,
    fused_us=4.0,
    accepted=True,
    reason="measured 3.12x as fast as onnxruntime",
    instances=12,
    predicted_unfused_us=11.0,
    predicted_us=3.5,
)
LEFT_OUT = replace(
    ACCEPTED,
    name="exp",
    ops=("Exp",),
    unfused_us=3.0,
    fused_us=3.5,
    accepted=False,
    reason="measured slower than onnxruntime",
    instances=1,
)
FUSED = Report(
    model=Path("net.onnx"),
    output=Path("net.fused.onnx"),
    library=Path("net.fused.so"),
    target="cpu",
    cpu="a processor",
    cpu_targets=("x86-64-v2", "x86-64-v4"),
    verified_cpu="x86-64-v4",
    versions={"apollo-fuse": "0.1.0", "onnxruntime": "1.32.0"},
    nodes_before=60,
    nodes_after=36,
    fused_nodes=12,
    distinct_kernels=1,
    kernels=(ACCEPTED, LEFT_OUT),
    refused=(
        RefusedReport(("conv_0", "conv_1"), "extract_clusters", "Conv stays with onnxruntime"),
        RefusedReport(("odd[0]",), "loop_fusion", "isl ran into its limit", "5 operations at most"),
    ),
    feedback_rounds=(
        FeedbackRound(
            1,
            (("mul_0", "odd[0]"),),
            ("mul_0, odd[0]: isl ran into its limit",),
            RefusedReport(("mul_0", "odd[0]"), "loop_fusion", "isl ran into its limit", "5 at most"),
        ),
    ),
    verification=VerificationReport(passed=True, cases=8, max_abs_error=1e-6, max_rel_error=float("inf")),
    latency=LatencyReport(unfused_ms=2.0, fused_ms=1.25, speedup=1.6, runs=50, threads=2),
    layout="ort",
    made_for="onnxruntime 1.32.0 and processors with blocks of 16 channels",
    remembered=True,
    layouts=(LayoutReport("portable", 10, 2.0, 1.5), LayoutReport("ort", 12, 2.0, 1.25)),
    beside_convolutions=4,
    compile_seconds=CompileSeconds(
        total=4.0,
        load=0.25,
        partition=0.25,
        isl=0.5,
        codegen=0.25,
        cc=1.0,
        judge=0.25,
        verify=0.5,
        measure=1.0,
    ),
    warnings=("kernel [sin] failed verification and was dropped",),
)
UNCHANGED = Report(
    model=Path("net.onnx"),
    output=Path("net.fused.onnx"),
    library=None,
    target="cpu",
    cpu="a processor",
    cpu_targets=(),
    verified_cpu="aarch64",
    versions={"apollo-fuse": "0.1.0"},
    nodes_before=3,
    nodes_after=3,
    fused_nodes=0,
    distinct_kernels=0,
    kernels=(LEFT_OUT,),
)
