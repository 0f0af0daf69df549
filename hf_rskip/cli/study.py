"""`hf-rskip study`."""

import argparse

from ..errors import UserError
from ..studies.running import check_folders, describe_state, run_cells, start_server
from ..studies.study import read_study


def study(args: argparse.Namespace, rest: list[str]) -> None:
    """Runs the cells of a study and reports them; `rest` are keys of the recipe for all cells."""
    runs = not (args.list or args.report)
    if runs:
        start_server(args.jobs)
    study = read_study(args.study, rest, args.output_dir)
    check_folders(study.cells)
    cells = study.cells
    if args.cell is not None:
        if args.cell > len(cells):
            raise UserError(f"--cell {args.cell}: the study has {len(cells)} cells.")
        cells = [cells[args.cell - 1]]
    if args.list:
        words = [f"--output_dir {args.output_dir}"] * bool(args.output_dir) + rest
        for cell in cells:
            command = " ".join(["hf-rskip study", args.study, f"--cell {cell.number}", *words])
            print(f"{cell.number}\t{describe_state(cell)}\t{cell}\t{command}")
        return
    try:
        if runs:
            run_cells(cells, len(study.cells), args.jobs, args.import_module, study.keep_models)
    finally:
        if args.cell is None:
            pass
