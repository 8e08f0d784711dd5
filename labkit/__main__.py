"""The command line: ``python -m labkit doctor``, ``memory``, ``hardware``, ``record`` …

Each command imports what it needs when it runs, so that ``python -m labkit memory`` loads
neither torch nor Triton.  A mistake in the arguments, and every error that labkit raises on
purpose, ends with one message and status 2; something that was looked for and found wrong (a
stale quote, a failed experiment) with status 1.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from labkit import __version__
from labkit.errors import LabError

_STATES = {"ok": ("green", "✓"), "note": ("yellow", "!"), "lack": ("red", "✗")}


class _Commands(click.Group):
    """Turns a LabError into one message and status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LabError as error:
            click.echo(f"labkit: {error}", err=True)
            ctx.exit(2)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="labkit")
def main() -> None:
    """The Attention Memory Lab: memory models, measurements and records of attention."""


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False)


# -- doctor ------------------------------------------------------------------------------------


@main.command()
@click.option("--no-try", is_flag=True, help="Read versions only; do not run a small kernel.")
@click.option("--trial", is_flag=True, help="Run the small kernel alone, with its whole message.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def doctor(ctx: click.Context, no_try: bool, trial: bool, as_json: bool) -> None:
    """What this machine is, what will run here, and what to do about each lack.

    Status 0 if something of the course runs here, 1 if nothing does.
    """
    from labkit import doctor as lib

    if trial:
        click.echo(f"A Triton kernel ran: {lib.trial()}.")
        return
    report = lib.examine(try_out=not no_try)
    if as_json:
        click.echo(report.to_json())
        ctx.exit(0 if report.usable else 1)

    from rich import box
    from rich.markup import escape
    from rich.table import Table

    console = _console()
    found = Table(box=box.SIMPLE_HEAD, title="This machine", title_justify="left")
    found.add_column("", width=1)
    found.add_column("part", no_wrap=True)
    found.add_column("found")
    for finding in report.findings:
        colour, mark = _STATES[finding.state]
        found.add_row(f"[{colour}]{mark}[/]", escape(finding.part), escape(finding.found))
    runs = Table(box=box.SIMPLE_HEAD, title="What runs here", title_justify="left")
    runs.add_column("", width=1)
    runs.add_column("what")
    runs.add_column("how")
    for ability in report.abilities:
        colour, mark = _STATES["ok" if ability.runs else "lack"]
        runs.add_row(f"[{colour}]{mark}[/]", escape(ability.what), escape(ability.how))
    console.print(found)
    console.print(runs)
    open_points = [f for f in report.findings if f.remedy]
    if open_points:
        todo = Table(box=box.SIMPLE_HEAD, title="What to do", title_justify="left")
        todo.add_column("", width=1)
        todo.add_column("part", no_wrap=True)
        todo.add_column("remedy")
        todo.add_column("meanwhile, this works")
        for finding in open_points:
            colour, mark = _STATES[finding.state]
            cells = (finding.part, finding.remedy, finding.meanwhile)
            todo.add_row(f"[{colour}]{mark}[/]", *map(escape, cells))
        console.print(todo)
    console.print(f"[bold]{escape(report.verdict)}[/]")
    ctx.exit(0 if report.usable else 1)


# -- memory ------------------------------------------------------------------------------------


@main.command()
@click.option("--seq-len", type=int, required=True, help="Queries per head (N).")
@click.option("--seq-len-k", type=int, help="Keys per head; as many as queries by default.")
@click.option("--heads", type=int, default=1, show_default=True, help="Query heads.")
@click.option("--kv-heads", type=int, help="KV heads; as many as query heads by default.")
@click.option("--batch", type=int, default=1, show_default=True, help="Sequences.")
@click.option("--head-dim", type=int, default=64, show_default=True, help="Columns of Q, K, V, O.")
@click.option("--dtype", default="float16", show_default=True, help="float32, fp16, bf16, fp8 …")
@click.option("--causal", is_flag=True, help="Each query sees itself and what came before.")
@click.option("--training", is_flag=True, help="With what the backward pass adds.")
@click.option(
    "--method", default="naive", show_default=True, help="naive (S and P in memory) or fused."
)
@click.option("--card", "cards", multiple=True, help="Does it fit on this card? May be repeated.")
@click.option(
    "--format",
    "style",
    type=click.Choice(["text", "json", "csv"]),
    default="text",
    show_default=True,
    help="How to print it.",
)
def memory(cards: tuple[str, ...], style: str, **problem: Any) -> None:
    """Every tensor of one attention problem, with its shape and bytes.

    Closed forms only: torch is not loaded and nothing is allocated.
    """
    from labkit import hardware
    from labkit.memory import attention_memory

    table = attention_memory(**problem)
    chosen = [hardware.card(name) for name in cards]
    if style != "text":
        click.echo(table.to_json() if style == "json" else table.to_csv().rstrip("\n"))
        return
    click.echo(str(table))
    if chosen:
        click.echo()
        click.echo(_fit(table.peak, chosen, problem))


def _fit(peak: int, cards: list[Any], problem: dict[str, Any]) -> str:
    """Whether the problem fits on each card, and the longest sequence that does."""
    from labkit.memory import longest_seq_len
    from labkit.units import format_bytes, significant

    self_attention = problem["seq_len_k"] in (None, problem["seq_len"])
    rest = {k: v for k, v in problem.items() if k not in {"seq_len", "seq_len_k"}}
    lines = []
    for card in cards:
        room = card.usable_bytes or card.memory_bytes
        kind = "as the driver reports it" if card.usable_bytes else "on the card"
        share = f"{significant(100 * peak / room)} %"
        verdict = f"fits, {share} of it" if peak <= room else f"does not fit: {share} of it"
        line = f"{card.name}, {format_bytes(room)} {kind}: {verdict}"
        if self_attention:
            longest = longest_seq_len(room, counting="peak", **rest)
            line += f"; the longest sequence that fits has {longest:,} tokens".replace(",", " ")
        lines.append(line + ".")
    return "\n".join([*lines, "Nothing else on the card is counted: no weights, no CUDA context."])


# -- hardware ----------------------------------------------------------------------------------


@main.command()
@click.argument("cards", nargs=-1)
@click.option(
    "--view",
    default="overview",
    show_default=True,
    help="Columns: overview, on_chip, totals or compute.",
)
@click.option("--json", "as_json", is_flag=True, help="Print every field, with its source.")
def hardware(cards: tuple[str, ...], view: str, as_json: bool) -> None:
    """The card table, or one card with the source of every figure."""
    from labkit import hardware as lib

    if as_json:
        import json

        shown = lib.table(cards or None, view)
        click.echo(json.dumps(shown.to_dicts(), indent=2, ensure_ascii=False))
    elif len(cards) == 1:
        click.echo(str(lib.card(cards[0])))
    else:
        click.echo(str(lib.table(cards or None, view)))
        click.echo("Sizes binary, rates decimal, peaks dense with float32 accumulation.")
        click.echo("One card with its sources: python -m labkit hardware h200")


# -- record ------------------------------------------------------------------------------------


@main.command()
@click.argument("names", nargs=-1)
@click.option("--quick", is_flag=True, help="The short form; never replaces a full record.")
@click.option("--list", "just_list", is_flag=True, help="List the experiments and stop.")
@click.option("--no-write", is_flag=True, help="Measure and print; write no record.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="Where; the GPU by default.")
@click.pass_context
def record(
    ctx: click.Context,
    names: tuple[str, ...],
    quick: bool,
    just_list: bool,
    no_write: bool,
    device: str | None,
) -> None:
    """Run experiments on this machine and write records/<machine>/<experiment>.json.

    All of them by default.  One that fails is reported, the others go on, and earlier records
    stay as they were.
    """
    from labkit import experiments

    if just_list:
        _list_experiments(names or experiments.names())
        return
    typed = shlex.join(["python", "-m", "labkit", *sys.argv[1:]])
    outcomes = experiments.run_and_record(
        list(names) or None, quick=quick, write=not no_write, device=device, command=typed
    )
    failed = [o.name for o in outcomes if o.status == "failed"]
    done = [o.name for o in outcomes if o.status in {"recorded", "measured"}]
    if failed:
        click.echo(f"labkit: {len(failed)} failed: {', '.join(failed)}.", err=True)
    elif not done:
        click.echo("labkit: nothing was measured. `python -m labkit doctor` says why.", err=True)
    ctx.exit(0 if done and not failed else 1)


def _list_experiments(names: Any) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from labkit import experiments, records

    recorded: dict[str, list[str]] = {}
    for machine, known in records.available().items():
        for name in known:
            recorded.setdefault(name, []).append(machine)
    shown = Table(box=box.SIMPLE_HEAD)
    for head in ("experiment", "what it measures", "chapters", "needs a GPU", "recorded on"):
        shown.add_column(head)
    for name in names:
        module = experiments.get(name)
        shown.add_row(
            name,
            escape(module.TITLE),
            ", ".join(str(c) for c in module.CHAPTERS),
            "yes" if module.NEEDS_GPU else "no",
            ", ".join(recorded.get(name, ["–"])),
        )
    _console().print(shown)


# -- policy ------------------------------------------------------------------------------------


@main.command()
@click.option("--measure", is_flag=True, help="Measure this machine now, and keep the result.")
@click.option("--budget", type=float, default=60.0, show_default=True, help="Seconds to measure.")
@click.option("--heads", type=int, default=8, show_default=True, help="Heads to measure with.")
@click.option(
    "--head-dim", type=int, multiple=True, help="head_dim to measure; 64 and 128 by default."
)
@click.option("--batch", type=int, default=1, show_default=True, help="Batch to measure with.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="Where; the GPU by default.")
@click.option(
    "--file", "path", type=click.Path(path_type=Path), help="Another file to read, or to write."
)
@click.pass_context
def policy(
    ctx: click.Context,
    measure: bool,
    budget: float,
    heads: int,
    head_dim: tuple[int, ...],
    batch: int,
    device: str | None,
    path: Path | None,
) -> None:
    """Which attention to use on this machine, by length: measured here, kept on disk.

    Prints the measured winner for each dtype and shape.  Status 1 if nothing was measured on this
    machine with these versions yet.
    """
    import warnings

    from labkit import dispatch

    given = click.core.ParameterSource.COMMANDLINE
    options = {"budget": "--budget", "heads": "--heads", "head_dim": "--head-dim",
               "batch": "--batch", "device": "--device"}  # fmt: skip
    idle = [flag for name, flag in options.items() if ctx.get_parameter_source(name) == given]
    if idle and not measure:
        raise click.UsageError(
            f"{', '.join(idle)}: {'says' if len(idle) == 1 else 'say'} what to measure, and "
            "nothing is measured without --measure. Add --measure, or leave "
            f"{'it' if len(idle) == 1 else 'them'} out: the table shows all that was measured.",
            ctx,
        )  # fmt: skip
    if measure:
        found = _measured_policy(dispatch, heads, head_dim or (64, 128), batch, budget, device)
        kept = found.save(path)
    else:
        with warnings.catch_warnings(record=True) as ignored:
            warnings.simplefilter("always", dispatch.PolicyIgnored)
            found = dispatch.load_policy(path)
        for warning in ignored:
            click.echo(f"labkit: {warning.message}", err=True)
        kept = path or dispatch.policy_file()
    if found is None:
        click.echo(
            "No policy was measured on this machine with these versions: "
            "python -m labkit policy --measure"
        )
        ctx.exit(1)
    _show_policy(found, kept)


def _measured_policy(dispatch, heads, head_dim, batch, budget, device):
    from rich.progress import Progress

    with Progress(console=_console(), transient=True) as bars:
        task = bars.add_task("measuring", total=None)
        return dispatch.measure_policy(
            heads=heads, head_dim=head_dim, batch=batch, budget_s=budget, device=device,
            progress=lambda done, total, what: bars.update(task, completed=done, total=total),
        )  # fmt: skip


def _show_policy(found: Any, path: Path) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    m = found.machine
    console = _console()
    console.print(
        escape(
            f"{m['card']}, driver {m['driver'] or '–'}, torch {m['torch']}, "
            f"Triton {m['triton'] or '–'}, {m.get('date', '–')}\n{path}"
        )
    )
    shown = Table(box=box.SIMPLE_HEAD, title="Fastest by length (tokens)", title_justify="left")
    for head in ("head_dim", "heads", "mask", "what", "dtype", "from", "use"):
        shown.add_column(head)
    for kind in found.kinds():
        names = ("heads", "kv_heads", "head_dim", "causal", "training")
        asked = {name: kind[name] for name in names}
        fits = {name: value for name, value in kind.items() if name != "batch"}
        here = [p for p in found.points if all(getattr(p, n) == v for n, v in fits.items())]
        for dtype in dict.fromkeys(p.dtype for p in here):
            for segment in found.crossovers(dtypes_allowed=(dtype,), **asked):
                shown.add_row(
                    str(kind["head_dim"]), str(kind["heads"]), "causal" if kind["causal"] else "–",
                    "forward + backward" if kind["training"] else "forward", dtype,
                    f"{segment.start:,}", segment.backend,
                )  # fmt: skip
    console.print(shown)
    for note in found.notes:
        click.echo(f"Note: {note}")


# -- quotes ------------------------------------------------------------------------------------


def _checkout() -> Path:
    root = Path(__file__).resolve().parent.parent
    if not (root / "book").is_dir():
        raise LabError(
            "there is no folder book beside this labkit: quotes are checked in the repository. "
            "Run it from a checkout (pip install -e .), or pass the files."
        )
    return root


@main.command()
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--write", is_flag=True, help="Bring every quote up to date in place.")
@click.pass_context
def quotes(ctx: click.Context, files: tuple[Path, ...], write: bool) -> None:
    """List the measured figures that pages quote from records, and check each.

    Status 1 if a quote does not say what its record says.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from labkit import records
    from labkit.errors import RecordError

    pages = list(files)
    if not pages:
        root = _checkout()
        pages = [root / "README.md", *sorted((root / "book").glob("**/*.md"))]
        pages += sorted(root.glob("notebooks/*.ipynb"))
    if write:
        changed = sum(records.requote_file(page) for page in pages)
        click.echo(f"{changed} quote{'' if changed == 1 else 's'} rewritten.")
    shown = Table(box=box.SIMPLE_HEAD)
    for head in ("", "page", "quote", "record"):
        shown.add_column(head, overflow="fold")
    total, wrong = 0, []
    for page in pages:
        for quote in records.quotes_in_file(page):
            total += 1
            try:
                records.check_quote(quote.text, quote.target)
                state = "ok"
            except RecordError as error:
                state = "lack"
                wrong.append(f"{quote.where}: {error}")
            colour, mark = _STATES[state]
            where = f"{quote.where}, line {quote.line}"
            shown.add_row(
                f"[{colour}]{mark}[/]", escape(where), escape(quote.text), escape(quote.target)
            )
    if total:
        _console().print(shown)
    for line in wrong:
        click.echo(f"labkit: {line}", err=True)
    click.echo(f"{total} quoted figures in {len(pages)} pages, {len(wrong)} wrong.")
    ctx.exit(1 if wrong else 0)


# -- claims ------------------------------------------------------------------------------------


@main.command()
@click.argument("ids", nargs=-1)
@click.option("--markdown", is_flag=True, help="Print the ledger as the book shows it.")
@click.pass_context
def claims(ctx: click.Context, ids: tuple[str, ...], markdown: bool) -> None:
    """The claims that the course tests: verdicts, and every cell recomputed or recorded.

    Status 1 if a cell that is said to agree does not.
    """
    from labkit import claims as lib

    if markdown:
        click.echo(lib.as_markdown())
        return
    chosen = [lib.claim(name) for name in ids] if ids else list(lib.CLAIMS.values())
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    console = _console()
    ledger = Table(box=box.SIMPLE_HEAD)
    for head in ("claim", "verdict", "because", "chapter"):
        ledger.add_column(head)
    for item in chosen:
        ledger.add_row(item.id, item.verdict, escape(item.reason), item.chapter)
    console.print(ledger)
    wrong = 0
    for item in chosen:
        for comparison in lib.comparisons(item.id):
            click.echo(str(comparison))
            wrong += sum(row.agrees != row.expected for row in comparison.rows)
    ctx.exit(1 if wrong else 0)


if __name__ == "__main__":
    main(prog_name="python -m labkit")
