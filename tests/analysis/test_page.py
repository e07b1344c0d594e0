"""Tests the page of `attnres inspect`: its markup and data, and with Chromium also mouse and keyboard."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from browser import CHROMIUM, browsing
from tiny_inspect import TEXT, made_up, tiny_model, tiny_tokenizer

from attnres.analysis import depth_weights
from attnres.analysis.page import render, visible

HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "&amp;",
    "{{ data }}",
    "\u202e\x07\u2028",
    " \n",
)
FETCHES = {"src", "href", "srcset", "data", "action", "poster", "background", "style"}


class Reader(HTMLParser):
    """Collects elements with their attributes, and the text of scripts, styles, titles and labels."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.elements, self.text, self._open = [], {}, []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style", "title", "label"):
            key = f"{tag} {sum(name == tag for name, _ in self.elements)}"
            self._open.append((tag, key))
            self.text[key] = ""

    def handle_endtag(self, tag):
        if self._open and self._open[-1][0] == tag:
            self._open.pop()

    def handle_data(self, data):
        if self._open:
            self.text[self._open[-1][1]] += data

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def data_of(reader: Reader) -> dict:
    return json.loads(reader.text["script 1"])


def test_the_page_holds_every_weight_and_its_spread():
    weights = depth_weights(tiny_model(), tiny_tokenizer(), TEXT, context=20, keep_tokens=5)
    (model,) = data_of(Reader(render([weights])))["models"]
    assert model["sources"] == weights.sources and model["short"] == weights.short_sources
    assert len(model["rows"]) == len(weights.mixtures) == 11
    for row, mixture in zip(model["rows"], weights.mixtures, strict=True):
        assert (row["kind"], row["layer"], row["partial"]) == (mixture.kind, mixture.layer, mixture.partial)
        for name in ("mean", "std", "min", "max"):
            assert row[name] == pytest.approx(getattr(mixture, name), abs=1e-5)
    assert model["tokens"] == ["T", "h", "e", "␣", "q"]
    for shown, kept in zip(model["tokenWeights"], weights.token_weights, strict=True):
        assert np.array(shown) == pytest.approx(np.array(kept), abs=1e-5)


def test_every_model_has_three_panels_and_a_button_per_token():
    reader = Reader(render([made_up(2), made_up(2, "other", "block")]))
    panels = [attributes for attributes in reader.named("div") if "data-panel" in attributes]
    assert [panel["data-panel"] for panel in panels] == ["attention", "mlp", "output"] * 2
    assert all(panel["tabindex"] == "0" and panel["aria-label"] for panel in panels)
    assert [button["value"] for button in reader.named("input")] == ["-1", "0", "1"] * 2
    assert [button["value"] for button in reader.named("input") if "checked" in button] == ["-1"] * 2
    assert {button["name"] for button in reader.named("input")} == {"0", "1"}
    page = render([made_up(2)])
    assert "<td>0.500</td><td>0.062</td><td>0.400</td><td>1.492</td><td>none</td>" in page  # the output's row


def test_without_kept_tokens_there_is_nothing_to_choose():
    assert not Reader(render([made_up(2, tokens=())])).named("input")


