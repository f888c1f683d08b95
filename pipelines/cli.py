"""The command line `sagsm`: `plan | run | compare | gap | ensemble | predict | ui | shards | store | cluster`.

Tables are for people, `--json` is for programs: one JSON document as the last thing on standard output; all else goes to
standard error. Errors that a user can mend are one message and exit code 2.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.errors import SagsmError
from infra.secrets import guard_output
from pipelines.cluster_cli import cluster_app
from pipelines.ensemble_cli import ensemble
from pipelines.judging_cli import judging_app, print_comparison
from pipelines.predict_cli import predict
from pipelines.printing import print_card, print_json, print_table, system_errors_explained
from pipelines.shards_cli import shards_app
from pipelines.store_cli import store_app

app = typer.Typer(
    name="sagsm",
    help="Video action recognition as a DAG: raw videos -> shards -> search -> SA-GSM -> report, on Ray, recorded in MLflow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(judging_app)
app.add_typer(shards_app, name="shards")
app.add_typer(cluster_app, name="cluster")
app.add_typer(store_app, name="store")
app.command()(ensemble)
app.command()(predict)

_TRIALS_SHOWN = 10

Experiment = Annotated[str, typer.Argument(help="Name of an experiment; `sagsm experiments` lists them.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change a setting; may be repeated: --set train.epochs=3"),
]
OnlyOption = Annotated[str | None, typer.Option("--only", metavar="STAGE", help="Just this stage and what it needs.")]
WorkdirOption = Annotated[Path, typer.Option("--workdir", metavar="DIR", help="Holds the store and the embedded MLflow.")]
EstimateOption = Annotated[bool, typer.Option("--estimate", help="Forecast what writing the shards takes; at most a minute.")]
CpusOption = Annotated[
    list[int] | None,
    typer.Option("--cpus", metavar="N", min=1, max=100_000, help="Forecast for N CPUs as well; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]


def main() -> None:
    """Entry point of the console script: user errors become a message and exit code 2; no output shows a secret."""
    guard_output()
    try:
        app(standalone_mode=True)
    except SagsmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)  # not by way of the libraries: a thread of theirs once aborted the process there, with code 134


@app.command()
def plan(
    experiment: Experiment,
    set_: SetOption = None,
    only: OnlyOption = None,
    workdir: WorkdirOption = Path("work"),
    estimate: EstimateOption = False,
    cpus: CpusOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the stages of an experiment: which are cached, which will run, and why; and how it will train. Runs nothing.

    With --estimate it also writes some of the videos for twenty seconds, throws them away, and forecasts what the shards take.

    Example: sagsm plan demo --set search.num_trials=6
    """
    from pipelines.preview import preview, preview_text
    from pipelines.run import make_request, plan_experiment

    request = make_request(experiment, set_ or [], workdir, only)
    planned = plan_experiment(request)
    training = preview(request.config, planned)
    forecast = _forecast(request, estimate, cpus)
    if as_json:
        rows = [
            {
                "name": item.name,
                "needs": list(item.needs.values()),
                "status": "cached" if item.artifact else "run",
                "reason": item.reason,
                "fingerprint": item.fingerprint,
                "path": str(item.artifact.path) if item.artifact else None,
            }
            for item in planned
        ]
        print_json({"stages": rows, "training": training, **({"estimate": forecast[0]} if forecast else {})})
        return
    width = max(10, *(len(item.name) + 2 for item in planned))
    stage_of = {item.name: item.stage.name for item in planned}
    needs = {item.name: ", ".join(dict.fromkeys(stage_of[node] for node in item.needs.values())) or "-" for item in planned}
    wide = max(42, *(len(text) + 2 for text in needs.values()))
    print(f"{'stage':<{width}}{'needs':<{wide}}{'status':<8}why")
    for item in planned:
        status = "cached" if item.artifact else "run"
        print(f"{item.name:<{width}}{needs[item.name]:<{wide}}{status:<8}{item.reason}".rstrip())
    print(f"\n{preview_text(training)}")
    if forecast:
        print(f"\n{forecast[1]}")


