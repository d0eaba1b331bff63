"""The command line: `tightrope demo | search | resume | front | export | estimate | devices`."""

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tightrope.spaces.errors import TightropeError

if TYPE_CHECKING:
    from tightrope.search.study import Study

app = typer.Typer(
    name="tightrope", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Give a latency budget on your device; get the compressed PyTorch model that meets it.",
)  # fmt: skip
devices = typer.Typer(no_args_is_help=True, help="What a model can be compressed for.")
app.add_typer(devices, name="devices")

Run = Annotated[Path, typer.Argument(help="folder of a run, such as runs/demo")]
Address = Annotated[str | None, typer.Option(help="a running Ray cluster, host:port; `local` starts Ray here")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="say more on stderr")]


def main() -> None:
    """Entry point: errors of the user's making are one line on stderr and exit code 2."""
    try:
        app()
    except TightropeError as error:
        print(f"tightrope: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("tightrope: stopped; `tightrope resume RUN` goes on", file=sys.stderr)  # noqa: T201
        raise SystemExit(130) from None


def _logging(verbose: bool) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    if not verbose:
        warnings.simplefilter("ignore")
    for name in ("torch", "ray", "optuna", "onnxscript", "onnx_ir", "tensorboard"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _show(study: "Study", folder: Path) -> None:
    """The report of a run, and how to go on."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    console = Console(width=max(console.width, 120))  # the table needs them
    console.print(Markdown((folder / "best" / "report.md").read_text(encoding="utf-8")))
    kind = "packed" if study.header.simulated else "onnx"
    console.print(
        f"\nGo on with:\n  tensorboard --logdir {folder.parent}\n  tightrope front {folder}\n"
        f"  tightrope export {folder} --format {kind}",
        highlight=False,
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder of the runs")] = Path("runs"),
    trials: Annotated[int, typer.Option(help="trials of the first search", min=4)] = 120,
    workers: Annotated[int, typer.Option(min=0)] = 2,
    seed: int = 0,
    verbose: Verbose = False,
) -> None:
    """A real net on real digits, searched under a quarter of its latency; then a short search on a simulated accelerator."""
    _logging(verbose)
    from tightrope.search.demo import demo as run

    for study, folder in run(out, trials=trials, workers=workers, seed=seed):
        _show(study, folder)


@app.command()
def search(
    config: Annotated[Path, typer.Argument(help="YAML file: model, data, budget, ...")],
    budget: Annotated[
        list[str] | None, typer.Option(help="such as latency<=0.5x, size<=100KB or accuracy>=-1.0; may be repeated")
    ] = None,
    agent: Annotated[str | None, typer.Option(help="auto, ilp, tpe, nsga2, ddpg, ...; see docs/agents.md")] = None,
    device: Annotated[str | None, typer.Option(help="see `tightrope devices list`")] = None,
    trials: Annotated[int | None, typer.Option(min=1)] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Ray actors; 0 runs in this process")] = None,
    address: Address = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    out: Annotated[str | None, typer.Option(help="folder of the run")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="override any key: --set space.least_width=0.25")] = None,
    verbose: Verbose = False,
) -> None:
    """Search a model of your own, as a YAML file describes it, and export the best."""
    _logging(verbose)
    from tightrope.search import config as configs
    from tightrope.search.progress import default
    from tightrope.search.session import run
    from tightrope.search.task import load
    from tightrope.spaces.errors import ConfigError

    chosen = configs.load(
        config, set_ or (), budget=budget or None, agent=agent, device=device, trials=trials, workers=workers, address=address,
        seed=seed, out=out,
    )  # fmt: skip
    if not chosen.model or not chosen.data:
        raise ConfigError(f"{config}: model and data must be given, as module:function")
    _show(run(load(chosen.model, chosen.data, chosen.metric), chosen, default(lines=True)), Path(chosen.out))


@app.command()
def resume(
    run: Run,
    trials: Annotated[int | None, typer.Option(min=1, help="how many in all, if more than were planned")] = None,
    address: Address = None,
    verbose: Verbose = False,
) -> None:
    """Go on with a search that was stopped or killed; nothing that was told is lost."""
    _logging(verbose)
    from tightrope.search.progress import default
    from tightrope.search.session import resume as go_on

    task = None
    if (run / "demo.json").exists():
        from tightrope.search.demo import task as demo_task

        task = demo_task(json.loads((run / "demo.json").read_text())["seed"])
    _show(go_on(run, task, default(lines=True), trials, address), run)


@app.command()
def front(
    run: Run,
    html: Annotated[Path | None, typer.Option(help="write one self-contained page")] = None,
    csv: Annotated[Path | None, typer.Option(help="write the front as a table")] = None,
    svg: Annotated[Path | None, typer.Option(help="write a picture")] = None,
) -> None:
    """Show the Pareto front of a run, finished or not."""
    from rich.console import Console

    from tightrope.search.report.front import write_csv
    from tightrope.search.report.page import write_html
    from tightrope.search.report.picture import write_svg
    from tightrope.search.report.terminal import export_hint, front_plot, front_table

    for write, file in ((write_html, html), (write_csv, csv), (write_svg, svg)):
        if file is not None:
            write(run, file)
            typer.echo(f"wrote {file}")
    if html is csv is svg is None:
        console = Console()
        console.print(front_table(run, width=console.width))
        console.print(front_plot(run, width=min(console.width, 100)))
        typer.echo(f"\n{export_hint(run)}")


@app.command()
def export(
    run: Run,
    trial: Annotated[int | None, typer.Option(help="a trial of the run; without it the best, as fine-tuned")] = None,
    format_: Annotated[str, typer.Option("--format", help="onnx, packed or policy")] = "onnx",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="file to write")] = None,
    finetune: Annotated[bool, typer.Option(help="fine-tune a --trial before it is written")] = True,
    verbose: Verbose = False,
) -> None:
    """Write the best policy of a run, or any trial's, as ONNX, as packed safetensors or as JSON."""
    _logging(verbose)
    from tightrope.search.session import export_run

    typer.echo(f"wrote {export_run(run, trial, format_, output, finetune)}")


@app.command()
def estimate(
    run: Annotated[Path, typer.Argument(help="a run folder, or the YAML file of a search")],
    policy: Annotated[Path | None, typer.Option(help="policy.json; without it the dense model")] = None,
    trial: Annotated[int | None, typer.Option(help="a trial of the run")] = None,
    device: Annotated[str | None, typer.Option(help="another device than the run's")] = None,
    verbose: Verbose = False,
) -> None:
    """What a policy costs on a device, layer by layer."""
    _logging(verbose)
    from rich.console import Console

    from tightrope.search.report.breakdown import breakdown
    from tightrope.search.session import estimate_run

    network, cost, dense = estimate_run(run, policy, trial, device)
    Console().print(breakdown(network, cost, dense))


@devices.command("list")
def list_devices() -> None:
    """All devices: measured runtimes and simulated accelerators."""
    from rich.console import Console
    from rich.table import Table

    from tightrope.estimators import registry

    table = Table("device", "kind", "tells")
    for name in registry.names():
        table.add_row(name, *registry.summary(name))
    Console().print(table)


@devices.command("show")
def show_device(name: str) -> None:
    """What a device executes and tells, what it drops and why."""
    from rich.console import Console

    from tightrope.estimators import registry
    from tightrope.spaces.network import Extent, Layer

    device: Any = registry.make(name)
    console = Console()
    console.print(
        f"[bold]{device.name}[/bold], {'simulated' if device.simulated else 'measured'}; tells {', '.join(sorted(device.metrics))}"
    )
    kinds = {
        "convolution": Layer("x", "conv", Extent(64), Extent(64), (3, 3), in_size=(8, 8), out_size=(8, 8)),
        "depthwise": Layer("x", "depthwise", Extent(64), Extent(64), (3, 3), groups=64, in_size=(8, 8), out_size=(8, 8)),
        "linear": Layer("x", "linear", Extent(64), Extent(64)),
    }  # fmt: skip
    for kind, layer in kinds.items():
        pairs = sorted(device.pairs(layer))
        shown = f"{len(pairs)} pairs from {pairs[0]} to {pairs[-1]}" if len(pairs) > 6 else ", ".join(map(str, pairs))
        console.print(f"  {kind}: weight and activation bits {shown}", highlight=False)
    for note in device.notes:
        console.print(f"  - {note}", highlight=False)


@devices.command("probe")
def probe_device(
    config: Annotated[Path, typer.Argument(help="YAML file of a search: its model, space and batch size")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="file to write; without it, standard output")] = None,
    isa: Annotated[
        Literal["avx512", "avx2", "arm64"] | None,
        typer.Option(help="instruction set of the device, avx2 for any x86-64 without AVX-512; this machine's unless given"),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Write the job that a device elsewhere times for a search: run it there with runner.py, then import the results."""
    _logging(verbose)
    from tightrope.estimators.measured import runner
    from tightrope.estimators.measured.imported import keep_job
    from tightrope.search import config as configs
    from tightrope.search.session import probe_job
    from tightrope.spaces.errors import ConfigError

    chosen = configs.load(config)
    if not chosen.model or not chosen.data:
        raise ConfigError(f"{config}: model and data must be given, as module:function")
    text = probe_job(chosen, isa)
    keep_job(text)
    if output is None:
        sys.stdout.write(text)
    else:
        output.write_text(text, encoding="utf-8")
    name = output or "job.jsonl"
    typer.echo(
        f"copy {name} and {runner.__file__} to the device and run there: python runner.py {name} results.csv\n"
        "then here: tightrope devices import NAME results.csv", err=True,
    )  # fmt: skip


@devices.command("import")
def import_device(
    name: Annotated[str, typer.Argument(help="what the device is to be called")],
    results: Annotated[Path, typer.Argument(help="the CSV file that runner.py wrote")],
    job: Annotated[Path | None, typer.Option(help="the job that was run, if it was not written on this machine")] = None,
    verbose: Verbose = False,
) -> None:
    """Make a latency table of what runner.py timed, and say how well it predicts nets that no fit saw."""
    _logging(verbose)
    from tightrope.estimators import registry
    from tightrope.estimators.measured.imported import import_results
    from tightrope.spaces.errors import DeviceError

    if name in registry.names() and registry.summary(name)[0] != "imported":
        raise DeviceError(f"{name!r} is a device of another kind already; take another name")
    _report(name, import_results(name, results, job))


@devices.command("check")
def check_device(name: str, verbose: Verbose = False) -> None:
    """How far a device can be believed: the error of its tables, the noise of this machine, or what its profile is from."""
    _logging(verbose)
    from rich.console import Console

    from tightrope.estimators import registry

    kind, _ = registry.summary(name)
    console = Console()
    if kind == "imported":
        from tightrope.estimators.measured.imported import reports

        for report in reports(name):
            _report(name, report)
    elif kind == "measured":
        from tightrope.estimators.measured.base import left_out
        from tightrope.estimators.measured.imported import mape
        from tightrope.estimators.measured.sampling import floor

        lines = [f"{name}: noise floor of this machine {100 * floor():.1f} %; below 3 % is good"]
        for what, errors in left_out(name):
            lines.append(f"  table of {what}: {len(errors)} nets, each left out of the fit: mean error {mape(errors):.1f} %")
        console.print("\n".join(lines), highlight=False)
    else:
        device: Any = registry.make(name)
        console.print("\n".join([f"{name}:", *(f"  - {note}" for note in device.notes)]), highlight=False)


def _report(name: str, report: Any) -> None:
    from rich.console import Console

    from tightrope.estimators.measured.imported import mape, within

    Console().print(
        f"{name}: {report.where}; {report.nodes} nodes timed\n"
        f"  {len(report.left_out)} nets, each left out of the fit: mean error {mape(report.left_out):.1f} %\n"
        f"  {len(report.held_out)} mixed nets that no fit saw: mean error {mape(report.held_out):.1f} %, "
        f"{within(report.held_out):.0f} % within 10 %", highlight=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
