"""Pushes checkpoints while a model is trained, by `push_to_hub: true`."""

import shutil
import tempfile
from concurrent.futures import Future, wait
from itertools import chain
from pathlib import Path

from huggingface_hub import HfApi
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import logging

from ..errors import first_line
from ..manifest import MANIFEST_NAME
from .push import PUSHED_FILES, collect_files, upload

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
        snapshot = tempfile.TemporaryDirectory(prefix=f".push-{checkpoint.name}-", dir=args.output_dir)
        for path in chain.from_iterable(map(checkpoint.glob, (*PUSHED_FILES, MANIFEST_NAME))):
            _link(path, Path(snapshot.name, path.name))
        self._jobs.append(HfApi().run_as_future(self._push, args, checkpoint.name, snapshot))

    def _push(self, args: TrainingArguments, checkpoint: str, snapshot: tempfile.TemporaryDirectory) -> None:
        subfolders = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint}
        try:
            with snapshot as folder:
                files = collect_files(folder)
                if subfolder := subfolders.get(args.hub_strategy):
                    files |= {f"{subfolder}/{name}": path for name, path in files.items()}
                upload(
                    files,
                    self.repo_id,
                    private=args.hub_private_repo,
                    revision=args.hub_revision,
                    token=args.hub_token,
                    commit_message=f"Training in progress, step {checkpoint.rpartition('-')[2]}",
                )
        except Exception as error:
            logger.warning(f"{first_line(error)}; training goes on")

    def on_train_end(self, args, state, control, **kwargs):
        wait(self._jobs)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # the file system has no hard links
        shutil.copy(source, target)
