"""`hf-rskip push`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a trained model")
    parser.add_argument("repo_id", metavar="REPO_ID", help="`user/name`; created if there is none")
    parser.add_argument("--with-code", action="store_true", help="so that it loads where hf_rskip is not installed")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--revision", metavar="BRANCH", help="created if there is none (default: the main one)")
    parser.add_argument("--overwrite_card", action="store_true", help="replace an existing README.md on the Hub")


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """Pushes a model folder, and prints where it is now."""
    from ..hub.push import push_folder

    pushed = push_folder(
        args.model,
        args.repo_id,
        with_code=args.with_code,
        private=args.private or None,
        revision=args.revision,
        overwrite_card=args.overwrite_card,
    )
    print(pushed.commit_url if pushed.changed else f"Nothing has changed since {pushed.commit_url}")
    if pushed.kept_card:
        print("The README.md on the Hub was kept; --overwrite_card replaces it.")