@app.command()
def run(
    experiment: Experiment,
    set_: SetOption = None,
    only: OnlyOption = None,
    workdir: WorkdirOption = Path("work"),
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="ADDR", help="A running Ray cluster, checked first; else one starts here."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run an experiment: every stage that is not cached. Interrupted or failed, the same command goes on from there.

    Example: sagsm run demo --set search.num_trials=6
    """
    from infra.progress import StageProgress
    from pipelines.run import Interrupted, interruptible, make_request, run_experiment

    request = make_request(experiment, set_ or [], workdir, only, address)
    try:
        with interruptible(), StageProgress() as progress:
            outcome = run_experiment(request, progress)
    except Interrupted as interrupt:
        again = _command(experiment, set_, only, workdir, address)
        print(f"stopped by {interrupt}; go on with: {again}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(128 + interrupt.number)  # stage threads may hang in a call to the cluster that is gone
    if as_json:
        print_json(_run_document(outcome))
    if outcome.error is not None:
        with system_errors_explained():
            raise outcome.error
    if not as_json:
        _print_outcome(outcome, request, set_)


def _run_document(outcome: Any) -> dict[str, Any]:
    stages = [
        {
            "name": result.name,
            "status": result.status,
            "seconds": round(result.seconds, 3),
            "fingerprint": result.fingerprint,
            "path": str(result.artifact.path) if result.artifact else None,
            "mlflow_run_id": result.mlflow_run_id,
            "error": str(result.error) if result.error else None,
        }
        for result in outcome.stages
    ]
    return {"stages": stages, "results": outcome.numbers, "card": outcome.card}


def _print_outcome(outcome: Any, request: Any, set_: list[str] | None) -> None:
    numbers = outcome.numbers
    trials = [
        row
        for result in outcome.stages
        if result.name == "search" and result.artifact
        for row in result.artifact.summary["trials"]
    ]
    if trials:
        _print_trials(trials)
    if "variants" in numbers:
        print_comparison(numbers)
    elif numbers:
        print(
            f"\n{request.config.evaluate.split} top-1 {numbers['top1']:.1%}, top-5 {numbers['top5']:.1%}, "
            f"mean class accuracy {numbers['mean_class_accuracy']:.1%}"
        )
    if outcome.card:
        print_card(outcome.card)
    pages = [result.artifact for result in outcome.stages if result.name in ("report", "compare") and result.artifact]
    for page in pages:
        print(f"report:    {page.path / 'index.html'}")
    print(f"MLflow:    {_where_runs_are(request.workdir, outcome.mlflow_path)}")
    if request.comparison is None:
        more = f"search.num_trials={request.config.search.num_trials + 4}"
    else:
        more = f"seeds={json.dumps([*request.comparison.seeds, max(request.comparison.seeds) + 1], separators=(',', ':'))}"
    others = [assignment for assignment in set_ or [] if assignment.partition("=")[0] != more.partition("=")[0]]
    print(f"next:      {_command(request.experiment, [*others, more], None, request.workdir, request.address)}")


def _where_runs_are(workdir: Path, page: str | None) -> str:
    """The address of the pipeline's run, and unless a server shows it, what does; `page` is None if nothing ran."""
    from infra.tracking import tracking_uri

    page = (page or "").lstrip("/")
    uri = tracking_uri(workdir)
    if uri.startswith(("http://", "https://")):
        return f"{uri.rstrip('/')}/{page}"
    ui = "sagsm ui" if workdir == Path("work").absolute() else f"sagsm ui --workdir {workdir}"
    return f"{ui}   then http://127.0.0.1:5000/{page}" if page else ui


def _print_trials(rows: list[dict[str, Any]]) -> None:
    from tuning.leaderboard import leaderboard_table

    header, cells = leaderboard_table(rows[:_TRIALS_SHOWN])
    print()
    print_table(header, cells, numbers_from=3)
    if len(rows) > _TRIALS_SHOWN:
        print(f"the best {_TRIALS_SHOWN} of {len(rows)} trials; all are on the page of the search")


@app.command()
def experiments(as_json: JsonOption = False) -> None:
    """List the experiments, and what each reproduces or shows."""
    from pipelines.experiments import EXPERIMENTS

    described = {name: " ".join((function.__doc__ or "").split("\n\n")[0].split()) for name, function in EXPERIMENTS.items()}
    if as_json:
        print_json({"experiments": [{"name": name, "description": text} for name, text in described.items()]})
        return
    print_table(("experiment", "what it does"), list(described.items()))
    print("next: sagsm plan NAME")


@app.command()
def models(as_json: JsonOption = False) -> None:
    """List the networks (174 classes, 8 segments): parameters, GMACs a clip, maps of attention, published top-1 (%)."""
    from models import describe_model, list_models

    facts = {name: describe_model(name, num_classes=174, num_segments=8) for name in list_models()}
    if as_json:
        print_json({"models": [{"name": name, **fact._asdict()} for name, fact in facts.items()]})
        return
    rows: list[tuple[str, ...]] = [
        (
            name,
            f"{fact.parameters:,}",
            f"{fact.macs_per_clip / 1e9:.1f}",
            f"{fact.attention_map_bytes / 2**20:.1f}" if fact.attention_map_bytes else "",
            "" if fact.published_top1 is None else f"{100 * fact.published_top1:.2f}",
            fact.source,
        )
        for name, fact in facts.items()
    ]
    print_table(("network", "parameters", "GMACs", "maps, MiB", "top-1", "source of the top-1"), rows)


@app.command()
def ui(
    workdir: WorkdirOption = Path("work"),
    host: Annotated[
        str, typer.Option(help="Address to listen on; anything but loopback shows your runs to the network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 5000,
) -> None:
    """Open MLflow on the runs of a work directory, and print the link to the runs page. Ctrl-C ends it."""
    from infra.tracking import tracking_uri
    from infra.ui_server import serve_ui

    serve_ui(tracking_uri(workdir.absolute()), workdir.absolute() / "mlflow-artifacts", host, port)


def _forecast(request: Any, wanted: bool, cpus: list[int] | None) -> tuple[dict[str, Any], str] | None:
    """The forecast as plain data and as text, for this machine's CPUs and those asked for; None if none is wanted."""
    from infra.errors import ConfigError

    if not wanted:
        if cpus:
            raise ConfigError("--cpus says what to forecast for; expected it together with --estimate")
        return None
    from infra.progress import StageProgress
    from pipelines.estimate import estimate_shards, machine_cpus
    from pipelines.forecast import estimate_document, estimate_text

    with StageProgress() as progress:
        found = estimate_shards(request, on_progress=progress.for_stage("estimate"))
    numbers = sorted({machine_cpus(), *(cpus or [])})
    return estimate_document(found, numbers), estimate_text(found, numbers)


def _command(experiment: str, set_: list[str] | None, only: str | None, workdir: Path, address: str | None) -> str:
    import shlex

    parts = ["sagsm", "run", experiment]
    for assignment in set_ or []:
        parts += ["--set", assignment]
    if only:
        parts += ["--only", only]
    if workdir != Path("work") and workdir != Path("work").absolute():
        parts += ["--workdir", str(workdir)]
    if address:
        parts += ["--address", address]
    return shlex.join(parts)
