"""Uploads a finished folder to the Hub after listing its files."""

from pathlib import Path

from ..conversion.inspection import shown_size
from .validation import check_folder


def upload_list(folder: Path) -> str:
    """The files that go up with their sizes, and the sum."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    width = max(map(len, sizes))
    lines = [f"{name:<{width}}  {shown_size(size):>9}" for name, size in sizes.items()]
    return "\n".join([*lines, f"{len(sizes)} files, {shown_size(sum(sizes.values()))}"])


def push(folder: Path, repo: str, *, public: bool = False, api=None) -> str:
    """Checks a folder once more and uploads it; returns its address.

    Args:
        repo: hub id; made if it is not there.
        public: everybody may see it; otherwise the repository must be private.
        api: a `huggingface_hub.HfApi` (default: one with the token that the user logged in with).

    Raises:
        ValueError: something in the folder must not be published, the repository is public although that was not asked
            for, or the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of the library that it sends with, which is not always the same

    check_folder(folder)
    api = HfApi() if api is None else api
    try:
        address = api.create_repo(repo, private=not public, exist_ok=True)
        # One that was there before keeps its visibility.
        if not public and not api.model_info(repo).private:
            raise ValueError(f"{repo}: exists and is public; --public says that this is meant.")
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload AttnRes model")
    except (HTTPError, OSError) as error:
        raise ValueError(f"{repo}: not uploaded ({' '.join(str(error).split())[:200]})") from None
    return str(address)
