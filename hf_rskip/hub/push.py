"""Sends a model folder to the Hub: in one commit, without pickles, and again only what has changed."""

import fnmatch
import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from transformers import AutoConfig
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from ..errors import UserError, first_line
from ..manifest import MODEL_FILES, check_model, read_json
from ..models import RSkipConfig, RSkipResNetConfig
from .remote_code import find_code
from .training_curve import CURVE_NAME

CARD_NAME = "README.md"

_COMPANIONS = {
    RSkipConfig.model_type: (GENERATION_CONFIG_NAME, "tokenizer_config.json"),
    RSkipResNetConfig.model_type: (IMAGE_PROCESSOR_NAME,),
}
RESULT_FILES = (CARD_NAME, CURVE_NAME, "all_results.json", "trainer_state.json")
PUSHED_FILES = (*MODEL_FILES, *RESULT_FILES)
"""Patterns of the names of the files that are sent."""


class Pushed(NamedTuple):
    """Result of a push."""

    commit_url: str
    changed: bool
    """Whether there was anything to send."""
    kept_card: bool
    """Whether the card on the Hub was left as it is."""
    old_graphs: bool
    """Whether there are graphs of an earlier push on the Hub."""


def collect_files(folder: str | Path) -> dict[str, Path]:
    """The files of a complete model folder that belong on the Hub, by their name there.

    Raises:
        [`UserError`]: if the folder is no complete model: a configuration, safetensors weights with all their shards,
            and what a model of its kind needs beside them: a tokenizer and a generation configuration, or an image
            processor; or if one of them is not as it was written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no model folder {str(folder)!r}")
    weights = {SAFE_WEIGHTS_NAME}
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        weight_map = read_json(folder / SAFE_WEIGHTS_INDEX_NAME).get("weight_map")
        if not weight_map or not isinstance(weight_map, dict):
            raise UserError(f"{str(folder / SAFE_WEIGHTS_INDEX_NAME)!r} is damaged: it names no weights")
        weights = set(weight_map.values())
    required = {CONFIG_NAME, *weights}
    if (folder / CONFIG_NAME).is_file():
        model_type = read_json(folder / CONFIG_NAME).get("model_type")
        required |= set(_COMPANIONS.get(model_type, _COMPANIONS[RSkipConfig.model_type]))
    missing = sorted(name for name in required if not (folder / name).is_file())
    if any(not name.endswith(".safetensors") for name in weights):
        raise UserError(f"{str(folder)!r} has weights that are not safetensors")
    if missing:
        raise UserError(f"{str(folder)!r} is not a complete model: it has no {', '.join(missing)}")
    check_model(folder)
    # Other files, such as training_args.bin, optimizer, scheduler and random states, are pickles and are not sent.
    paths = sorted(path for pattern in PUSHED_FILES for path in folder.glob(pattern))
    return {path.name: path for path in paths if path.suffix != ".safetensors" or path.name in weights}


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    with_code: bool = False,
    graphs: Mapping[str, Path] = MappingProxyType({}),
    **options,
) -> Pushed:
    """Pushes a model folder to a repository of the Hub, which is created if there is none.

    Args:
        folder: what `hf-rskip train` or `save_pretrained` of model and tokenizer left.
        repo_id: `user/name`, or `name` for one's own.
        with_code: whether the Python files of the model go along, so that it loads with `trust_remote_code=True` where
            this package is not installed.
        graphs: files of an export that go along, by their path in the repository.
        options: of [`upload`].

    Raises:
        [`UserError`]: if the folder is no complete model, or if the upload fails; the message says what was sent.
    """
    folder = Path(folder)
    files: dict[str, Path | bytes] = dict(collect_files(folder))
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{str(folder / CONFIG_NAME)!r}: {first_line(error)}") from error
    config_dict = read_json(files[CONFIG_NAME])
    auto_map, code = find_code(config) if with_code else (None, {})
    if config_dict.get("auto_map") != auto_map:
        config_dict.pop("auto_map", None)
        config_dict |= {"auto_map": auto_map} if auto_map else {}
        files[CONFIG_NAME] = (json.dumps(config_dict, indent=2, sort_keys=True) + "\n").encode()
    files |= code | graphs
    return upload(files, repo_id, with_code=with_code, **options)


def upload(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    overwrite_card: bool = False,
    token: str | None = None,
    commit_message: str = "Upload model",
    with_code: bool = False,
) -> Pushed:
    """Sends files, by their path in the repository, in one commit; see [`push_folder`].

    Args:
        private: whether a new repository is private; an existing one must be.
        revision: the branch, which is created if there is none; the main one unless given.
        overwrite_card: whether an existing card on the Hub is replaced.
        token: for the Hub; that of `hf auth login` or `HF_TOKEN` unless given.
        commit_message: title of the commit.
        with_code: whether the model's Python files are among `files`, which the card then says.
    """
    api, sent, unsent = HfApi(token=token), [], [name for name in files if name.endswith(".safetensors")]
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        head = api.model_info(repo_id, revision=revision)
        if private and not head.private:
            raise UserError(f"{repo_id} exists and is public: nothing was sent")
        on_hub = {file.rfilename for file in head.siblings}
        kept_card = CARD_NAME in files and CARD_NAME in on_hub and not overwrite_card
        files = {name: content for name, content in files.items() if name != CARD_NAME or not kept_card}
        if CARD_NAME in files:
            files[CARD_NAME] = _address_card(files[CARD_NAME], repo_id, with_code)
            ModelCard(files[CARD_NAME].decode(), ignore_metadata_errors=True).validate()  # before what takes long
        operations = {
            name: CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        }
        # Weights of an earlier push in other files would be loaded in place of these.
        stale = on_hub - files.keys() if CONFIG_NAME in files else set()
        stale = fnmatch.filter(stale, "model*.safetensors") + fnmatch.filter(stale, SAFE_WEIGHTS_INDEX_NAME)
        deletions = [CommitOperationDelete(name) for name in sorted(stale)]
        # One by one, to know which were sent. The Hub keeps them by content: a repeated push sends the rest.
        while unsent:
            api.preupload_lfs_files(repo_id, [operations[unsent[0]]], revision=revision, free_memory=False)
            sent.append(unsent.pop(0))
        commit = api.create_commit(
            repo_id, [*operations.values(), *deletions], commit_message=commit_message, revision=revision
        )
    except UserError:
        raise
    except Exception as error:  # of the client, or of its HTTP library, which differs between its versions
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = " ".join((getattr(error, "server_message", None) or "").split()).rstrip(".")
        reason = (said or first_line(error.__cause__ or error)) + "; log in with `hf auth login`" * (status == 401)
        raise UserError(
            f"The push to {repo_id} failed ({reason}); sent: {', '.join(sent) or 'nothing'}; not sent: "
            f"{', '.join([*unsent, 'the other files'])}; no commit was confirmed, and the same push can be repeated"
        ) from error
    old_graphs = any(name.startswith("onnx/") and name not in files for name in on_hub)
    return Pushed(commit.commit_url, changed=commit.oid != head.sha, kept_card=kept_card, old_graphs=old_graphs)


def _address_card(card: Path, repo_id: str, with_code: bool) -> bytes:
    """The card with `repo_id` in place of the local folder; `with_code` adds the use without the package."""
    text = card.read_text(encoding="utf-8")
    # The folder may have moved since.
    names = {card.resolve().parent.name, ModelCard(text, ignore_metadata_errors=True).data.model_name}

    def address(call: re.Match) -> str:
        return f'{call[1]}"{repo_id}"' if PurePath(call[2]).name in names else call[0]

    text = re.sub(r'(from_pretrained\(|model=)"([^"]+)"', address, text)
    code_block = re.search(r"```python\n(import hf_rskip .*?)```\n", text, re.DOTALL)
    if with_code and code_block and "trust_remote_code" not in text:
        code = re.sub(r"import .*  # (registers the model|defines its skip connection).*\n", "", code_block[1])
        code = code.replace(f'"{repo_id}"', f'"{repo_id}", trust_remote_code=True')
        without_package = f"\nWithout it, by the code in this repository:\n\n```python\n{code}```\n"
        text = text[: code_block.end()] + without_package + text[code_block.end() :]
    return text.encode()
