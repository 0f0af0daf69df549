"""Pushes checkpoints while a model is trained, by `push_to_hub: true`."""

import shutil
import tempfile
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import HfApi
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import logging

from .push import collect_files, upload

logger = logging.get_logger(__name__)


class PushCheckpoints(TrainerCallback):
    """Pushes each checkpoint in the background, as `hf-rskip push` would.

    The Trainer's own uploads contain pickles of its arguments, optimizer, schedule and random states, and another card.
    Checkpoints pushed by `hub_strategy` `checkpoint` and `all_checkpoints` can therefore be used, but not resumed from.

    Args:
        repo_id: of the repository on the Hub.
    """

    def __init__(self, repo_id: str):
        self.repo_id = repo_id
        self._jobs: list[Future] = []

    def on_save(self, args, state, control, **kwargs):
        if not state.is_world_process_zero or args.hub_strategy == HubStrategy.END:
            return
        self._jobs = [job for job in self._jobs if not job.done()]
        if self._jobs and not args.hub_always_push:
            return
        checkpoint = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        # Hard links, as the checkpoint may be removed before it is sent.
        snapshot = tempfile.TemporaryDirectory(prefix=".push-", dir=args.output_dir)
        files = {name: _link(path, Path(snapshot.name, name)) for name, path in collect_files(checkpoint).items()}
        subfolders = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        if subfolder := subfolders.get(args.hub_strategy):
            files |= {f"{subfolder}/{name}": path for name, path in files.items()}
        job = start_upload(args, self.repo_id, files, f"Training in progress, step {state.global_step}")
        job.add_done_callback(_warn_of_failure)
        job.add_done_callback(lambda job: snapshot.cleanup())
        self._jobs.append(job)

    def on_train_end(self, args, state, control, **kwargs):
        for job in self._jobs:
            job.exception()  # waits for the job


def start_upload(
    args: TrainingArguments,
    repo_id: str,
    files: dict[str, Path],
    commit_message: str,
    token: str | None = None,
    revision: str | None = None,
) -> Future:
    """Uploads files in the background, with the `hub_...` values of `args` unless others are given.

    Returns:
        A future of a [`~hf_rskip.hub.push.Pushed`]; raises a [`UserError`] if the upload fails.
    """
    return HfApi().run_as_future(
        upload,
        files,
        repo_id,
        private=args.hub_private_repo,
        revision=revision or args.hub_revision,
        overwrite_card=False,
        token=token or args.hub_token,
        commit_message=commit_message,
    )


def _link(source: Path, target: Path) -> Path:
    try:
        target.hardlink_to(source)
    except OSError:  # the file system has no hard links
        shutil.copy(source, target)
    return target


def _warn_of_failure(job: Future) -> None:
    if job.exception():
        logger.warning(f"{job.exception()}; training goes on")
