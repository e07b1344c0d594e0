"""Licence, language and origin are carried over and never invented; no string can break the front matter."""

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from attnres.eval.suites import ROWS
from attnres.hub_card import build
from attnres.hub_card.card import plain
from attnres.hub_card.front_matter import DATA_SETS, eval_results, front_matter
from attnres.hub_card.provenance import Provenance, read_provenance

ANY_TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)


def result(row: str, value: float = 50.0) -> dict:
    """As much of a result as the front matter reads."""
    score = {"metric": ROWS[row].metric, "filter": ROWS[row].filter, "value": value}
    return {"row": row, "shots": ROWS[row].shots, "score": score, "versions": {"lm_eval": "0.4.13"}}


def reread(data) -> ModelCard:
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# Title\n")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def write_card(folder, **keys):
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(keys)}---\n\n# Plain model\n")


def test_every_row_has_a_data_set():
    assert list(DATA_SETS) == list(ROWS)


def test_every_row_survives_writing_and_reading():
    rows = {name: result(name, 10 + index) for index, name in enumerate(ROWS)}
    card = reread(front_matter("name", "qwen3", Provenance(), rows))
    values = {each.dataset_name: each.metric_value for each in card.data.eval_results}
    assert values == {ROWS[name].title: each["score"]["value"] for name, each in rows.items()}
    assert set(eval_results(rows)) == {"mmlu_pro", "gpqa_diamond", "gsm8k"}


@settings(max_examples=60)
@given(name=ANY_TEXT, licence=ANY_TEXT, link=ANY_TEXT, language=ANY_TEXT, base=ANY_TEXT)
def test_no_string_can_break_or_extend_the_front_matter(name, licence, link, language, base):
    provenance = Provenance(
        license=licence, license_name=licence, license_link=link, language=[language], base_model=[base]
    )
    card = reread(front_matter(name, "qwen3", provenance, {"gsm8k": result("gsm8k")}))
    data = card.data.to_dict()
    assert (data["license"], data["license_link"], data["language"]) == (licence, link, [language])
    assert data["base_model"] == [base] and card.data.model_name == name and card.text == "\n# Title\n"
    assert set(data) == {
        *("license", "license_name", "license_link", "language", "library_name", "pipeline_tag", "tags"),
        *("base_model", "base_model_relation", "model-index"),
    }


@settings(max_examples=150)
@given(ANY_TEXT | st.text("|*_`[]()<>!#~\\$&; \na1", max_size=20))
@example("*a*")
@example("![a](b)")
@example("a|b\n\n# c")
@example("<script>")
def test_no_string_leaves_its_cell(text):
    markdown_it = pytest.importorskip("markdown_it")
    table = f"| a | b |\n|---|---|\n| {plain(text)} | 1 |"
    html = markdown_it.MarkdownIt("commonmark").enable("table").render(table)
    assert html.count("<td") == 2 and html.count("<tr") == 2
    for tag in ("<a ", "<img", "<em", "<strong", "<code", "<h1", "<script", "<!--"):
        assert tag not in html


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.text(
        st.characters(codec="utf-8", exclude_characters="/\0", categories=["L", "P", "Z", "S", "N"]),
        min_size=1,
        max_size=20,
    )
)
def test_a_folder_of_any_name_makes_a_valid_card(checkpoint, tmp_path, name):
    if name in (".", "..") or "{{" in name or "}}" in name or len(name.encode()) > 100:
        return
    folder = build(checkpoint, tmp_path / name, execute_snippets=False, overwrite=True)
    assert ModelCard.load(folder / "README.md").data.library_name == "transformers"


def test_the_licence_of_the_source_is_carried_over_with_its_name_and_link(folder):
    write_card(folder, license="other", license_name="llama3", license_link="https://example.org/licence")
    found = read_provenance(folder)
    assert (found.license, found.license_name, found.license_link) == (
        "other",
        "llama3",
        "https://example.org/licence",
    )


def test_a_link_to_a_licence_file_that_is_not_there_is_left_out(folder):
    write_card(folder, license="other", license_link="LICENSE")
    assert read_provenance(folder).license_link is None
    (folder / "LICENSE").touch()
    assert read_provenance(folder).license_link == "LICENSE"


@pytest.mark.parametrize(
    ("text", "licence", "link"),
    [
        ("Apache License\n Version 2.0, January 2004", "apache-2.0", None),
        (
            "MIT License\n\nPermission is hereby granted, free of charge, to any person obtaining a copy\nof this "
            "software and associated documentation files",
            "mit",
            None,
        ),
        ("You may look at it on Sundays.", "other", "LICENSE"),
    ],
    ids=["apache", "mit", "own"],
)
def test_a_licence_file_is_read(folder, text, licence, link):
    (folder / "LICENSE").write_text(text)
    found = read_provenance(folder)
    assert (found.license, found.license_link) == (licence, link)


def test_an_unknown_licence_is_left_out_and_the_card_says_so(source, tmp_path):
    (source / "LICENSE").unlink()
    folder = build(source, tmp_path / "hub", execute_snippets=False)
    text = (folder / "README.md").read_text()
    assert "license" not in ModelCard(text).data.to_dict() and "licence of this checkpoint is not stated" in text


def test_what_the_author_says_goes_first(folder):
    write_card(folder, license="mit", language="de")
    found = read_provenance(folder, license="apache-2.0", language=["en", "code"])
    assert (found.license, found.language) == ("apache-2.0", ["en", "code"])


@pytest.mark.parametrize(("stated", "read"), [("de", ["de"]), (["en", "zh"], ["en", "zh"]), ([False], ["no"])])
def test_languages_of_the_source_are_carried_over(folder, stated, read):
    write_card(folder, language=stated)
    assert read_provenance(folder).language == read


def test_the_base_of_the_plain_source_is_not_the_base_of_the_conversion(folder):
    write_card(folder, base_model="someone/older", tags=["text-generation"])
    assert read_provenance(folder).base_model is None
    write_card(folder, base_model="someone/older", tags=["attention-residuals"])
    assert read_provenance(folder).base_model == ["someone/older"]


@pytest.mark.parametrize("text", ["---\na: [\n---\n", "---\n- a\n---\n"], ids=["broken", "list"])
def test_front_matter_that_cannot_be_read_is_named(folder, text):
    (folder / "README.md").write_text(text)
    with pytest.raises(ValueError, match=r"README\.md: its front matter"):
        read_provenance(folder)


def test_a_card_without_front_matter_states_nothing(folder):
    (folder / "README.md").write_text("# A model\n")
    assert read_provenance(folder) == Provenance()


def test_a_link_that_is_no_web_address_is_left_out(folder):
    write_card(folder, license="other", license_link="javascript:x://")
    assert read_provenance(folder).license_link is None
