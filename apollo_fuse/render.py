"""The report as text for a person: the summary table of every run, and the longer text of `--explain`."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apollo_fuse.report import KernelReport, RefusedReport, Report

_LARGEST = 5  # groups of refusals in the summary
_NAMES = 6  # names in a list that the explanation shows
_EXAMPLES = 3  # pieces of evidence, or names, beside a group in the summary
_LONGEST = 72  # characters of such a piece; extents of open dimensions can fill a screen


def render_summary(report: Report, console: Console) -> None:
    """Print what changed, what it gained, and the largest groups of nodes that stayed as they were."""
    if report.library is None and not report.without_kernels:
        console.print(f"[bold]{escape(report.model.name)}[/]: nothing was fused", highlight=False)
        if report.kernels:
            _print(console, f"  {_tried(report.kernels)}")
    else:
        _print_table(console, _gains(report))
    if report.remembered:
        _print(console, "Verified and measured by an earlier run; --remeasure does so anew")
    for line in _about_layout(report):
        _print(console, line)
    if report.refused:
        _print_table(console, _largest_refusals(report.refused))
    if report.without_kernels:
        gains = "by its layout alone" if report.made_for is not None else "by other operators alone"
        _print(console, f"Wrote {report.output}, which gains {gains}; it has no library")
    elif report.library is None:
        untried = not report.kernels and report.warnings  # a warning says why
        result = "The model" if untried else "Nothing could be won: the model"
        _print(console, f"{result} was written unchanged to {report.output}")
    else:
        _print(console, f"Wrote {report.output}\n      {report.library}")


def render_explanation(report: Report, console: Console) -> None:
    """Print every kernel with its figures, every refusal by rule and reason, and the feedback rounds."""
    console.print("[bold]Kernels[/]")
    if not report.kernels:
        _print(console, "  none")
    for kernel in report.kernels:
        _explain_kernel(kernel, console)
    console.print("[bold]Refused[/]")
    if not report.refused:
        _print(console, "  none")
    for (rule, reason), group in _by_reason(report.refused):
        count = sum(len(refusal.nodes) for refusal in group)
        _print(console, f"  {rule}: {reason} ({_nodes(count)})")
        for evidence, names in _by_evidence(group):
            shown = _abbreviated(names)
            _print(console, f"    {evidence}: {shown}" if evidence else f"    {shown}")
    if report.feedback_rounds:
        console.print("[bold]Feedback[/]")
    for feedback in report.feedback_rounds:
        refused = feedback.refused
        evidence = f" ({refused.evidence})" if refused.evidence else ""
        _print(console, f"  round {feedback.round}: {refused.rule}: {refused.reason}{evidence}")
        edges = _abbreviated([f"{producer} -> {consumer}" for producer, consumer in feedback.forbidden_edges])
        _print(console, f"    grouped anew: {_abbreviated(refused.nodes)}; not together: {edges}")


def render_compile_seconds(report: Report, console: Console) -> None:
    """Print where the time of the compilation went, what the library is for, and the versions used."""
    seconds = report.compile_seconds
    spent = ", ".join(f"{part} {time:.2f}" for part, time in seconds.parts.items())
    _print(console, f"Compiled in {seconds.total:.2f} s: {spent}")
    if report.cpu_targets:
        _print(console, f"For {', '.join(report.cpu_targets)}; verified as code for {report.verified_cpu}")
    _print(console, "With " + ", ".join(f"{name} {version}" for name, version in report.versions.items()))


def _about_layout(report: Report) -> list[str]:
    """Which layout was taken and why, what the model is bound to, and where another one may gain."""
    lines: list[str] = []
    if report.layouts:
        tried = ", ".join(f"{x.layout} {x.fused_ms:.3f} ms" for x in report.layouts)
        lines.append(f"Layout {report.layout} was taken ({tried})")
    if report.made_for is not None:
        lines.append(f"This model was made for {report.made_for}; keep the original for all else")
    if not report.layouts and report.layout == "portable" and report.beside_convolutions:
        lines.append(
            f"Kernels beside convolutions were tried in {report.beside_convolutions} "
            f"place{'' if report.beside_convolutions == 1 else 's'}; --layout auto may gain more there, "
            "by a model for this machine alone"
        )
    return lines


def _print(console: Console, text: str) -> None:
    """Print words that are not ours to colour, cut or wrap: names and paths are copied from here."""
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _print_table(console: Console, table: Table) -> None:
    """Print a table; what is no terminal gets its lines without the spaces that fill them up."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    _print(console, "\n".join(lines))


def _tried(kernels: Sequence[KernelReport]) -> str:
    """What became of the kernels where none was kept."""
    measured = [k.unfused_us / k.fused_us for k in kernels if k.unfused_us and k.fused_us]
    best = f"; the best by itself ran {max(measured):.2f}x as fast as onnxruntime" if measured else ""
    return f"{len(kernels)} kernel{'' if len(kernels) == 1 else 's'} tried, none kept{best}"


