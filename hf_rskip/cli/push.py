"""`hf-rskip push`."""

import argparse
import tempfile
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a trained model")
    parser.add_argument("repo_id", metavar="REPO_ID", help="`user/name`; created if there is none")
    parser.add_argument(
        "--with-code", "--with_code", action="store_true", help="so that it loads where hf_rskip is not installed"
    )
    parser.add_argument(
        "--with-onnx", "--with_onnx", action="store_true", help="graphs and a page for transformers.js, too"
    )
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--revision", metavar="BRANCH", help="created if there is none (default: the main one)")
    parser.add_argument("--overwrite_card", action="store_true", help="replace an existing README.md on the Hub")


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """Pushes a model folder, and prints where it is now."""
    from ..hub.push import CARD_NAME, push_folder

    with tempfile.TemporaryDirectory() as folder:
        pushed = push_folder(
            args.model,
            args.repo_id,
            with_code=args.with_code,
            graphs=_export(args.model, Path(folder)) if args.with_onnx else {},
            private=args.private or None,
            revision=args.revision,
            overwrite_card=args.overwrite_card,
        )
    print(pushed.commit_url if pushed.changed else f"Nothing has changed since {pushed.commit_url}")
    if not Path(args.model, CARD_NAME).is_file():
        print(f"{args.model} has no README.md: no model card was sent, and one that is on the Hub stays as it is.")
    if pushed.kept_card:
        print("The README.md on the Hub was kept; --overwrite_card replaces it.")
    if pushed.old_graphs:
        print("The graphs on the Hub are of an earlier push; --with-onnx replaces them.")


def _export(name: str, folder: Path) -> dict[str, Path]:
    """Graphs and page of an export for transformers.js, by their path in a repository that has the model's files."""
    from ..conversion.transformers_js import PAGE_NAME, export_transformers_js
    from ..decoding.loading import load_model
    from ..hub.push import collect_files

    collect_files(name)  # raises before the export, which takes long
    model, tokenizer = load_model(name)
    export_transformers_js(model.cpu().float(), tokenizer, folder)
    return {path.relative_to(folder).as_posix(): path for path in [*folder.glob("onnx/*"), folder / PAGE_NAME]}
