"""The Hub on loopback against the real client: what the other tests of this folder stand on."""

CLIENT = """
import hashlib, warnings
from pathlib import Path
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
)

def refusal(expected, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except expected:
        return
    raise AssertionError(f"{function.__name__} succeeded")

api = HfApi()
assert api.whoami()["name"] == "user"
assert api.create_repo("tiny", private=True).repo_id == "user/tiny"
assert api.create_repo("user/tiny", exist_ok=True).repo_id == "user/tiny"
refusal(HfHubHTTPError, api.create_repo, "user/tiny")
folder = Path("files")
(folder / "below").mkdir(parents=True)
(folder / "text.json").write_text("{}")
(folder / "below" / "weights.safetensors").write_bytes(bytes(range(256)) * 99)
first = api.upload_folder(repo_id="user/tiny", folder_path=folder, commit_message="first")
again = api.upload_folder(repo_id="user/tiny", folder_path=folder, commit_message="again")
assert first.oid == again.oid == api.model_info("user/tiny").sha

api.create_branch("user/tiny", branch="feature/x")
api.create_branch("user/tiny", branch="feature/x", exist_ok=True)
api.upload_file(repo_id="user/tiny", path_or_fileobj=b"new", path_in_repo="text.json", revision="feature/x")
assert sorted(branch.name for branch in api.list_repo_refs("user/tiny").branches) == ["feature/x", "main"]
assert [commit.title for commit in api.list_repo_commits("user/tiny")] == ["first", "initial commit"]
assert Path(hf_hub_download("user/tiny", "text.json", revision="feature/x")).read_text() == "new"
assert Path(hf_hub_download("user/tiny", "text.json")).read_text() == "{}"
copy = Path(snapshot_download("user/tiny", revision=first.oid))
weights = (copy / "below" / "weights.safetensors").read_bytes()
assert weights == (folder / "below" / "weights.safetensors").read_bytes()

tree = {entry.path: entry for entry in api.list_repo_tree("user/tiny", recursive=True)}
assert tree.keys() == {".gitattributes", "text.json", "below", "below/weights.safetensors"}
assert tree["below/weights.safetensors"].lfs.sha256 == hashlib.sha256(weights).hexdigest()
assert tree["text.json"].lfs is None
assert {entry.path for entry in api.list_repo_tree("user/tiny")} == {".gitattributes", "text.json", "below"}
assert [entry.size for entry in api.get_paths_info("user/tiny", ["text.json", "none"])] == [2]
assert api.file_exists("user/tiny", "text.json") and not api.file_exists("user/tiny", "README.md")

refusal(EntryNotFoundError, hf_hub_download, "user/tiny", "none.json")
refusal(RevisionNotFoundError, hf_hub_download, "user/tiny", "text.json", revision="none")
refusal(RepositoryNotFoundError, api.model_info, "user/none")
refusal(HfHubHTTPError, HfApi(token=False).model_info, "user/tiny")
refusal(HfHubHTTPError, HfApi(token="wrong").create_repo, "other")
ModelCard("---\\nlanguage: en\\ntags: [a]\\n---\\n# Card").validate()
refusal(ValueError, ModelCard("---\\nlanguage: [Klingonian language]\\n---\\n# Card").validate)
api.delete_file("text.json", "user/tiny")
assert not api.file_exists("user/tiny", "text.json")
print("done")
"""


def test_the_real_client_works_with_it(hub, run_without_package):
    result = run_without_package(CLIENT)
    assert result.out == "done\n", result.err
    assert hub.repositories["user/tiny"].private
    assert hub.commits("user/tiny", "feature/x")[:2] == ["initial commit", "first"]
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests) == 1