def _gains(report: Report) -> Table:
    table = Table(title=escape(report.model.name), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for heading in ("before", "after", ""):
        table.add_column(heading, justify="right")
    kernels = f"{report.distinct_kernels} distinct kernel{'' if report.distinct_kernels == 1 else 's'}"
    left = report.nodes_after - report.fused_nodes
    table.add_row("nodes", str(report.nodes_before), str(report.nodes_after), "")
    table.add_row("operators run by onnxruntime", str(report.nodes_before), str(left), "")
    table.add_row("fused nodes", "0", str(report.fused_nodes), kernels)
    table.add_row(
        "bytes moved by the fused part",
        _bytes(report.bytes_before),
        _bytes(report.bytes_after),
        _change(report.bytes_before, report.bytes_after),
    )
    latency = report.latency
    if latency.unfused_ms is None or latency.fused_ms is None:
        table.add_row("latency", "", "", "not measured")
    else:
        speedup = "" if latency.speedup is None else f"[bold]{latency.speedup:.2f}x[/]"
        table.add_row("latency", f"{latency.unfused_ms:.3f} ms", f"{latency.fused_ms:.3f} ms", speedup)
    return table


def _largest_refusals(refused: Iterable[RefusedReport]) -> Table:
    table = Table(title="left to onnxruntime", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("nodes", justify="right")
    table.add_column("reason", overflow="fold")
    table.add_column("evidence", overflow="fold")
    groups = _by_reason(refused)
    for (_, reason), group in groups[:_LARGEST]:
        count = sum(len(refusal.nodes) for refusal in group)
        table.add_row(str(count), escape(reason), escape(_evidence(group)))
    if len(groups) > _LARGEST:
        rest = sum(len(refusal.nodes) for _, group in groups[_LARGEST:] for refusal in group)
        more = len(groups) - _LARGEST
        table.add_row(str(rest), f"{more} more reason{'' if more == 1 else 's'}", "--explain lists them")
    return table


def _evidence(group: Sequence[RefusedReport]) -> str:
    """The commonest evidence of a group with its node counts, and where there is none the first nodes."""
    found = _by_evidence(group)
    if [evidence for evidence, _ in found] == [""]:
        return _abbreviated(map(_shortened, found[0][1]), _EXAMPLES)
    shown = [f"{_shortened(evidence or 'others')} ({len(names)})" for evidence, names in found[:_EXAMPLES]]
    return ", ".join(shown) + (f" and {len(found) - _EXAMPLES} more" if len(found) > _EXAMPLES else "")


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3].rstrip() + "..."


def _by_evidence(group: Iterable[RefusedReport]) -> list[tuple[str, list[str]]]:
    """The nodes of each evidence, the evidence of most nodes first, then by first node."""
    nodes: defaultdict[str, list[str]] = defaultdict(list)
    for refusal in group:
        nodes[refusal.evidence] += refusal.nodes
    return sorted(nodes.items(), key=lambda item: -len(item[1]))


def _by_reason(refused: Iterable[RefusedReport]) -> list[tuple[tuple[str, str], list[RefusedReport]]]:
    """Refusals grouped by rule and reason, those that keep most nodes first, then by name."""
    groups: defaultdict[tuple[str, str], list[RefusedReport]] = defaultdict(list)
    for refusal in refused:
        groups[refusal.rule, refusal.reason].append(refusal)
    return sorted(groups.items(), key=lambda item: (-sum(len(refusal.nodes) for refusal in item[1]), item[0]))


def _explain_kernel(kernel: KernelReport, console: Console) -> None:
    verdict = "accepted" if kernel.accepted else "left out"
    places = f", in {kernel.instances} places" if kernel.instances > 1 else ""
    _print(console, f"  {kernel.name}: {verdict}{places}: {kernel.reason}")
    layer = "I" * kernel.layer
    if kernel.members:
        each = [f"{count} x {name}" for name, count in Counter(kernel.members).most_common()]
        _print(console, f"    one launch (layer {layer}) of {_abbreviated(each)}")
    else:
        _print(console, f"    fuses {' '.join(kernel.ops)} ({kernel.pattern.lower()}, layer {layer})")
        _print(console, f"    {', '.join(kernel.inputs)} -> {', '.join(kernel.outputs)}")
    moved = f"{_bytes(kernel.bytes_before)} -> {_bytes(kernel.bytes_after)}"
    if kernel.unfused_us is None or kernel.fused_us is None:
        figures = f"moves {moved}; not measured"
    else:
        figures = f"moves {moved}; takes {kernel.unfused_us:.1f} us -> {kernel.fused_us:.1f} us"
    if kernel.apart_us is not None:
        figures += f", {kernel.apart_us:.1f} us one by one"
    if kernel.predicted_us is not None and kernel.predicted_unfused_us is not None:
        figures += f"; predicted {kernel.predicted_unfused_us:.1f} us -> {kernel.predicted_us:.1f} us"
    _print(console, f"    {figures}")
    if kernel.note:
        _print(console, f"    judged in float64: {kernel.note}")
    for name, gpu in kernel.gpu.items():
        spilled = f", {_bytes(gpu.spills)} spilled" if gpu.spills else ""
        figures = (
            f"predicted {gpu.predicted_us:.1f} us, {_count(gpu.launches, 'launch', 'es')}, "
            f"{_bytes(gpu.cold_bytes)} from and to memory of {_bytes(gpu.compulsory_bytes)}; "
            f"{_count(gpu.num_warps, 'warp')} of {_count(gpu.registers, 'register')} a thread{spilled}, "
            f"occupancy {gpu.occupancy:.0%}"
        )
        _print(console, f"    {name}, compiled and not run: {figures}")


def _abbreviated(names: Iterable[str], most: int = _NAMES) -> str:
    every = list(names)
    shown = ", ".join(every[:most])
    return shown if len(every) <= most else f"{shown} and {len(every) - most} more"


def _nodes(count: int) -> str:
    return _count(count, "node")


def _count(count: int, noun: str, ending: str = "s") -> str:
    return f"{count} {noun}{'' if count == 1 else ending}"


def _bytes(count: int) -> str:
    """`count` in the largest binary unit in which it is 1 or more."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def _change(before: int, after: int) -> str:
    return "" if before == 0 else f"{100 * (after - before) / before:+.0f} %"
