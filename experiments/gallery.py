r"""A page to play with a model: sample, watch the picture come out of the noise, draw and fill.

  python -m experiments.gallery --workdir=runs/digits
  python -m experiments.gallery --pretrained=FOLDER --image_size=512,512 --port=8000

Serves a page at http://127.0.0.1:7860, which this computer alone can open; --host=0.0.0.0 opens it
to the network, without a password. Nothing is fetched from the network and nothing is sent there.
Ctrl-C ends it.
"""

import html
import importlib
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from jax.tree_util import Partial
from PIL import Image, ImageOps

from diffjax import choices
from diffjax.conditions import Classes, Unconditional
from diffjax.conditions.masked_images import NO_LATENT, nearest
from diffjax.errors import UserError
from diffjax.host.progress import progress
from diffjax.reports.pictures import image_grid
from diffjax.runs.load import Run
from diffjax.runs.samples.model import Model, Request
from diffjax.runs.samples.recipes import Chosen, named_recipe
from diffjax.sampling import editing
from diffjax.settings import LARGEST, check_whole
from diffjax.text.prompts import Prompts
from diffjax.wiring import check_recipe
from experiments.flags import cli, published

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the run", flag_values=FLAGS)
published.define(FLAGS)
cli.define_step(FLAGS)
flags.DEFINE_string("weights", None, "live, or an average such as ema-0.999", flag_values=FLAGS)
flags.DEFINE_string(
    "host", "127.0.0.1", "address that the page listens at; 0.0.0.0: all of this computer's",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer(
    "port", 7860, "port of the page", lower_bound=1, upper_bound=65535, flag_values=FLAGS
)
flags.DEFINE_list(
    "allowed_packages", [], "your packages that the saved config may name", flag_values=FLAGS
)

DRAWN = "what is drawn"
PARTS = {
    "lower half": ((0.5, 1.0), (0.0, 1.0)),
    "right half": ((0.0, 1.0), (0.5, 1.0)),
    "middle": ((0.25, 0.75), (0.25, 0.75)),
}
"""What can be filled without drawing: rows and columns, as shares of height and width."""
ESTIMATE, STATE = "the estimated picture", "the noisy state"
_SIDE = 384  # in pixels, of a picture that is shown
_COVERED = 64  # of 255: a pixel is drawn on if a quarter of it is
# Gradio's page names scripts and pictures of other hosts. The browser does not load these.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:"
)
_FONTS = ["system-ui", "sans-serif"]


