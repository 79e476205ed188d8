"""The gallery: what is filled, its refusals, and the page in a browser."""

import io
import shutil
import socket
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffjax.conditions import Images
from diffjax.errors import UserError
from experiments import gallery
from tests.support.later import Later

playwright_api = Later("playwright.sync_api")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""


def model_of(latents, pixels):
    """Of latents `[h, w, c]`, each of which is the mean of a square of pixels."""
    k = pixels[0] // latents[0]

    def encoded(images):
        rows = images.reshape(len(images), latents[0], k, latents[1], k, -1)
        return rows.mean(axis=(2, 4))

    codec = SimpleNamespace(image_shape=lambda shape: pixels)
    return SimpleNamespace(wired=SimpleNamespace(image_shape=latents), codec=codec, encoded=encoded)


def drawn(background, *layers):
    return {"background": background, "layers": layers}


def test_a_magnified_picture_is_filled_where_a_quarter_of_a_pixel_is_drawn_on():
    values = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    picture = gallery.shown(np.float32(values[None]) / 127.5 - 1.0)
    assert picture.shape == (4 * 64, 6 * 64, 3)  # 8 times, to 48 pixels, and 8 times more, to 384
    red = np.zeros((*picture.shape[:2], 4), np.uint8)
    red[:33, :33, 3] = 255  # more than a quarter of the first pixel
    red[:31, 64:95, 3] = 255  # less of the second
    layer = Image.fromarray(red)
    known = gallery.known_part(
        model_of((4, 6, 3), (4, 6, 3)), drawn(Image.fromarray(picture), layer), gallery.DRAWN
    )
    np.testing.assert_allclose(known.image[0], values / 127.5 - 1.0, atol=1e-6)
    expected = np.ones((1, 4, 6, 1))
    expected[0, 0, 0] = 0.0
    np.testing.assert_array_equal(known.mask, expected)
    kept = known.kept(np.full((1, 4, 6, 3), 5.0))
    np.testing.assert_array_equal(kept[0, 0, 0], 5.0)
    np.testing.assert_array_equal(kept[0, 1:], known.image[0, 1:])


def test_a_latent_is_filled_where_its_first_pixel_is_drawn_on_as_in_edits():
    """Of 2 x 2 latents of 4 x 4 pixels; a stroke that meets none of the first ones is refused."""
    model, white = model_of((2, 2, 1), (8, 8, 1)), Image.new("RGB", (8, 8), "white")
    layer = np.zeros((8, 8, 4), np.uint8)
    layer[:, :6, 3] = 255
    layer[4:, 4:, 3] = 0
    known = gallery.known_part(model, drawn(white, Image.fromarray(layer)), gallery.DRAWN)
    np.testing.assert_array_equal(known.mask[0, ..., 0], [[0, 0], [0, 1]])
    layer[:, :, 3] = 0
    layer[1:4, 1:4, 3] = 255
    with pytest.raises(UserError, match="no latent pixel is made anew"):
        gallery.known_part(model, drawn(white, Image.fromarray(layer)), gallery.DRAWN)


def test_importing_and_making_the_page_are_announced(monkeypatch):
    """Where Gradio is imported for the first time, they take longer than five seconds."""
    done: list[Any] = []
    run = SimpleNamespace(model=lambda weights: "model")
    demo = SimpleNamespace(close=lambda verbose: done.append("closed"))
    ended = SimpleNamespace(Event=lambda: SimpleNamespace(wait=lambda: None))
    monkeypatch.setattr(gallery, "progress", lambda what: nullcontext(done.append(what)))
    monkeypatch.setattr(gallery.published, "opened", lambda args, weights: run)
    monkeypatch.setattr(gallery, "page", lambda run, model: demo)
    monkeypatch.setattr(gallery, "serve", lambda *_: done.append("served"))
    monkeypatch.setattr(gallery, "threading", ended)
    gallery.main(SimpleNamespace(weights=None, host="127.0.0.1", port=1))
    assert done == ["importing gradio and making the page", "served", "closed"]


def test_a_half_is_filled_without_drawing_and_a_photograph_is_cut_to_size():
    grey = Image.fromarray(np.full((300, 200, 4), 255, np.uint8))  # larger, and with an alpha
    model = model_of((2, 2, 1), (8, 8, 1))
    known = gallery.known_part(model, drawn(grey), "lower half")
    np.testing.assert_array_equal(known.mask[0, ..., 0], [[1, 1], [0, 0]])
    np.testing.assert_allclose(known.image, 1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "there is no picture to fill"),
        (drawn(None), "there is no picture to fill"),
        (drawn(Image.new("RGB", (8, 8))), "nothing is drawn: draw on the picture, or choose lower"),
    ],
)
def test_what_can_not_be_filled_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        gallery.known_part(model_of((8, 8, 1), (8, 8, 1)), given, gallery.DRAWN)


