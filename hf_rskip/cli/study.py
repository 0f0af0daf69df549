"""`hf-rskip study`."""

import argparse
import shlex
import sys

from ..errors import UserError
from ..studies.cell import is_done
from ..studies.evidence import restore_cells, write_evidence
from ..studies.report import format_tables, write_report
from ..studies.results import gather_results
from ..studies.running import check_folders, describe_state, run_cells
from ..studies.study import Cell, check_skip_types, read_study


def study(args: argparse.Namespace, rest: list[str]) -> None:
    """Runs the cells of a study and reports them; `rest` are keys of the recipe for all cells.

    Where cells have failed, it ends with exit code 1.
    """
    study = read_study(args.study, rest, args.output_dir)
    restore_cells(study)
    check_folders(study.cells)
    words = ["hf-rskip", "study", args.study]
    words += [f"--output_dir={args.output_dir}"] * bool(args.output_dir)
    words += [f"--import_module={module}" for module in args.import_module]
    if args.list:
        for cell in study.cells:
            command = shlex.join([*words, f"--cell={cell.number}", *rest])
            print(f"{cell.number}\t{describe_state(cell)}\t{cell}\t{command}")
        return
    cells = study.cells
    if args.cell is not None:
        if args.cell > len(cells):
            raise UserError(f"--cell {args.cell}: the study has {len(cells)} cells.")
        cells = [cells[args.cell - 1]]
    failed = []
    if not args.report:
        check_skip_types([cell for cell in cells if not is_done(cell)])
        _say_plan(cells, len(study.cells), args.jobs, str(study.output_dir))
        failed = run_cells(cells, len(study.cells), args.jobs, args.import_module, study.keep_models)
    if args.cell is None:
        results = gather_results(study)
        write_report(results, shlex.join([*words, *rest]))
        write_evidence(study)
        print(
            f"\n{format_tables(results, every_setting=False)}\n\nreport: {study.output_dir / 'report.md'}", flush=True
        )
    if failed:
        names = "; ".join(f"{cell} ({describe_state(cell)})" for cell in failed)
        print(f"hf-rskip: error: {len(failed)} of {len(study.cells)} cells failed: {names}", file=sys.stderr)
        sys.exit(1)


def _say_plan(cells: list[Cell], total: int, jobs: int, folder: str) -> None:
    if len(cells) == 1 and is_done(cells[0]):
        print(f"[{cells[0].number} of {total}] {cells[0]}: done before ({describe_state(cells[0])})", flush=True)
        return
    done = sum(map(is_done, cells))
    which = f"{total} cells" if len(cells) == total else f"{len(cells)} of {total} cells"
    print(f"{which}: {done} done before, {len(cells) - done} to run, {jobs} at a time; results in {folder}", flush=True)
