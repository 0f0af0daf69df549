"""How a Trainer pushes: what `hf-rskip push` would send, and nothing else."""

import shutil
import tempfile
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress, logging

from .push import Pushed, collect_files, upload

logger = logging.get_logger(__name__)


class HubTrainerMixin:
    """For a Trainer that pushes by `push_to_hub: true`: the Trainer's own uploads contain pickles of its arguments,
    optimizer, schedule and random states, and a card of its own.

    Checkpoints pushed by `hub_strategy` `checkpoint` and `all_checkpoints` can therefore be used, but not resumed from.
    """

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs,
    ) -> Pushed | Future | None:
        """Pushes what is in `output_dir`, after saving the model there.

        Returns:
            On the main process, what was done, or with `blocking=False` a future of it.

        Raises:
            [`UserError`]: if the upload fails.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        job = self._upload(collect_files(self.args.output_dir), commit_message, token=token, revision=revision)
        return job.result() if blocking else job

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # From links, as the Trainer may remove the checkpoint before it has been sent.
        snapshot = tempfile.TemporaryDirectory(prefix=".push-", dir=self.args.output_dir)
        files = {
            name: _link(path, Path(snapshot.name, name)) for name, path in collect_files(checkpoint_folder).items()
        }
        subfolder = {
            HubStrategy.CHECKPOINT: "last-checkpoint",
            HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name,
        }.get(self.args.hub_strategy)
        if subfolder:
            files |= {f"{subfolder}/{name}": path for name, path in files.items()}
        job = self._upload(files, f"Training in progress, step {self.state.global_step}")
        job.add_done_callback(_warn_of_failure)
        job.add_done_callback(lambda job: snapshot.cleanup())
        jobs = [] if self.push_in_progress is None else self.push_in_progress.jobs
        self.push_in_progress = PushInProgress([*(job for job in jobs if not job.done()), job])

    def _upload(self, files: dict[str, Path], commit_message: str, token=None, revision=None) -> Future:
        return HfApi().run_as_future(
            upload,
            files,
            self.hub_model_id,
            private=self.args.hub_private_repo,
            revision=revision or self.args.hub_revision,
            overwrite_card=False,
            token=token or self.args.hub_token,
            commit_message=commit_message,
        )


def _link(source: Path, target: Path) -> Path:
    try:
        target.hardlink_to(source)
    except OSError:  # of a file system without hard links
        shutil.copy(source, target)
    return target


def _warn_of_failure(job: Future) -> None:
    if job.exception():
        logger.warning(f"{job.exception()}; training goes on")
