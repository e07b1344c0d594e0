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
    """Collects elements with their attributes, and the text of scripts, styles, titles and options."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.elements, self.text, self._open = [], {}, []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style", "title", "option"):
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
    assert model["sources"] == weights.sources
    assert len(model["mixtures"]) == len(weights.mixtures) == 11
    for row, mixture in zip(model["mixtures"], weights.mixtures, strict=True):
        assert (row["name"], row["partial"]) == (mixture.name, mixture.partial)
        for name in ("mean", "std", "min", "max"):
            assert row[name] == pytest.approx(getattr(mixture, name), abs=1e-5)
    for shown, kept in zip(model["tokenWeights"], weights.token_weights, strict=True):
        assert np.array(shown) == pytest.approx(np.array(kept), abs=1e-5)


def test_every_model_has_three_heatmaps_and_an_option_per_token():
    reader = Reader(render([made_up(2), made_up(2, "other", "block", tokens=())]))
    panels = [attributes for attributes in reader.named("div") if "data-panel" in attributes]
    assert [panel["data-panel"] for panel in panels] == ["attention", "mlp", "output"] * 2
    assert all(panel["tabindex"] == "0" and panel["aria-label"] for panel in panels)
    assert [row["data-mixture"] for row in reader.named("tr") if row] == ["0", "2", "1", "3", "4"] * 2
    assert [option["value"] for option in reader.named("option")] == ["-1", "0", "1", "-1"]
    page = render([made_up(2)])
    assert "<td>0.500</td><td>0.062</td><td>0.400</td><td>1.492</td><td>0 of 1</td>" in page  # the output's row


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
    options = [reader.text[f"option {number}"] for number in range(2, 8)]
    assert options == [f"token {number}: {visible(token)}" for number, token in enumerate(HOSTILE)]
    assert not re.search("[\u202e\x07\u2028]", page)


def test_characters_that_do_not_show_are_made_visible():
    assert visible(" a\tb\r\n") == "␣a⇥b␍↵"
    assert visible("\x00\x1b\u202e\ufeff\U000e0001") == "\\x00\\x1b\\u202e\\ufeff\\U000e0001"
    assert visible("ä漢😀") == "ä漢😀"


# From here on with a browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    with browsing(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def shown(browser, tmp_path, request):
    """The page over given models in a browser."""
    path = tmp_path / "page.html"
    path.write_text(render(getattr(request, "param", two_models)()), encoding="utf-8")
    browser.resize(1200, 900)
    browser.open(path)
    yield browser
    assert not browser.complaints()


def two_models():
    return [made_up(6, tokens=("the", " cat", *HOSTILE)), made_up(6, "other", "block")]


STYLE = "getComputedStyle"


def tip(page) -> list[str]:
    return page.evaluate("tip.textContent").splitlines()


def test_hovering_shows_layer_source_weight_and_spread(shown):
    shown.point_at("mlp", 3, 2)
    mean = 0.5**6  # 8 sources, the newest of which has a half
    assert tip(shown) == [
        "layer 3 MLP",
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
    assert tip(shown)[:2] == ["layer 1 MLP", "source: output 1, partial sum, newest"]
    hidden = "((one, other) => one.top < other.bottom && other.top < one.bottom)"
    hidden += "(tip.getBoundingClientRect(), current.getBoundingClientRect())"
    for cell in (("mlp", 0, 0), ("mlp", 5, 11), ("output", 0, 12)):
        shown.point_at(*cell)
        assert tip(shown) and not shown.evaluate(hidden)


def test_a_token_shows_its_own_weights(shown):
    shown.evaluate(
        "(choice => { choice.value = 1; choice.dispatchEvent(new Event('change')) })(document.querySelector('select'))"
    )
    shown.point_at("attention", 1, 0)
    assert "weight 0.3333 for token 1: ␣cat" in tip(shown)
    assert shown.evaluate("current.textContent") == "0.33"
    shown.point_at("attention", 1, 0, model=1)
    assert not any("for token" in line for line in tip(shown))  # each model for itself


def test_the_keyboard_does_what_the_mouse_does(shown):
    shown.press("Tab")
    assert shown.evaluate("document.activeElement.value") == "-1"
    shown.press("ArrowDown")
    assert shown.evaluate("document.querySelector('.heatmap tr:nth-child(2) td').textContent") == "0.33"  # of a token
    shown.press("Tab")
    assert shown.evaluate("document.activeElement.dataset.panel") == "attention"
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        shown.press(key)
    assert tip(shown)[:2] == ["layer 2 attention", "source: output 0"]
    for _ in range(5):
        shown.press("ArrowRight")  # to the last one and no further
    assert tip(shown)[1] == "source: output 3, newest"
    shown.press("Escape")
    assert tip(shown) == []


def test_both_colour_schemes_can_be_read(shown):
    for scheme in ("dark", "light"):
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
        colour = shown.evaluate(f"{STYLE}(document.querySelector('.heatmap td')).backgroundColor")
        assert colour == "rgb(254, 232, 56)"  # weight 1


def test_a_partial_sum_is_marked_in_the_corner_without_a_colour_of_its_own(shown):
    def corner(model, row, column):
        cell = f"document.querySelectorAll('[data-panel=mlp] tbody')[{model}].rows[{row}].cells[{column + 1}]"
        return shown.evaluate(f"{STYLE}({cell}).backgroundImage")

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


@pytest.mark.parametrize("shown", [lambda: [made_up(48, tokens=["word"] * 64)]], indirect=True, ids=["48-layers"])
def test_a_deep_full_model_fits_the_window(shown, tmp_path):
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert shown.evaluate("[...document.querySelectorAll('.heatmap')].every(map => map.scrollWidth <= map.clientWidth)")
    shown.point_at("mlp", 47, 95)
    assert tip(shown)[:2] == ["layer 47 MLP", "source: output 94, newest"]
    shown.screenshot(tmp_path / "page.png")
    assert matplotlib.image.imread(tmp_path / "page.png").shape[1] == 1200


def test_a_narrow_window_cuts_nothing_off(shown):
    shown.resize(360, 700)
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shown.point_at("attention", 5, 0)
    assert tip(shown)[0] == "layer 5 attention"
    assert shown.evaluate("(box => box.left >= 0 && box.right <= innerWidth)(tip.getBoundingClientRect())")
