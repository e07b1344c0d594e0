"""Uploading: what goes up is shown first, nobody else sees it unless told so, and nothing unchecked leaves."""

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from attnres import cli
from attnres.hub_card import build, push, upload_list


class Hub:
    """Stands in for HfApi: remembers what is asked of it."""

    def __init__(self, exists_public: bool = False, fails: bool = False):
        self.private = None if not exists_public else False
        self.fails = fails
        self.uploads = []

    def create_repo(self, repo, *, private, exist_ok):
        if self.fails:
            raise OfflineModeIsEnabled("no\nnetwork")
        assert exist_ok
        if self.private is None:
            self.private = private
        return f"https://hub.example/{repo}"

    def model_info(self, repo):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        names = sorted(path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file())
        self.uploads.append((repo_id, names))


@pytest.fixture(scope="module")
def folder(checkpoint, results, tmp_path_factory):
    return build(checkpoint, tmp_path_factory.mktemp("push") / "tiny", [results], execute_snippets=False)


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    return hub


def command(checkpoint, out, *options):
    return cli.main(["card", str(checkpoint), "--out", str(out), "--no-run", "--push", "someone/tiny", *options])


def test_a_new_repository_is_private(folder):
    hub = Hub()
    assert push(folder, "someone/tiny", api=hub) == "https://hub.example/someone/tiny"
    (upload,) = hub.uploads
    assert hub.private is True and upload[0] == "someone/tiny"
    assert {"README.md", "model.safetensors", ".eval_results/gsm8k.yaml"} <= set(upload[1])


def test_it_is_public_when_that_is_said(folder):
    hub = Hub()
    push(folder, "someone/tiny", public=True, api=hub)
    assert hub.private is False and hub.uploads


def test_nothing_goes_to_a_repository_that_is_public_already(folder):
    hub = Hub(exists_public=True)
    with pytest.raises(ValueError, match="exists and is public; upload with --public"):
        push(folder, "someone/tiny", api=hub)
    assert not hub.uploads


def test_what_was_planted_after_building_does_not_go_up(checkpoint, tmp_path):
    folder = build(checkpoint, tmp_path / "tiny", execute_snippets=False)
    (folder / "notes.txt").write_text("hf_" + "a" * 30)
    hub = Hub()
    with pytest.raises(ValueError, match=r"notes\.txt: a Hugging Face token"):
        push(folder, "someone/tiny", api=hub)
    assert hub.private is None and not hub.uploads


def test_a_hub_that_cannot_be_reached_is_one_line(folder):
    with pytest.raises(ValueError, match=r"someone/tiny: not uploaded \(no network\)"):
        push(folder, "someone/tiny", api=Hub(fails=True))


def test_the_list_names_every_file_with_its_size(folder):
    lines = upload_list(folder).splitlines()
    assert len(lines) == 1 + sum(path.is_file() for path in folder.rglob("*"))
    (weights,) = (line for line in lines if line.startswith("model.safetensors"))
    assert weights.endswith("B") and lines[-1].startswith(f"{len(lines) - 1} files, ")


def test_the_command_shows_what_goes_up_and_asks(checkpoint, hub, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("builtins.input", lambda: "no")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert command(checkpoint, tmp_path / "tiny") == 0
    said = capsys.readouterr().err
    assert "model.safetensors" in said and "private repository someone/tiny" in said and "not uploaded" in said
    assert not hub.uploads and (tmp_path / "tiny").is_dir()
    monkeypatch.setattr("builtins.input", lambda: "yes")
    assert command(checkpoint, tmp_path / "tiny", "--overwrite") == 0
    assert len(hub.uploads) == 1 and hub.private is True
    assert "https://hub.example/someone/tiny" in capsys.readouterr().out


def test_without_a_terminal_the_command_needs_yes(checkpoint, hub, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert command(checkpoint, tmp_path / "tiny") == 2
    assert "--yes" in capsys.readouterr().err and not hub.uploads
    assert command(checkpoint, tmp_path / "tiny", "--overwrite", "--yes", "--public") == 0
    assert len(hub.uploads) == 1 and hub.private is False
    assert "public repository someone/tiny" in capsys.readouterr().err