def test_nothing_is_fetched_and_the_policy_forbids_it():
    reader = Reader(render([made_up(2)]))
    assert not [(tag, name) for tag, attributes in reader.elements for name in attributes if name in FETCHES]
    assert not {"link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in reader.elements}
    assert not re.search(r"url\(|@import|https?:|fetch\(|XMLHttp|import\(", render([made_up(2)]))
    (policy,) = (meta["content"] for meta in reader.named("meta") if "http-equiv" in meta)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for rule, source in (("script-src", reader.text["script 2"]), ("style-src", reader.text["style 1"])):
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert rules.pop(rule) == f"'sha256-{digest}'"
    assert rules == {"default-src": "'none'", "base-uri": "'none'", "form-action": "'none'"}


def test_what_comes_from_outside_stays_text():
    page = render([made_up(2, name=HOSTILE[0] + HOSTILE[1], tokens=HOSTILE)])
    reader = Reader(page)
    assert [attributes.get("type") for attributes in reader.named("script")] == ["application/json", None]
    assert not reader.named("img")
    assert reader.text["title 1"] == f"Depth weights: {HOSTILE[0]}{HOSTILE[1]}"
    assert [reader.text[f"label {number}"] for number in range(2, 8)] == [visible(token) for token in HOSTILE]
    assert data_of(reader)["models"][0]["tokens"] == [visible(token) for token in HOSTILE]
    assert not re.search("[\u202e\x07\u2028]", page)


def test_characters_that_do_not_show_are_made_visible():
    assert visible(" a\tb\r\n") == "␣a⇥b␍↵"
    assert visible("\x00\x1b\u202e\ufeff\U000e0001") == "\\x00\\x1b\\u202e\\ufeff\\U000e0001"
    assert visible("ä漢😀") == "ä漢😀"


# From here on with a browser.

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")


@pytest.fixture
def shown(tmp_path, request):
    """The page over given models in a browser."""
    path = tmp_path / "page.html"
    path.write_text(render(request.param()), encoding="utf-8")
    with browsing(tmp_path / "profile") as page:
        page.open(path)
        yield page
        assert not page.complaints()


def two_models():
    return [made_up(6, tokens=("the", " cat", *HOSTILE)), made_up(6, "other", "block")]


STYLE = "getComputedStyle"


def tip(page) -> list[str]:
    return page.evaluate("[...tip.children].map(line => line.textContent)")


@needs_chromium
@pytest.mark.parametrize("shown", [two_models], indirect=True)
def test_hovering_shows_layer_source_weight_and_spread(shown):
    shown.point_at("mlp", 3, 2)
    mean = 0.5**6  # 8 sources, the newest of which has a half
    assert tip(shown) == [
        "layer 3, before MLP",
        "source: output 1",
        f"mean weight {mean:.4f}, std over tokens {mean / 10:.4f}",
        f"min {mean / 2:.4f}, max {mean * 1.5:.4f}",
    ]
    shown.point_at("mlp", 3, 7)
    assert tip(shown)[1] == "source: output 6, newest"
    shown.point_at("mlp", 3, 9)  # not there yet
    assert tip(shown) == []
    shown.point_at("output", 0, 0)
    assert tip(shown)[:2] == ["output", "source: embedding"]
    shown.point_at("mlp", 1, 2, model=1)
    assert tip(shown)[:2] == ["layer 1, before MLP", "source: output 1, partial sum, newest"]
    inside = "(box => box.left >= 0 && box.top >= 0 && box.right <= innerWidth && box.bottom <= innerHeight)"
    for cell in (("mlp", 5, 0), ("mlp", 5, 11), ("output", 0, 12)):
        shown.point_at(*cell)
        assert shown.evaluate(f"{inside}(tip.getBoundingClientRect())")


@needs_chromium
@pytest.mark.parametrize("shown", [two_models], indirect=True)
def test_a_token_shows_its_own_weights(shown):
    shown.evaluate("document.querySelectorAll('.tokens input')[2].click()")
    assert shown.evaluate("document.querySelector('.showing').textContent") == "Showing token 1: ␣cat"
    shown.point_at("attention", 1, 0)
    assert "weight 0.3333 for token 1 ␣cat" in tip(shown)
    shown.point_at("attention", 1, 0, model=1)
    assert not any("for token" in line for line in tip(shown))  # each model for itself


@needs_chromium
@pytest.mark.parametrize("shown", [two_models], indirect=True)
def test_the_keyboard_does_what_the_mouse_does(shown):
    shown.press("Tab")
    assert shown.evaluate("document.activeElement.value") == "-1"
    shown.press("ArrowRight")
    assert shown.evaluate("document.activeElement.value") == "0"
    assert shown.evaluate("document.querySelector('.showing').textContent") == "Showing token 0: the"
    shown.press("ArrowLeft")
    shown.press("Tab")
    assert shown.evaluate("document.activeElement.dataset.panel") == "attention"
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        shown.press(key)
    assert tip(shown)[:2] == ["layer 2, before attention", "source: output 0"]
    shown.press("End")
    assert tip(shown)[1] == "source: output 3, newest"
    shown.press("Escape")
    assert tip(shown) == []


@needs_chromium
@pytest.mark.parametrize("shown", [two_models], indirect=True)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_can_be_read(shown, scheme):
    shown.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    back, text, soft = (
        np.array([int(theme[start : start + 2], 16) for start in (1, 3, 5)])
        for theme in (
            shown.evaluate(f"{STYLE}(document.documentElement).getPropertyValue('{name}')")
            for name in ("--back", "--text", "--soft")
        )
    )
    assert (back.mean() > 200) == (scheme == "light")
    assert contrast(text, back) >= 7 and contrast(soft, back) >= 4.5
    assert shown.evaluate(f"{STYLE}(panels[0].cells[0][0]).backgroundColor") == "rgb(254, 232, 56)"  # weight 1


@needs_chromium
@pytest.mark.parametrize("shown", [two_models], indirect=True)
def test_a_partial_sum_is_marked_in_the_corner_without_a_colour_of_its_own(shown):
    def corner(model, row, column):
        return shown.evaluate(f"{STYLE}(panels[{model} * 3 + 1].cells[{row}][{column}]).backgroundImage")

    assert "rgb(0, 0, 0)" in corner(1, 3, 4)  # weight 0.5: black, as its number is
    assert corner(1, 3, 3) == corner(0, 3, 7) == "none"  # an older source; a full model


def contrast(first, second) -> float:
    """Contrast ratio of the Web Content Accessibility Guidelines."""

    def luminance(colour):
        parts = np.asarray(colour) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722] + 0.05

    low, high = sorted([luminance(first), luminance(second)])
    return high / low


@needs_chromium
@pytest.mark.parametrize("shown", [lambda: [made_up(48, tokens=["word"] * 64)]], indirect=True, ids=["48-layers"])
def test_a_deep_full_model_fits_the_window(shown, tmp_path):
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shown.point_at("mlp", 47, 95)
    assert tip(shown)[:2] == ["layer 47, before MLP", "source: output 94, newest"]
    shown.screenshot(tmp_path / "page.png")
    assert matplotlib.image.imread(tmp_path / "page.png").shape[1] == 1200


@needs_chromium
@pytest.mark.parametrize("shown", [two_models], indirect=True)
def test_a_narrow_window_cuts_nothing_off(shown):
    shown.resize(360, 700)
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shown.point_at("attention", 5, 0)
    assert tip(shown)[0] == "layer 5, before attention"
