"""Draw a digit in the browser and watch what the network makes of it, as you draw.

    python experiments/demo.py                 # the weights that come with the package
    python experiments/demo.py runs/quick-seed0

Serves a page on this machine alone (127.0.0.1), until Ctrl-C; `--host 0.0.0.0` in a container whose
port is published, and wherever others may come. A network that was trained on folders of images
is given pictures instead of drawings. `experiments/page.py` writes a page that needs no server.
"""

import dataclasses
import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import tyro

from mnist_flax.errors import InputError
from mnist_flax.launch import command_line

# Takes the brush up once the pad is there: Gradio's pad begins without one.
TAKE_BRUSH = """() => {
  const timer = setInterval(() => {
    const brush = document.querySelector('#pad button[aria-label="Brush"]');
    if (brush && document.querySelector('#pad canvas')) { brush.click(); clearInterval(timer); }
  }, 200);
}"""
SHOWN = 280  # side of the network's image on the page, in pixels


@dataclasses.dataclass(frozen=True)
class Command:
    """Options of the script.

    Attributes:
      run: a run's directory or weights; by default "default", which comes with the package.
      host: the address to serve on; 0.0.0.0 is all of this machine's.
      port: the port to serve on.
    """

    run: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    host: str = "127.0.0.1"
    port: int = 7860

    def __post_init__(self):
        if not 0 < self.port < 2**16:
            raise InputError(f"port is {self.port}; give a number from 1 to 65535")


def require_free(host: str, port: int) -> None:
    """Raises InputError unless one can serve there: Gradio's own words blame the port alone."""
    try:
        (family, *_), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        socket.create_server((host, port), family=family).close()
    except (OSError, UnicodeError) as error:  # the latter of what cannot be a host's name
        reason = getattr(error, "strerror", None) or str(error)
        reason = reason.partition(" (while")[0]  # the address again
        raise InputError(f"cannot serve on {host}, port {port}: {reason}") from None


def read_sketch(sketch):
    """Returns the digit on Gradio's pad, [28, 28, 1] uint8, or None where there is none yet."""
    import numpy as np
    from PIL import Image

    from mnist_flax.reports import digits

    drawn = sketch["composite"] if isinstance(sketch, dict) else sketch
    if drawn is None:
        return None
    paper = Image.new("RGBA", drawn.size, "white")
    grey = Image.alpha_composite(paper, drawn.convert("RGBA")).convert("L")
    try:
        return digits.find_digit(digits.find_ink(np.asarray(grey, np.float32) / 255)).image_HWC
    except digits.NoDigitError:
        return None


def make_input(info):
    """Returns what one draws on, or loads a picture into, and the function that reads it."""
    import gradio as gr  # pyright: ignore[reportMissingImports]

    from mnist_flax.datasets.folders import VERSION, read_image

    if info.version == VERSION:
        picture = gr.Image(type="filepath", label="A picture", elem_id="pad")
        return picture, lambda path: path and read_image(path, image_shape=info.image_shape)
    pad = gr.Sketchpad(
        type="pil",
        image_mode="RGBA",
        canvas_size=(400, 400),
        layers=False,
        brush=gr.Brush(default_size=22, colors=["#000000"], color_mode="fixed"),
        label="Draw here",
        elem_id="pad",
    )
    return pad, read_sketch


def make_page(run):
    """Returns the page, a `gradio.Blocks`."""
    import gradio as gr  # pyright: ignore[reportMissingImports]
    import numpy as np
    from PIL import Image

    from mnist_flax.datasets.folders import VERSION
    from mnist_flax.evaluation import Evaluation, predict
    from mnist_flax.reports import familiarity

    names, known = run.info.class_names, run.familiarity
    drawn = run.info.version != VERSION

    def answer(given):
        image = read(given)
        if image is None:
            return {}, None, ""
        logits = predict(run.state, image[None])
        probabilities = Evaluation(logits, np.zeros(1, np.int32)).probabilities_NK[0]
        pixels = image[:, :, 0] if image.shape[-1] == 1 else image
        seen = Image.fromarray(pixels).resize((SHOWN, SHOWN), Image.Resampling.NEAREST)
        strange = ""
        own = familiarity.measurements(run.state, image[None])
        if known is not None and known.distances(own) > 1:
            strange = "It is nothing like what the network was trained on."
        return dict(zip(names, map(float, probabilities), strict=True)), seen, strange

    with gr.Blocks(title="mnist_flax", analytics_enabled=False) as page:
        gr.Markdown("# Draw a digit" if drawn else "# Show a picture")
        with gr.Row():
            pad, read = make_input(run.info)
            with gr.Column():
                label = gr.Label(num_top_classes=10, label="Probabilities", elem_id="answer")
                seen = gr.Image(height=SHOWN, width=SHOWN, label="What the network sees")
                strange = gr.Markdown()
        pad.change(
            answer, pad, [label, seen, strange], show_progress="hidden", trigger_mode="always_last"
        )
        if drawn:
            page.load(None, js=TAKE_BRUSH)
    return page


def main(arguments):
    """Serves the page."""
    command = command_line.parse(Command, arguments, default=Command(), description=__doc__ or "")
    if len(command.run) > 1:
        raise InputError("name one run directory; see --help")
    require_free(command.host, command.port)
    # Gradio asks its own page whether it is there, which a proxy cannot know; it asks no other.
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = "*"
    command_line.begin()

    from mnist_flax.datasets.folders import VERSION
    from mnist_flax.reports.digits import require_shape
    from mnist_flax.reports.runs import load_run

    run = load_run(command.run[0] if command.run else "default")
    print(run, file=sys.stderr)
    if run.info.version != VERSION:
        require_shape(run.info.image_shape)
    try:
        page = make_page(run)
    except ImportError:
        raise InputError("the demo needs gradio: pip install -e '.[demo]'") from None
    page.launch(server_name=command.host, server_port=command.port, share=False)


if __name__ == "__main__":
    command_line.run(main)
