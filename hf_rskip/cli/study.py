"""`hf-rskip study`."""

import argparse
import shlex
import sys

from ..errors import UserError
from .files import create_folder
from .options import count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", metavar="STUDY.yaml", help="recipe, forms, seeds, grid or tune, output_dir, ...")
    parser.add_argument("--jobs", type=count, default=1, metavar="N", help="cells at once (default: 1)")
    parser.add_argument("--output_dir", help="in place of that of the file")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--cell", type=count, metavar="N", help="run this cell alone, and report nothing")
    action.add_argument("--list", action="store_true", help="print number, state and command of every cell")
    action.add_argument("--report", action="store_true", help="run nothing: report what is there")
    parser.usage = "hf-rskip study STUDY.yaml [--jobs N | --cell N | --list | --report] [--key value ...]"
    parser.epilog = (
        "Other keys override those of the recipe in all cells, and are to be the same at every start. What has been "
        "run is not run again. On a cluster, give "
        "each cell to a job of its own, `sbatch --array=1-60 --wrap 'hf-rskip study STUDY.yaml --cell "
        "$SLURM_ARRAY_TASK_ID'`, or `seq 60 | xargs -P 4 -I{} hf-rskip study STUDY.yaml --cell {}`, and gather by "
        "`hf-rskip study STUDY.yaml --report`."
    )


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """Runs the cells of a study and reports them; `rest` are keys of the recipe for all cells.

    Where cells have failed, it ends with exit code 1.
    """
    from ..studies.cell import is_done
    from ..studies.evidence import write_evidence
    from ..studies.report import format_tables, write_report
    from ..studies.results import gather_results
    from ..studies.running import check_recorded, describe_state, run_cells
    from ..studies.study import check_cells, read_study
    from ..studies.tuning import advance

    beginning = read_study(args.study, rest, args.output_dir)
    if not args.list:
        create_folder(str(beginning.output_dir / "cells"))
    study = advance(beginning)
    check_recorded(study.cells)
    words = ["hf-rskip", "study", args.study]
    words += [f"--output_dir={args.output_dir}"] * bool(args.output_dir)
    words += [f"--import_module={module}" for module in args.import_module]
    if args.list:
        for cell in study.cells:
            command = shlex.join([*words, f"--cell={cell.number}", *rest])
            print(f"{cell.number}\t{describe_state(cell)}\t{cell}\t{command}")
        if study.is_growing:
            print("Further cells are known when these are done.", file=sys.stderr)
        return
    cells = study.cells
    if args.cell is not None:
        if args.cell > len(cells):
            known = " so far: those that follow from them are known when they are done" * study.is_growing
            raise UserError(f"--cell {args.cell}: the study has {len(cells)} cells{known}.")
        cells = [cells[args.cell - 1]]
    failed, grows = [], not args.report
    while grows:
        check_cells([cell for cell in cells if not is_done(cell)])
        print(_describe_plan(cells, len(study.cells), args.jobs, str(study.output_dir)), flush=True)
        failed = run_cells(cells, len(study.cells), args.jobs, args.import_module, study.keep_models)
        before, study = len(study.cells), study if args.cell else advance(beginning)
        cells, grows = study.cells, len(study.cells) > before
        check_recorded(cells)  # some may be those of another process, too
    if args.cell is None:
        results = gather_results(study)
        write_report(results, shlex.join([*words, *rest]), args.import_module)
        write_evidence(study)
        print(f"\n{format_tables(results)}\n\nreport: {study.output_dir / 'report.md'}", flush=True)
    if failed:
        names = "; ".join(f"{cell} ({describe_state(cell)})" for cell in failed)
        print(f"hf-rskip: error: {len(failed)} of {len(study.cells)} cells failed: {names}", file=sys.stderr)
        sys.exit(1)


def _describe_plan(cells: list, total: int, jobs: int, folder: str) -> str:
    from ..studies.cell import is_done
    from ..studies.running import describe_state

    if len(cells) == 1 and is_done(cells[0]):
        return f"[{cells[0].number} of {total}] {cells[0]}: done before ({describe_state(cells[0])})"
    done = sum(map(is_done, cells))
    which = f"{total} cells" if len(cells) == total else f"{len(cells)} of {total} cells"
    return f"{which}: {done} done before, {len(cells) - done} to run, {jobs} at a time; results in {folder}"
