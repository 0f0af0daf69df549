"""`hf-rskip push`."""

import argparse

from ..hub.push import push_folder


def push(args: argparse.Namespace) -> None:
    """Pushes a model folder, and prints where it is now."""
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
