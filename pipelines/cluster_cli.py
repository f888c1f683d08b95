"""`sagsm cluster check`: what each node of a cluster has, and what of that would break a run."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.printing import print_json, print_table

cluster_app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Look at a Ray cluster before work is sent to it.")

_MACHINE_HEADER = ("node", "CPUs", "GPUs", "memory GB", "free GB", "clock", "store", "raw videos", "MLflow", "ffmpeg")
_SOFTWARE_HEADER = ("node", "Python", "our code")


SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change a setting of the experiment; may be repeated."),
]


@cluster_app.callback()
def cluster() -> None:
    """Look at a Ray cluster before work is sent to it."""


@cluster_app.command()
def check(
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="ADDR", help="A running Ray cluster, host:port; otherwise this machine is checked."),
    ] = None,
    experiment: Annotated[
        str | None,
        typer.Option("--experiment", metavar="NAME", help="Look at its raw videos and the folders that it names as well."),
    ] = None,
    set_: SetOption = None,
    workdir: Annotated[
        Path, typer.Option("--workdir", metavar="DIR", help="Holds the store, which all nodes must see under the same path.")
    ] = Path("work"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
) -> None:
    """Start a process on every node and compare it with this one; says what differs, and how to mend it.

    Looked at: Python, packages, our code, ffmpeg, the store, raw videos, MLflow, clock, free disk. Exit code 2 if something
    would break a run, else 0. `sagsm run --address` does the same before it starts, but does not ask the nodes for MLflow.

    Example: sagsm cluster check --address 10.0.0.1:6379 --workdir /shared/work --experiment diving48 --set dataset.root=/data
    """
    from infra import cluster
    from infra.cluster_check import check_nodes
    from infra.errors import ConfigError
    from pipelines.node_needs import node_needs
    from pipelines.run import make_request

    if set_ and experiment is None:
        raise ConfigError("--set changes a setting of an experiment; expected it together with --experiment")
    config = None if experiment is None else make_request(experiment, set_ or [], workdir).config
    with cluster.session(address):
        nodes = check_nodes(node_needs(config, workdir.absolute()))
    broken = [finding for node in nodes for finding in node.findings if finding.breaks]
    if as_json:
        print_json(_document(address, nodes, fit=not broken))
    else:
        _print(nodes)
    if broken:
        raise typer.Exit(2)


def _document(address: str | None, nodes: Sequence[Any], *, fit: bool) -> dict[str, Any]:
    rows = []
    for node in nodes:
        facts = None if node.facts is None else {name: value for name, value in node.facts.items() if name != "sources"}
        clock = None if node.clock is None else {"ahead_seconds": node.clock.ahead, "error_seconds": node.clock.error}
        findings = [{"check": item.check, "breaks": item.breaks, "text": item.text} for item in node.findings]
        rows.append(
            {"name": node.name, "resources": dict(node.resources), "facts": facts, "clock": clock, "findings": findings}
        )
    return {"address": address, "fit": fit, "nodes": rows}


def _print(nodes: Sequence[Any]) -> None:
    from infra.cluster_findings import DISTRIBUTIONS

    print_table(_MACHINE_HEADER, [_machine_row(node) for node in nodes])
    print()
    print_table((*_SOFTWARE_HEADER, *DISTRIBUTIONS), [_software_row(node) for node in nodes])
    findings = [finding for node in nodes for finding in node.findings]
    print()
    for finding in sorted(findings, key=lambda finding: not finding.breaks):
        print(f"{'BREAKS' if finding.breaks else 'note  '}  {finding}")
    num_broken = sum(finding.breaks for finding in findings)
    if num_broken:
        print(f"{num_broken} of these would break a run; mend them and check again", file=sys.stderr)
    else:
        print("fit: nothing found that would break a run" if findings else "fit: nothing found")


def _machine_row(node: Any) -> tuple[str, ...]:
    facts = node.facts
    given = [f"{node.resources.get(name, 0):g}" if node.resources else "" for name in ("CPU", "GPU")]
    memory = f"{node.resources.get('memory', 0) / 1e9:.1f}" if node.resources else ""
    if facts is None:
        return (node.name, *given, memory, "", "", "no answer", "", "", "")
    free = min((free for free, _ in facts["disks"].values()), default=0)
    clock = "" if node.clock is None else f"{node.clock.ahead:+.3f} s"
    raw = "" if facts["raw"] is None else _yes(not facts["raw"])
    mlflow = "" if facts["tracking"] is None else _yes(not facts["tracking"])
    store = _yes(not any(facts["folders"].values()))
    return (node.name, *given, memory, f"{free / 1e9:.1f}", clock, store, raw, mlflow, facts["ffmpeg"][0] or "missing")


def _software_row(node: Any) -> tuple[str, ...]:
    if node.facts is None:
        return (node.name, "no answer")
    code = "other" if any(finding.check == "code" for finding in node.findings) else "the same"
    return (node.name, node.facts["python"], code, *(version or "-" for version in node.facts["versions"].values()))


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "NO"
