"""The page: whole, self-contained, in order, and of use to a keyboard and a screen reader."""

import itertools
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from importlib.util import find_spec

import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.explain import facts as found_facts
from diffjax.explain.dial import Dial
from diffjax.explain.page import page, picture, write_explanation
from diffjax.process.precond import Meaning
from diffjax.reports import plots
from tests.support.later import Later

playwright_api = Later("playwright.sync_api")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
PARTS = ("noise", "lesson", "sees", "back", "blur", "dial", "network", "latents", "words")


class Read(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def facts(loaded_run):
    """Those of a run, but for the samples of the dial, whose programs take half a second."""

    def dial(model, recipe, condition, *, labels, extractor):
        assert extractor.image_shape == (8, 8, 1)
        assert labels.tolist() == condition.tolist() == list(range(10))
        scales, images = (0.0, 1.0, recipe.guidance_scale, 10.0), np.zeros((4, 10, 4, 8, 8, 1))
        return Dial(scales, images, (0.6, 0.5, 0.4, 0.3), (0.1, 0.7, 0.8, 0.9), 6)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(found_facts, "dial", dial)
        return found_facts.gather(loaded_run, loaded_run.dataset(), num_steps=4)


@pytest.fixture(scope="module")
def source(facts):
    return page(facts)


def test_every_part_is_there_in_order_and_the_contents_lead_to_it(source):
    read = Read(source)
    assert [heading["id"] for heading in read.all("h2")] == list(PARTS)
    assert [link["href"] for link in read.all("nav") and read.all("a")][:9] == [
        f"#{part}" for part in PARTS
    ]
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert re.findall(r"Step (\d)", re.sub(r"Steps? made", "", read.text)) == list("12345678")
    assert "level 250 of 1,000: 0.75 × picture + 0.25 × noise" in source
    # From 0.5 at scale 1 to 0.3 at scale 10 are 40 % less.
    assert "has not learned enough yet to guess the mean well" in read.text  # in six steps
    assert "recognition goes from 70 % to 90 %, and variety falls by 40 %" in read.text


def test_the_page_needs_nothing_else(source):
    read = Read(source)
    addresses = [
        attributes[name]
        for _, attributes in read.tags
        for name in ("src", "href", "srcset", "action")
        if name in attributes
    ]
    assert addresses
    assert all(address.startswith(("#", "data:image/")) for address in addresses)
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttp|import\(", source)
    assert len(source) < 3_000_000


def test_pictures_have_texts_and_no_number_is_missing(source):
    read = Read(source)
    texts = [image["alt"] for image in read.all("img")]
    assert len(texts) > 60
    assert all(len(text) > 10 for text in texts)
    assert "nan" not in read.text.lower().replace("guidance", "")
    assert "None" not in read.text
    ids = [attributes["id"] for _, attributes in read.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))


def test_what_does_not_apply_is_one_sentence(facts, monkeypatch):
    monkeypatch.setattr(plots, "loss_curve", lambda records: "")
    latents = found_facts.Latents("a codec", np.zeros((2, 4, 4, 4)), np.zeros((2, 8, 8, 1)))
    plain = replace(
        facts, kind="", titles=None, lesson_titles=None, way_titles=None, dial=None,
        dial_titles=None, real_variety=None, means=replace(facts.means, titles=None),
        lesson=facts.lesson._replace(average="", own_noise=False),
        latents=latents, meaning=Meaning.AVERAGE_VELOCITY,
    )  # fmt: skip
    text = Read(page(plain)).text
    assert "nobody tells it what to draw" in text
    assert "This one keeps none" in text
    assert "Its noise is drawn anew" in text
    assert "It is told" not in text
    assert "trained for few steps" in text
    assert "4 × 4 × 4 = 64 numbers" in text


def test_the_lesson_is_the_first_after_a_checkpoint_that_is_not_the_beginning(
    trained_run, loaded_run, facts, tmp_path, monkeypatch
):
    loaded = []

    def load(workdir, step=None, **_):
        loaded.append(step)
        return loaded_run

    def gather(run, dataset, *, lesson_of, num_steps):
        assert (run, lesson_of, num_steps) == (loaded_run, loaded_run, 4)
        return facts

    monkeypatch.setattr(found_facts, "load", load)
    monkeypatch.setattr(found_facts, "gather", gather)
    monkeypatch.setattr("diffjax.explain.page.page", lambda given: f"of {given is facts}")
    path = write_explanation(trained_run, tmp_path / "new" / "page.html", num_steps=4)
    assert loaded == [None, 2]  # of the checkpoints 0, 2, 4 and 6
    assert path.read_text(encoding="utf-8") == "of True"


def test_large_pictures_are_lossy():
    noise = np.random.default_rng(0).uniform(-1, 1, (3, 64, 64, 3))
    found = picture(noise, 3)
    assert found["source"].startswith("data:image/webp;base64,")
    assert (found["width"], found["height"]) == (3 * 64 + 2 * 8, 64)


def test_mistakes_are_one_line(trained_run, tmp_path):
    with pytest.raises(UserError, match=r"there is no run in .*nowhere: python -m experiments"):
        write_explanation(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a folder: name a file in it"):
        write_explanation(trained_run, tmp_path)


def test_a_run_between_two_sets_of_images_is_refused(loaded_run):
    wired = loaded_run.parts.wired
    traits = replace(wired.objective.traits, starts_at_source=True)

    class Bridge:
        path = wired.path

        def __init__(self):
            self.traits = traits

    parts = replace(loaded_run.parts, wired=wired._replace(objective=Bridge()))
    run = replace(loaded_run, parts=parts)
    with pytest.raises(UserError, match="makes images from images"):
        found_facts.gather(run, loaded_run.dataset())


@pytest.mark.parity
@pytest.mark.skipif(
    not (find_spec("playwright") and CHROMIUM), reason="needs playwright and Chromium"
)
def test_in_a_browser_all_is_reached_by_keyboard_and_read_aloud(source, tmp_path):
    path = tmp_path / "explain.html"
    path.write_text(source, encoding="utf-8")
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        for width in (400, 1_400):
            tab = browser.new_page(viewport={"width": width, "height": 900})
            wrong, requested = [], []
            tab.on("pageerror", lambda error, wrong=wrong: wrong.append(error))
            tab.on("request", lambda request, seen=requested: seen.append(request.url))
            tab.goto(path.as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            slider = tab.get_by_role("slider", name="Noise level", exact=True)
            slider.focus()
            before = slider.get_attribute("aria-valuetext")
            tab.keyboard.press("ArrowRight")
            assert slider.get_attribute("aria-valuetext") != before
            tab.keyboard.press("End")
            assert slider.get_attribute("aria-valuetext").startswith("level 1,000 of 1,000")
            assert tab.locator("[data-name='Noise level'] > figure:visible").count() == 1
            tab.keyboard.press("Tab")
            assert tab.evaluate("document.activeElement.textContent") == "Play"
            tab.keyboard.press("Enter")
            assert tab.evaluate("document.activeElement.textContent") == "Stop"
            assert {url[:5] for url in requested} <= {"file:", "data:"}
            assert wrong == []
            assert all(
                tab.locator("button").nth(i).get_attribute("aria-label")
                for i in range(tab.locator("button").count())
            )
        still = browser.new_page(reduced_motion="reduce")
        still.goto(path.as_uri())
        still.get_by_role("button", name="Next: Steps made").press("Enter")
        slider = still.get_by_role("slider", name="Steps made", exact=True)
        assert slider.input_value() == "1"
        browser.close()