def main(args: SimpleNamespace) -> None:
    """Serves the page until Ctrl-C."""
    run = published.opened(args, args.weights)
    with progress("importing gradio and making the page"):
        demo = page(run, run.model(args.weights))
        address = serve(demo, args.host, args.port)
    print(f"open {address} (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    finally:
        demo.close(verbose=False)


class Wanted(NamedTuple):
    """What is chosen on the page.

    Attributes:
        subject: a class by number, or a prompt.
        guidance_scale: 1 is off.
        num_steps: the number of steps of the solver.
        solver: by name; "" for the run's own.
        seed: the seed of the noise.
        shown: `ESTIMATE` or `STATE`: which pictures on the way.
    """

    subject: Any
    guidance_scale: float
    num_steps: int
    solver: str
    seed: int
    shown: str


class Known(NamedTuple):
    """What stays of a picture that is filled.

    Attributes:
        image: `[1, h, w, c]`, encoded.
        mask: `[1, h, w, 1]`, 1 where it stays.
    """

    image: np.ndarray
    mask: np.ndarray

    def kept(self, x: Any) -> np.ndarray:
        """`x` with what is known."""
        return self.mask * self.image + (1.0 - self.mask) * x


def pictures(
    run: Run, model: Model, wanted: Wanted, known: Known | None = None
) -> Iterator[tuple[np.ndarray, str]]:
    """The pictures `[h, w, 3]` uint8 from noise to a sample, and a line of text about each.

    Raises:
        UserError: a choice that the model can't be sampled with.
    """
    check_whole("seed", wanted.seed, -LARGEST)
    chosen = Chosen(wanted.solver or None, None, wanted.num_steps, wanted.guidance_scale)
    recipe = named_recipe(run, chosen).recipe
    request = Request(model.wired.condition.parse([wanted.subject]), wanted.seed)
    around = known and Partial(editing.keep_known, image=known.image, mask=known.mask)
    begun, total = time.perf_counter(), len(recipe.times(model.wired.path)) - 1
    for step in model.steps(recipe, request, *([around] if around else [])):
        x0 = step.x0 if known is None else known.kept(step.x0)
        done = step.number == total
        latents = step.x if wanted.shown == STATE and not done else x0
        image = shown(model.decoded(np.asarray(latents)))
        seconds = time.perf_counter() - begun
        text = f"step {step.number} of {total}, t = {step.t:.3f}, {seconds:.2f} s"
        if done:
            nfe = "chosen by the solver" if recipe.nfe is None else recipe.nfe
            # The prediction at the last state is the last step, unless a solver makes that itself.
            further = recipe.calls * (total - recipe.solver.finishes)
            text += f", NFE {nfe}, and {further} for the pictures on the way"
        yield image, text


def known_part(model: Model, drawn: Mapping[str, Any] | None, part: str) -> Known:
    """The picture in the editor, encoded, and where it stays.

    Args:
        model: which fills it.
        drawn: `background` and `layers`, PIL images of one size; None for an empty editor.
        part: a name in `PARTS`, or `DRAWN`.

    Raises:
        UserError: there is no picture, or nothing is drawn.
    """
    rows, columns, _ = model.wired.image_shape
    height, width, channels = model.codec.image_shape(model.wired.image_shape)
    if drawn is None or drawn["background"] is None:
        raise UserError("there is no picture to fill: make one, or put one of yours in the editor")
    if channels not in (1, 3):
        raise UserError(f"a picture of {channels} channels can't be filled: take grey or colours")

    def fitted(image: Image.Image, mode: str) -> np.ndarray:
        size = (width, height)
        fit = ImageOps.fit(image.convert(mode), size, Image.Resampling.BOX)
        return np.asarray(fit).reshape(height, width, -1)

    wanted = np.zeros((height, width), bool)
    if part in PARTS:
        (top, bottom), (left, right) = PARTS[part]
        wanted[int(top * height) : int(bottom * height), int(left * width) : int(right * width)] = 1
    for layer in drawn["layers"] if part == DRAWN else ():
        wanted |= fitted(layer, "RGBA")[..., 3] >= _COVERED
    if not wanted.any():
        raise UserError(f"nothing is drawn: draw on the picture, or choose {' or '.join(PARTS)}")
    anew = nearest(wanted[None, ..., None], (rows, columns))
    if not anew.any():
        raise UserError(NO_LATENT)
    image = fitted(drawn["background"], "L" if channels == 1 else "RGB")
    known = 1.0 - anew.astype(np.float32)
    return Known(model.encoded(image[None].astype(np.float32) / 127.5 - 1.0), known)


def shown(images: np.ndarray) -> np.ndarray:
    """The picture `[1, H, W, C]` as `[h, w, 3]` uint8, magnified if it is small."""
    found = image_grid(images, 1)
    scale = -(-_SIDE // max(found.shape[:2]))
    found = found.repeat(scale, axis=0).repeat(scale, axis=1)
    return found.repeat(3 // found.shape[-1], axis=-1)


def solvers_of(run: Run) -> list[str]:
    """The names of the solvers that suit a run."""

    def suits(name: str) -> bool:
        try:
            check_recipe(Chosen(name).of(run.recipe), run.parts.wired)
        except UserError:
            return False
        return True

    return [name for name in choices.SOLVERS if suits(name)]


def _gradio() -> Any:
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise UserError("the gallery needs gradio: pip install 'diffjax[gallery]'") from error


def page(run: Run, model: Model) -> Any:
    """The page of a model, a `gradio.Blocks`.

    Raises:
        UserError: gradio is missing; the model does not start from noise, or is conditioned on
            something else than classes or prompts.
    """
    wired, own = model.wired, named_recipe(run)
    kind = wired.condition
    if wired.objective.traits.starts_at_source:
        raise UserError(f"{run.workdir} makes images from images: use experiments.sample")
    if not isinstance(kind, Unconditional | Classes | Prompts):
        raise UserError(
            "the gallery is for models of classes, of prompts or without a condition, and this is "
            f"one of {kind.describe()}: use experiments.sample"
        )
    gr = _gradio()

    def says(text: str) -> str:
        return f'<p role="status" aria-live="polite">{html.escape(text)}</p>'

    def draw(drawn: Any, part: str | None, *choices: Any) -> Iterator[tuple[Any, Any, Any]]:
        yield gr.skip(), says("starts; a solver is compiled when it is first used"), gr.skip()
        try:
            known = None if part is None else known_part(model, drawn, part)
            image = np.zeros((1, 1, 3), np.uint8)
            for image, text in pictures(run, model, Wanted(*choices), known):
                yield image, says(text), gr.skip()
            # With an alpha, so that Gradio does not write the file again that the browser reads.
            whole = np.pad(image, ((0, 0), (0, 0), (0, 1)), constant_values=255)
            yield gr.skip(), gr.skip(), {"background": whole, "layers": [], "composite": whole}
        except UserError as error:
            yield gr.skip(), says(f"error: {error}"), gr.skip()

    with gr.Blocks(title="diffjax", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.HTML(f"<h1>{html.escape(run.config.name)}</h1><p>{html.escape(repr(run))}</p>")
        with gr.Row():
            with gr.Column():
                if isinstance(kind, Prompts):
                    subject = gr.Textbox(label="Prompt")
                elif isinstance(kind, Classes):
                    names = kind.names or tuple(map(str, range(kind.num_classes)))
                    numbered = [(name, label) for label, name in enumerate(names)]
                    subject = gr.Dropdown(numbered, value=0, label="Class")
                else:
                    subject = gr.State(0)
                its_scale, its_steps = own.recipe.guidance_scale, own.recipe.num_steps
                scale = gr.Slider(
                    min(1, its_scale), max(15, its_scale), its_scale, step=0.1,
                    label="Guidance scale (1 is off)", visible=kind.can_be_dropped,
                )  # fmt: skip
                steps = gr.Slider(1, max(100, its_steps), its_steps, step=1, label="Solver steps")
                its_own = (f"{own.solver} (its own)", "")
                solver = gr.Dropdown([its_own, *solvers_of(run)], value="", label="Solver")
                seed = gr.Number(0, precision=0, label="Seed of the noise")
                pictured = gr.Radio([ESTIMATE, STATE], value=ESTIMATE, label="Shown on the way")
                make = gr.Button("Make a picture", variant="primary")
                stop = gr.Button("Stop")
            with gr.Column():
                picture = gr.Image(
                    label="Picture", format="png", interactive=False, buttons=[], elem_id="picture"
                )  # fmt: skip
                status = gr.HTML(says("nothing is made yet"), elem_id="status")
            with gr.Column():
                gr.Markdown("Draw on what is to be made anew, and fill it.")
                editor = gr.ImageEditor(
                    label="Editor", type="pil", format="png",
                    sources=["upload"], transforms=(), layers=False,
                    brush=gr.Brush(default_size=40, colors=["#ff2d55"], color_mode="fixed"),
                )  # fmt: skip
                part = gr.Radio([DRAWN, *PARTS], value=DRAWN, label="Part that is filled")
                fill = gr.Button("Fill")
        chosen = [subject, scale, steps, solver, seed, pictured]
        nothing = gr.State(None)
        one_at_a_time = {"concurrency_id": "model", "show_progress": "hidden"}
        begin = [make.click, *([subject.submit] if isinstance(kind, Prompts) else [])]
        outputs = [picture, status, editor]
        made = gr.on(begin, draw, [nothing, nothing, *chosen], outputs, **one_at_a_time)
        filled = fill.click(draw, [editor, part, *chosen], outputs, **one_at_a_time)
        stop.click(lambda: says("stopped"), None, status, cancels=[made, filled])
    return demo


def serve(demo: Any, host: str, port: int) -> str:
    """Serves a page, and returns its address while the threads of the server go on.

    Raises:
        UserError: the address can't be listened at.
    """
    gr, starlette = _gradio(), importlib.import_module("starlette.middleware")
    try:
        demo.queue(default_concurrency_limit=1).launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            theme=gr.themes.Default(font=_FONTS, font_mono=["monospace"]),
            app_kwargs={"middleware": [starlette.Middleware(_Header)]},
        )
    except OSError as error:
        raise UserError(f"can't listen at --host={host} --port={port}: {error}") from error
    return f"http://{host}:{port}"


class _Header:
    """Adds the content security policy to each answer."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", _POLICY.encode())
                message = {**message, "headers": [*message["headers"], policy]}
            await send(message)

        await self._app(scope, receive, with_policy)


USAGE = __doc__ or ""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
