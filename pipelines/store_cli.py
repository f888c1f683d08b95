"""`sagsm store list | gc | backup | restore`: what the work directory holds, what of it goes, and a copy elsewhere."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.errors import DataError
from pipelines.printing import megabytes, print_json, print_table, system_errors_explained

store_app = typer.Typer(
    help="List what a work directory holds, remove what is not wanted any more, and back it up.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

WorkdirOption = Annotated[Path, typer.Option("--workdir", metavar="DIR", help="Holds the store and the embedded MLflow.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]

_SHOWN = 5
_AGES = (("d", 86_400), ("h", 3_600), ("min", 60))


@store_app.command("list")
def store_list(workdir: WorkdirOption = Path("work"), as_json: JsonOption = False) -> None:
    """List artifacts and unfinished work: size, age, which experiments they are of, what needs them, whether they are whole.

    Also what killed programs have left, and where shard sets and copies of checkpoints outside the store are. Asks no network.

    Example: sagsm store list
    """
    from pipelines.artifacts import Store
    from pipelines.leases import leased
    from pipelines.store_inventory import take_inventory

    store = Store(workdir.absolute() / "store")
    with system_errors_explained():
        found = take_inventory(store, leased(store.root))
    experiments, needed_by = found.experiments(), found.needed_by()
    if as_json:
        items = [
            {
                **_item(item),
                "experiments": experiments[item.key],
                "needed_by": [[later.stage, later.fingerprint] for later in needed_by.get(item.key, [])],
            }
            for item in found.items
        ]
        leftovers = [_leftover(leftover) for leftover in found.leftovers]
        print_json({"artifacts": items, "leftovers": leftovers, "unknown": [str(path) for path in found.unknown]})
        return
    rows = [
        (
            item.stage,
            item.fingerprint,
            megabytes(item.num_bytes),
            _age(item.modified),
            ", ".join(experiments[item.key]) + (f" ({item.variant})" if item.variant else ""),
            (item.mlflow_run_id or "-")[:8],
            ", ".join(dict.fromkeys(later.stage for later in needed_by.get(item.key, []))) or "-",
            item.state,
        )
        for item in found.items
    ]
    print_table(("stage", "fingerprint", "size", "age", "experiment", "MLflow run", "needed by", "state"), rows)
    for item in found.items:
        for url in item.outside:
            print(f"{item.stage} {item.fingerprint} has more at {url}")
    _print_leftovers(found.leftovers, "left by killed programs; `sagsm store gc --yes` removes")
    for path in found.unknown:
        print(f"not of the store, and left alone: {path}")
    print(f"{len(found.items)} in {store.root}, {megabytes(found.num_bytes)}")


@store_app.command("gc")
def store_gc(
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", metavar="NAME", help="An experiment, a fingerprint or an MLflow run id; may be repeated."),
    ] = None,
    keep_last: Annotated[
        int | None,
        typer.Option("--keep-last", metavar="N", min=1, help="Of each stage the newest N of each experiment and variant."),
    ] = None,
    keep_days: Annotated[
        float | None, typer.Option("--keep-days", metavar="D", min=0, help="What was finished or worked on in the last D days.")
    ] = None,
    outside: Annotated[
        bool,
        typer.Option("--outside", help="Also their shard sets and checkpoints elsewhere, which other stores may use."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; otherwise only say what would be done.")] = False,
    workdir: WorkdirOption = Path("work"),
    as_json: JsonOption = False,
) -> None:
    """Remove from the store what none of the --keep options keeps; without --yes, say what that would be.

    What is kept is kept with everything it was made from, and what a run uses right now stays in any case. Without --keep
    options only what killed programs have left goes. MLflow's runs stay.

    Example: sagsm store gc --keep-last 1 --keep something_v1
    """
    from pipelines.store_gc import Keep, collect, plan_gc

    wanted = Keep(tuple(keep or ()), keep_last, keep_days)
    with system_errors_explained():
        chosen = collect(workdir.absolute(), wanted, outside=outside) if yes else plan_gc(workdir.absolute(), wanted)
    if as_json:
        removed, kept = ([_item(item) for item in items] for items in (chosen.removed, chosen.kept))
        leftovers = [_leftover(leftover) for leftover in chosen.leftovers]
        about = {"done": yes, "bytes": chosen.num_bytes, "outside": list(chosen.outside)}
        print_json({**about, "removed": removed, "leftovers": leftovers, "kept": kept})
        return
    would = "removed" if yes else "would be removed"
    if chosen.removed:
        rows = [(item.stage, item.fingerprint, megabytes(item.num_bytes), _age(item.modified), item.experiment, item.state)
                for item in chosen.removed]  # fmt: skip
        print_table((would, "fingerprint", "size", "age", "experiment", "state"), rows)
    _print_leftovers(chosen.leftovers, would)
    for url in chosen.outside:
        print(f"{would if outside else 'not touched without --outside'}: {url}")
    num_removed = len(chosen.removed) + len(chosen.leftovers)
    print(f"{num_removed} {would}, {megabytes(chosen.num_bytes)}; {len(chosen.kept)} kept")
    if not yes and num_removed:
        print("next: the same command with --yes")


@store_app.command("backup")
def store_backup(
    place: Annotated[str, typer.Argument(metavar="DEST", help="A folder, best on another disk, or s3://BUCKET/PREFIX.")],
    workdir: WorkdirOption = Path("work"),
    as_json: JsonOption = False,
) -> None:
    """Copy finished artifacts and the embedded MLflow to DEST, while others may work; a second time only what is new.

    Not copied are raw videos, unfinished work, and shard sets and checkpoints that lie elsewhere. Of an MLflow server, back up
    its database and its files by their own means.

    Example: sagsm store backup /mnt/backup/sagsm
    """
    from infra.filesystems import Folder
    from infra.progress import StageProgress
    from pipelines.store_backup import back_up

    with system_errors_explained(), StageProgress() as progress:
        found = back_up(workdir.absolute(), Folder(place), progress.for_stage("backup"))
    _print_backup(found, place, f"sagsm store restore {place} --workdir NEW", as_json)


@store_app.command("restore")
def store_restore(
    place: Annotated[str, typer.Argument(metavar="SOURCE", help="Where `sagsm store backup` has written.")],
    workdir: WorkdirOption = Path("work"),
    as_json: JsonOption = False,
) -> None:
    """Bring a backup into a new work directory, which may have another path than the old one; interrupted, it goes on.

    Every file of the store is compared with its hash. Runs that were at work when the backup was made end as KILLED.

    Example: sagsm store restore /mnt/backup/sagsm --workdir work
    """
    from infra.filesystems import Folder
    from infra.progress import StageProgress
    from pipelines.store_backup import restore

    with system_errors_explained(), StageProgress() as progress:
        found = restore(Folder(place), workdir.absolute(), progress.for_stage("restore"))
    _print_backup(found, str(workdir), f"sagsm plan NAME --workdir {workdir}", as_json)


def _print_backup(found: Any, place: str, following: str, as_json: bool) -> None:
    if as_json:
        print_json({**vars(found), "place": place})
    else:
        runs = "no embedded MLflow" if found.num_runs is None else f"{found.num_runs:,} MLflow runs"
        print(
            f"{place}: {found.num_artifacts:,} artifacts, {found.num_copied:,} of them copied now, and {runs}; "
            f"{megabytes(found.num_bytes)} copied"
        )
        if found.unfinished:
            print(f"left out, since they are not finished: {_some(found.unfinished)}")
        if found.outside:
            print(f"not copied, since it lies elsewhere: {_some(found.outside)}")
        print(f"next: {following}")
    if found.damaged:
        raise DataError(f"{len(found.damaged)} artifacts are damaged and were left out: {_some(found.damaged)}; run them again")


def _item(item: Any) -> dict[str, Any]:
    return {
        "stage": item.stage,
        "fingerprint": item.fingerprint,
        "state": item.state,
        "is_finished": item.is_finished,
        "is_whole": item.is_finished and not item.problem,
        "in_use_by": item.used_by or None,
        "bytes": item.num_bytes,
        "modified": datetime.fromtimestamp(item.modified, UTC).isoformat(timespec="seconds"),
        "experiment": item.experiment or None,
        "variant": item.variant or None,
        "mlflow_run_id": item.mlflow_run_id,
        "inputs": [list(key) for key in item.inputs],
        "outside": list(item.outside),
        "path": str(item.path),
    }


def _leftover(leftover: Any) -> dict[str, Any]:
    return {"path": str(leftover.path), "what": leftover.what, "bytes": leftover.num_bytes}


def _print_leftovers(leftovers: Sequence[Any], would: str) -> None:
    for leftover in leftovers:
        print(f"{would}: {leftover.path}, {leftover.what} ({megabytes(leftover.num_bytes)})")


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:_SHOWN]) + (f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else "")


def _age(modified: float) -> str:
    seconds = max(0.0, time.time() - modified)
    return next((f"{seconds / size:.0f} {unit}" for unit, size in _AGES if seconds >= size), f"{seconds:.0f} s")