def wanted(**changes):
    return gallery.Wanted(3, 1.0, 2, "", 0, gallery.ESTIMATE)._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": None}, "seed=None: it is a whole number"),
        ({"num_steps": 0}, "num_steps=0: it is a whole number from 1"),
        ({"solver": "huen"}, "no solver is called 'huen'; did you mean 'heun'"),
        ({"subject": 10}, "no label is called 10"),
    ],
)
def test_choices_that_no_picture_can_be_made_with_are_refused(loaded, changes, message):
    with pytest.raises(UserError, match=message):
        next(gallery.pictures(loaded, loaded.model(), wanted(**changes)))


def test_the_page_is_for_models_of_classes_or_prompts(loaded):
    wired = loaded.parts.wired._replace(condition=Images((8, 8, 1)))
    with pytest.raises(UserError, match="this is one of images of 8×8×1: use"):
        gallery.page(loaded, SimpleNamespace(wired=wired))


def test_a_missing_gradio_is_one_line(loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"the gallery needs gradio: pip install"):
        gallery.page(loaded, loaded.model())


@pytest.fixture
def addresses(monkeypatch):
    """The hosts that this process connects to."""
    hosts, connect = [], socket.socket.connect

    def recorded(self, address):
        hosts.append(address[0] if isinstance(address, tuple) else "file")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", recorded)
    return hosts


@pytest.mark.process
@pytest.mark.skipif(
    not (find_spec("gradio") and find_spec("playwright") and CHROMIUM),
    reason="needs gradio, playwright and Chromium",
)
def test_in_a_browser_a_class_is_sampled_step_by_step_and_what_is_drawn_is_filled(
    loaded, addresses, tmp_path
):

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    demo = gallery.page(loaded, loaded.model())
    url = gallery.serve(demo, "127.0.0.1", port)
    with pytest.raises(UserError, match=f"can't listen at --host=127.0.0.1 --port={port}"):
        gallery.serve(gallery.page(loaded, loaded.model()), "127.0.0.1", port)
    try:
        with playwright_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
            )
            tab = browser.new_page()
            tab.set_default_timeout(60_000)
            requested = []
            tab.on("request", lambda request: requested.append(request.url))
            tab.goto(url)
            use(tab)
            browser.close()
    finally:
        demo.close(verbose=False)
    assert all(u.startswith((f"{url}/", "data:", "blob:")) for u in requested), requested
    assert set(addresses) <= {"127.0.0.1", "file"}


def use(tab):
    """Chooses a class, looks at each step, draws, fills, and makes a mistake."""
    status = tab.locator("#status")
    tab.get_by_label("Solver", exact=True).click()
    names = tab.get_by_role("option").all_text_contents()
    assert {"euler (its own)", "heun", "ddpm"} < {name.strip("✓ \n") for name in names}
    assert not any("flow_map" in name or "ddpm_learned" in name for name in names)
    tab.keyboard.press("Escape")
    tab.get_by_label("Class").click()
    tab.get_by_role("option", name="7").click()
    tab.get_by_label("number input for Solver steps").fill("100")
    tab.keyboard.press("Tab")
    tab.evaluate(SEE)
    tab.get_by_role("button", name="Make a picture").click()
    status.get_by_text("step 100 of 100").wait_for()
    texts = [text for text in tab.evaluate("[...window.texts]") if text.startswith("step")]
    numbers = [int(text.split()[1]) for text in texts]  # The browser leaves some out.
    assert len(numbers) >= 3
    assert numbers == sorted(numbers)
    # 100 evaluations by Euler, each with and without the class, of which the last is x0.
    assert "NFE 200, and 198 for the pictures on the way" in texts[-1]
    tab.wait_for_function("window.pictures.size >= 3")
    assert status.locator("[role=status][aria-live=polite]").count() == 1

    tab.wait_for_timeout(500)  # The last picture may come after its text.
    before = picture_of(tab)
    fill, canvas = tab.get_by_role("button", name="Fill"), tab.locator("canvas").first
    fill.click()
    status.get_by_text("error: nothing is drawn").wait_for()
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    middle, width = box["y"] + box["height"] / 2, box["width"]
    tab.mouse.move(box["x"] + 0.4 * width, middle)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 0.6 * width, middle, steps=3)
    tab.mouse.up()
    tab.get_by_label("Seed of the noise").fill("1")
    fill.click()
    status.get_by_text("step 100 of 100").wait_for()
    tab.wait_for_timeout(500)
    after = picture_of(tab)
    changed = (after != before).any(axis=2).reshape(8, 48, 8, 48).any(axis=(1, 3))
    assert changed[3:5, 3:5].all()
    assert not changed[[0, 1, 6, 7]].any()


def picture_of(tab):
    """The picture on the page, of 8x8 pixels of 48x48 each."""
    source = tab.locator("#picture img").get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(tab.request.get(source).body())).convert("RGB"))


SEE = """() => {
    window.texts = new Set(), window.pictures = new Set();
    const see = () => {
        // Within the status, beside which Gradio shows its own seconds.
        const status = document.querySelector("#status p[role=status]");
        if (status) window.texts.add(status.textContent);
        const picture = document.querySelector("#picture img");
        if (picture) window.pictures.add(picture.src);
    };
    new MutationObserver(see).observe(
        document.body, {subtree: true, childList: true, attributes: true});
}"""
