"""What people see: tables and progress on a terminal, plain lines elsewhere; JSON for programs; faults on a screen."""

from __future__ import annotations

import errno
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from megatron_ttl.errors import ExitCode, UserError
from megatron_ttl.runtime import output_is_forwarded


def run_tool(main: Callable[[], int | None]) -> None:
    """Call a tool's `main` and leave with its exit code; a user's mistake prints its faults and no traceback."""
    try:
        sys.exit(int(main() or ExitCode.DONE))
    except UserError as error:
        print_faults(error)
        sys.exit(int(error.exit_code))
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP) or error.filename is None:
            raise
        name = str(error.filename)
        print_faults(UserError(f"{name[:60]}{'...' * (len(name) > 60)}: cannot be a path ({error.strerror}); names "
                               "have at most 255 bytes, paths 4,095; correct it"))
        sys.exit(int(ExitCode.USAGE))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(int(ExitCode.INTERRUPTED))
    except BrokenPipeError:
        # The reader (`| head`) has left; say nothing more, not even when Python flushes at exit.
        sys.stdout = None  # type: ignore[assignment]
        sys.exit(int(ExitCode.DONE))


def print_faults(error: UserError) -> None:
    """Print every fault on standard error, one per line, and how many there are when there are several."""
    shown = error.faults[:40]
    if len(error.faults) > 1:
        print(f"{len(error.faults)} faults:", file=sys.stderr)
    for fault in shown:
        print(f"error: {fault}", file=sys.stderr)
    if len(error.faults) > len(shown):
        print(f"... and {len(error.faults) - len(shown)} more", file=sys.stderr)


def print_result(result: dict[str, Any], as_json: bool, title: str = "") -> None:
    """Print a flat result as one JSON object for programs, or as a two-column table for people."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
    else:
        print_table(("", ""), [(key, value) for key, value in result.items()], title=title)


def on_terminal(stream: IO[str]) -> bool:
    """Return whether a person looks at the stream, and a bar that moves can be drawn there."""
    return stream.isatty() and not output_is_forwarded()


def print_table(header: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> None:
    """Print aligned columns: with rules on a terminal, as plain text elsewhere."""
    text_rows = [[_cell(value) for value in row] for row in rows]
    if on_terminal(sys.stdout):
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=title or None, show_header=any(header), title_justify="left")
        for name in header:
            table.add_column(name)
        for row in text_rows:
            table.add_row(*(escape(value) for value in row))
        Console().print(table)
        return
    if title:
        print(title)
    lines = ([list(header)] if any(header) else []) + text_rows
    widths = [max((len(line[i]) for line in lines), default=0) for i in range(len(header))]
    for line in lines:
        print("  " + "  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "-"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)


@contextmanager
def progress(label: str, total: float | None, unit: str = "") -> Iterator[Callable[[float], None]]:
    """Show how far a long piece of work is; the yielded function takes the absolute amount done.

    A bar with ETA on a terminal; one plain line every ten seconds on standard error elsewhere.
    """
    if on_terminal(sys.stderr):
        from rich import progress as rp
        from rich.console import Console

        columns = [rp.TextColumn("{task.description}"), rp.BarColumn(), rp.TaskProgressColumn(),
                   rp.TextColumn("{task.fields[amount]}"), rp.TimeRemainingColumn()]
        with rp.Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(label, total=total, amount="")
            yield lambda done: bar.update(task, completed=done, amount=f"{_scaled(done)}{unit}")
        return
    started = last = time.monotonic()

    def report(done: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 10:
            last = now
            share = f" of {_scaled(total)}{unit} ({100 * done / total:.0f} %)" if total else ""
            rate = done / max(now - started, 1e-9)
            eta = f", {_seconds((total - done) / rate)} left" if total and rate > 0 else ""
            print(f"{label}: {_scaled(done)}{unit}{share}, {_scaled(rate)}{unit}/s{eta}", file=sys.stderr, flush=True)

    yield report


def _scaled(count: float) -> str:
    for suffix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {suffix}"
    return f"{count:.0f} "


def _seconds(duration: float) -> str:
    minutes, seconds = divmod(int(duration), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


format_duration = _seconds


def print_warning(message: str) -> None:
    """Say on standard error that something is not as it should be, but the work goes on."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
