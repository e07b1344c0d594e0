"""Uploads a finished folder to the Hub."""

from pathlib import Path

from ..conversion.inspection import shown_size
from ..messages import one_line
from .leaks import check_folder


def upload_list(folder: Path) -> str:
    """Lists the files that would be uploaded with their sizes, and the total."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    width = max(map(len, sizes))
    lines = [f"{name:<{width}}  {shown_size(size):>9}" for name, size in sizes.items()]
    return "\n".join([*lines, f"{len(sizes)} files, {shown_size(sum(sizes.values()))}"])


def push(folder: Path, repo: str, *, public: bool = False, api=None) -> str:
    """Checks a folder again, uploads it to the Hub, and returns its address.

    Args:
        folder: result of `build`.
        repo: hub id; the repository is created if it does not exist.
        public: whether everybody may see the repository; otherwise it must be private.
        api: `huggingface_hub.HfApi` (default: one with the token of `hf auth login`).

    Raises:
        ValueError: the folder fails a check, the repository is public and `public` is false, or the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of its HTTP library, which differs between versions

    check_folder(folder)
    api = HfApi() if api is None else api
    try:
        address = api.create_repo(repo, private=not public, exist_ok=True)
        # A repository that already exists keeps its visibility.
        if not public and not api.model_info(repo).private:
            raise ValueError(f"{repo}: exists and is public; upload with --public, or choose another repository.")
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload AttnRes model")
    except (HTTPError, OSError) as error:
        raise ValueError(f"{repo}: not uploaded ({one_line(error)})") from None
    return str(address)
