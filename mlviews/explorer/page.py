"""The page in the browser: Gradio over a session. Whatever computes is elsewhere."""

from __future__ import annotations

import base64
import dataclasses
import functools
import html
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.utils import get_upload_folder
from torch import Tensor

from mlviews.explorer import costs, pictures, serving, state
from mlviews.explorer.session import Session
from mlviews.explorer.state import PRESET, UNITS, Row, Setting, State
from mlviews.explorer.uploads import MOST_BYTES, MOST_FILES, read_uploads

STYLE = """
.pictures { display: flex; flex-wrap: wrap; column-gap: 2em; }
.mlviews { margin: 0 0 1em 0; max-width: 100%; }
.mlviews figcaption { margin-bottom: .3em; }
.mlviews img { image-rendering: pixelated; max-width: 100%; height: auto; }
.mlviews .names { display: flex; font-size: .8em; max-width: 100%; }
.mlviews .names span { flex: 1; text-align: center; overflow: hidden; white-space: nowrap; }
.level { padding: 0 .8em .4em .8em !important; }
.level fieldset .wrap { gap: 4px; }
.level fieldset label { padding: 4px 7px; font-size: .9em; }
"""

# The state is in the address: it can be reloaded, kept, and sent around.
ADDRESS = "(query) => { history.replaceState(null, '', query); return location.href; }"

# Gradio's sliders are released by a pointer only: here by a key, too.
KEYS = """() => document.addEventListener('keyup', (event) => {
    if (event.target.type === 'range') {
        event.target.dispatchEvent(new PointerEvent('pointerup', { bubbles: true }));
    }
})"""

FIELDS = tuple(field.name for field in dataclasses.fields(State) if field.name != "settings")
"""The fields of a state that have a control each, in the order in which their values are sent."""

CHOICES = {PRESET: "as the preset"}
"""How kinds of perturbers are called on the page, where that is not their name."""

HIDDEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
QUICK: dict[str, Any] = {"queue": False, **HIDDEN}
"""How events are handled that do not wait for the generator."""

RENDER: dict[str, Any] = {
    "trigger_mode": "always_last",
    "concurrency_limit": 1,
    "concurrency_id": "generator",
    "api_visibility": "private",
}
"""How events are handled that do: one at a time, and of a browser tab's requests only the last one waits."""

MORE = 5
"""Positives that the button adds."""

USUAL = 4.0
"""The end of the sliders for standard deviations, unless the value lies beyond."""


def application(session: Session, host: str = "127.0.0.1") -> FastAPI:
    """Return the application of a session, to be served on a host.

    It reads no file but uploads, shares nothing, and reports nothing to anyone.
    """
    app = serving.application(host)
    gr.mount_gradio_app(
        app,
        Page(session).blocks,
        path="/",
        allowed_paths=[],
        max_file_size=MOST_BYTES,
        ssr_mode=False,
        run_history=False,
        css=STYLE,
        js=KEYS,
        footer_links=[],
    )
    return app


def explained(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show a mistake on the page, as one line, in the place of a traceback in the log."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except (ValueError, OSError) as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from None

    return call


class Page:
    """The page of one session; every browser tab has its own controls, all share the generator.

    Args:
        session: what computes.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.rows = session.rows
        self.controls: dict[str, Any] = {}  # by the state's fields
        # Of each row: the kind of perturber, how far, its truncation, and what it costs.
        self.kinds: list[Any] = []
        self.amounts: list[Any] = []
        self.cuts: list[Any] = []
        self.costs: list[Any] = []
        initial = session.initial
        with gr.Blocks(
            analytics_enabled=False,
            title=f"mlviews explore {session.preset}",
            fill_width=True,
            delete_cache=(600, 600),
        ) as self.blocks:
            gr.Markdown(self._headline())
            with gr.Tab("Views", id="views"):
                self._make_views(initial)
            with gr.Tab("Latents", id="latents") as self.latents_tab:
                self._make_latents(initial)
            with gr.Tab("Your images", id="images") as self.images_tab:
                self._make_images(initial)
            with gr.Tab("Take it away", id="away"):
                self._make_away()
            self._connect()
        # A client may name any path, or an address to download from, in the place of any value; of a mounted
        # page Gradio itself does not look at them.
        for block in self.blocks.blocks.values():
            block.async_move_resource_to_block_cache = _upload_only

    def _headline(self) -> str:
        generator = self.session.generator
        shape = "×".join(map(str, generator.image_shape))
        levels = len(generator.levels)
        return (
            f"**mlviews explore** · {html.escape(self.session.preset)} · {levels} levels, images {shape}, on "
            f"{self.session.source.device}"
        )

    # -- what is on the page ---------------------------------------------------------------------------------

    def _make_views(self, initial: State) -> None:
        with gr.Row():
            with gr.Column(scale=1, min_width=400):
                for row, setting in zip(self.rows, initial.settings, strict=True):
                    self._make_row(row, setting)
                gr.Markdown("Costs are those of a level that is moved alone. Together levels cost more.")
                self.spend = gr.Slider(
                    0, 4, 0.7, step=0.05, label="spend the same at every level (nats)", elem_id="spend"
                )
                missing = self.session.missing
                self.measure = gr.Button(
                    f"Measure {missing}", elem_id="measure", size="sm", visible=bool(missing)
                )
                self.stop = gr.Button("Stop measuring", size="sm", visible=False)
                self.measured = gr.Markdown(elem_id="measured")
            with gr.Column(scale=3, min_width=500):
                with gr.Row(equal_height=True):
                    self.controls["seed"] = gr.Number(
                        initial.seed, label="seed", precision=0, minimum=0, elem_id="seed", min_width=90
                    )
                    most = min(state.ANCHORS, self.session.source.num_samples)
                    self.controls["anchors"] = gr.Slider(
                        1, most, initial.anchors, step=1, label="anchors", min_width=150
                    )
                    self.controls["views"] = gr.Slider(
                        2, state.VIEWS, initial.views, step=1, label="views of each", min_width=150
                    )
                    with gr.Column(min_width=110):
                        self.anew = gr.Button("New anchors", elem_id="anew", size="sm")
                        self.more = gr.Button("More positives", elem_id="more", size="sm")
                self.status = gr.Markdown(elem_id="status")
                self.pictures = gr.HTML()

    def _make_row(self, row: Row, setting: Setting) -> None:
        slider, cut = _amount(setting), _cut(setting)
        with gr.Group(elem_classes="level", elem_id=f"level-{row.levels[0]}"):
            self.costs.append(gr.HTML(self._row_text(row, setting), padding=True))
            choices = [(CHOICES.get(kind, kind), kind) for kind in row.kinds]
            label = f"perturber of level {row.key}"
            self.kinds.append(
                gr.Radio(choices, value=setting.kind, label=label, show_label=False, container=False)
            )
            with gr.Row():
                name = f"amount-{row.levels[0]}"
                self.amounts.append(gr.Slider(0, step=0.01, min_width=180, elem_id=name, scale=3, **slider))
                self.cuts.append(gr.Number(label="cut at (std)", min_width=80, **cut))

    def _make_latents(self, initial: State) -> None:
        levels = self.session.generator.levels
        with gr.Row():
            names = [(f"{index} · {level.name}", index) for index, level in enumerate(levels)]
            self.controls["level"] = gr.Dropdown(names, value=initial.level, label="level", min_width=120)
            self.controls["dim"] = gr.Number(
                None, label="coordinate (empty: leading directions)", precision=0, min_width=120
            )
            self.controls["span"] = gr.Slider(
                0.5, 8, initial.span, step=0.5, label="span (std)", min_width=140
            )
            self.controls["steps"] = gr.Slider(
                2, state.STEPS, initial.steps, step=1, label="steps", min_width=140
            )
            self.controls["split"] = gr.Slider(
                0, len(levels), initial.split, step=1, label="split: levels of the row",
                min_width=160, elem_id="split",
            )  # fmt: skip
        self.latents_status = gr.Markdown()
        self.traversal = gr.HTML()
        self.intervention = gr.HTML()
        self.recombination = gr.HTML()

    def _make_images(self, initial: State) -> None:
        session = self.session
        self.uploads = gr.State(None, time_to_live=3600)
        if not session.encodes:
            gr.Markdown(
                f"Generator {html.escape(session.generator.name)} has no encoder: train one with "
                "`mlviews inverter`, and load it by `generator: {name: ..., inverter: FILE}`."
            )
        text = f"PNG, JPEG, WebP, BMP or GIF; at most {MOST_FILES} files of {MOST_BYTES >> 20} MB"
        self.files = gr.File(
            file_count="multiple", label=text, height=110, elem_id="files", visible=session.encodes
        )
        self.controls["keep"] = gr.Slider(
            0, len(session.generator.levels), initial.keep, step=1, visible=session.encodes,
            label="levels that purification keeps; the finer ones are drawn anew",
        )  # fmt: skip
        self.refusals = gr.Markdown(elem_id="refusals")
        self.images = gr.HTML()

    def _make_away(self) -> None:
        self.link = gr.Textbox(label="a link with the state", buttons=["copy"], elem_id="link")
        self.query = gr.Textbox(visible=False)
        self.downloads = gr.HTML()
        with gr.Row():
            self.yaml = gr.Code(label="the preset (YAML)", language="yaml", interactive=False)
            self.python = gr.Code(label="Python", language="python", interactive=False)

    # -- what happens ----------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Say what is rendered when: sliders act when they are released."""
        self._inputs = [self.controls[name] for name in FIELDS] + self.kinds + self.amounts + self.cuts
        self._connect_views()
        self._connect_latents()
        self._connect_images()
        self._connect_measuring()

    def _rendering(self, dependency: Callable[..., Any]) -> None:
        """Let the pictures of the tab "Views", and the address, follow an event."""
        outputs = [self.status, self.pictures, self.query, self.downloads, self.yaml, self.python]
        outputs += self.costs
        event = dependency(fn=explained(self.render), inputs=self._inputs, outputs=outputs, **RENDER)
        event.then(None, self.query, self.link, js=ADDRESS, **QUICK)

    def _connect_views(self) -> None:
        seed, anchors, views = (self.controls[name] for name in ("seed", "anchors", "views"))
        perturbers = self.kinds + self.amounts + self.cuts
        kinds = [kind.input for kind in self.kinds]
        chosen = gr.on(kinds, explained(self.adjusted), perturbers, self.amounts + self.cuts, **QUICK)
        self._rendering(chosen.then)
        triggers = [seed.submit, seed.blur, anchors.release, views.release]
        triggers += [amount.release for amount in self.amounts]
        triggers += [trigger for cut in self.cuts for trigger in (cut.submit, cut.blur)]
        self._rendering(functools.partial(gr.on, triggers))
        self._rendering(self.anew.click(_next_seed, seed, seed, **QUICK).then)
        self._rendering(self.more.click(_more_views, views, views, **QUICK).then)
        spent = self.spend.release(explained(self.spent), [self.spend, *self._inputs], perturbers, **QUICK)
        self._rendering(spent.then)
        self._rendering(self.blocks.load(self.start, None, self._inputs, **QUICK).then)

    def _connect_latents(self) -> None:
        level, dim, span, steps, split = (
            self.controls[name] for name in ("level", "dim", "span", "steps", "split")
        )
        triggers = [level.input, dim.submit, dim.blur, span.release, steps.release, split.release]
        outputs = [self.latents_status, self.traversal, self.intervention, self.recombination]
        triggers += [self.latents_tab.select]
        event = gr.on(
            triggers, explained(self.render_latents), self._inputs, [*outputs, self.query], **RENDER
        )
        event.then(None, self.query, self.link, js=ADDRESS, **QUICK)

    def _connect_images(self) -> None:
        inputs = [self.uploads, *self._inputs]
        read = self.files.upload(
            explained(self.upload),
            [self.files, self.uploads],
            [self.files, self.uploads, self.refusals],
            **RENDER,
        )
        read.then(explained(self.render_images), inputs, self.images, **RENDER)
        triggers = [self.images_tab.select, self.controls["keep"].release]
        gr.on(triggers, explained(self.render_images), inputs, self.images, **RENDER)

    def _connect_measuring(self) -> None:
        outputs = [self.measured, self.measure, self.stop]
        # Everyone may look on, and nobody waits for the generator meanwhile.
        event = self.measure.click(self.run_measurement, None, outputs, concurrency_limit=None, **HIDDEN)
        self._rendering(event.then)
        self.stop.click(self.session.close, None, None, **QUICK)

    def state_of(self, values: Sequence[Any]) -> State:
        """Return the state of the controls' values.

        Raises:
            ValueError: if a value is out of range.
        """
        fields, perturbers = values[: len(FIELDS)], values[len(FIELDS) :]
        numbers = dict(zip(FIELDS, fields, strict=True))
        # Whole numbers come as floats from some controls, and as None from empty ones.
        whole = {name: int(value) for name, value in numbers.items() if name != "span" and value is not None}
        settings = [
            Setting(kind, float(amount), float(cut) if cut else None)
            for kind, amount, cut in self._perturbers_of(perturbers)
        ]
        current = State(tuple(settings), **{**numbers, **whole})
        current.check(self.rows, len(self.session.generator.levels))
        return current

    def _perturbers_of(self, values: Sequence[Any]) -> Iterator[tuple[Any, Any, Any]]:
        """Return kind, amount and truncation of each row."""
        count = len(self.rows)
        kinds, amounts, cuts = (values[start : start + count] for start in (0, count, 2 * count))
        return zip(kinds, amounts, cuts, strict=True)

    def adjusted(self, *values: Any) -> list[Any]:
        """Return sliders and truncations that fit the kinds of perturbers."""
        settings = [
            Setting(kind, min(amount, state.LARGEST[UNITS.get(kind, "std")]), cut or None)
            for kind, amount, cut in self._perturbers_of(values)
        ]
        return _perturbers(settings)[len(self.rows) :]

    def values_of(self, current: State) -> list[Any]:
        """Return what changes of the controls for a state."""
        return [*(getattr(current, name) for name in FIELDS), *_perturbers(current.settings)]

    def start(self, request: gr.Request) -> list[Any]:
        """Return the controls' values for the link that the page was opened by."""
        current = self.session.initial
        text = request.query_params.get("state")
        if text is not None:
            try:
                current = self.session.read(text)
            except ValueError as error:
                gr.Warning(html.escape(f"{error} The page begins with the preset instead."))
        return self.values_of(current)

    def render(self, *values: Any) -> list[Any]:
        """Return the pictures of the tab "Views", and what is to take away."""
        current = self.state_of(values)
        begin = time.perf_counter()
        views = self.session.views(current)
        size = f"{len(views.generated[0])} × {len(views.generated)}"
        figures = [_views("generated", "anchor | positives, as generated", views.generated)]
        if views.augmented is not None:
            figures.append(_views("augmented", "the same after T_x", views.augmented))
        figures.append(self._alone(current, views.alone, views.generated[1]))
        seconds = time.perf_counter() - begin
        configuration = self.session.configuration_of(current)
        yaml, python = state.preset_yaml(configuration, current), state.python_lines(configuration, current)
        downloads = f"{_download('preset.yaml', yaml)} · {_download('views.py', python)}"
        texts = [
            self._row_text(row, setting) for row, setting in zip(self.rows, current.settings, strict=True)
        ]
        status = f"{size} views in {seconds * 1000:.0f} ms"
        return [status, _together(figures), self._query(current), downloads, yaml, python, *texts]

    def _query(self, current: State) -> str:
        """Return the part of the page's address that holds the state."""
        return f"?state={urllib.parse.quote(current.json(self.rows), safe='{}:,.')}"

    def _alone(self, current: State, columns: Sequence[Tensor], together: Tensor) -> str:
        """Return the picture of each row moved alone."""
        if len(columns) < 2:
            return ""
        anchor, *alone = columns
        names = [
            f"{row.key} · {row.name}"
            for row, setting in zip(self.rows, current.settings, strict=True)
            if setting.kind != "fixed"
        ]
        caption = "anchor | the first positive, one level moved alone | all together"
        return pictures.picture(
            [[anchor], alone, [together]], "alone", caption, "levels.png", ["anchor", *names, "all"]
        )

    def _row_text(self, row: Row, setting: Setting) -> str:
        """Return the name of a row, and what its setting costs."""
        measured = self.session.costs
        cost = costs.described(measured.nats(row, setting), measured.class_kept(row, setting))
        return f"<b>{row.key} · {html.escape(row.name)}</b> &ensp; {cost}"

    def spent(self, nats: float, *values: Any) -> list[Any]:
        """Return the perturbers that spend the same at every level."""
        current = self.state_of(values)
        measured = self.session.costs
        if measured.report is None:
            raise ValueError("What levels cost is not known yet: measure it, or start with --report DIR.")
        settings = [
            measured.spend(row, setting, nats)
            for row, setting in zip(self.rows, current.settings, strict=True)
        ]
        return _perturbers(settings)

    def render_latents(self, *values: Any) -> list[str]:
        """Return the pictures of the tab "Latents"."""
        current = self.state_of(values)
        begin = time.perf_counter()
        name = f"level {current.level} · {html.escape(self.session.generator.levels[current.level].name)}"
        axis = "its leading directions" if current.dim is None else f"coordinate {current.dim}"
        moved = f"traverse: {name} along {axis}, from −{current.span:g} to {current.span:g} std"
        level_set = f"intervene: anchor | {name} set to the first anchor's | finer levels drawn anew"
        mixed = f"recombine: levels below {current.split} of the row's anchor, the others of the column's"
        figures = [
            pictures.picture(self.session.traversal(current), "traversal", moved, "traverse.png"),
            pictures.picture(self.session.intervention(current), "intervention", level_set, "intervene.png"),
            pictures.picture(self.session.recombination(current), "recombination", mixed, "recombine.png"),
        ]
        return [f"{(time.perf_counter() - begin) * 1000:.0f} ms", *figures, self._query(current)]

    def upload(self, files: Sequence[str] | None, images: Tensor | None) -> tuple[None, Tensor | None, str]:
        """Read uploaded files; images that are there stay if none could be read."""
        read, refusals = read_uploads(files or (), self.session.shape)
        return None, images if read is None else read, "\n\n".join(map(html.escape, refusals))

    def render_images(self, images: Tensor | None, *values: Any) -> str:
        """Return the picture of the tab "Your images"."""
        session = self.session
        if not session.encodes or (images is None and session.source.images is None):
            return ""
        pictured = session.own_images(self.state_of(values), images)
        groups = [[pictured.images], [pictured.reconstructed], pictured.positives, pictured.purified]
        caption = "image | what the generator makes of its latents | positives | purified"
        return pictures.picture(groups, "images", caption, "images.png")

    def run_measurement(self) -> Iterator[list[Any]]:
        """Measure what is missing, or look on at a measurement that is under way."""
        try:
            job = self.session.measure()
        except OSError as error:
            yield [html.escape(str(error)), gr.skip(), gr.skip()]
            return
        while job.is_running:
            yield [html.escape(job.progress), gr.Button(interactive=False), gr.Button(visible=True)]
            time.sleep(1)
        missing = self.session.missing
        again = gr.Button(f"Measure {missing}", interactive=True, visible=bool(missing))
        yield [html.escape(job.text), again, gr.Button(visible=False)]


async def _upload_only(path: str | Path | None) -> str:
    """Return the path of a file that a browser has sent, and of no other."""
    folder = Path(get_upload_folder()).resolve()
    if path is None or not Path(path).resolve().is_relative_to(folder):
        raise gr.Error("That file was not uploaded here.", print_exception=False)
    return str(path)


def _views(name: str, caption: str, views: Sequence[Tensor]) -> str:
    """Return the picture of anchors and positives."""
    return pictures.picture([views[:1], views[1:]], name, caption, f"views-{name}.png")


def _together(figures: Sequence[str]) -> str:
    """Return pictures side by side, as far as they find room."""
    return f'<div class="pictures">{"".join(figures)}</div>'


def plain_values(current: State) -> list[Any]:
    """Return the controls' values for a state, as a browser sends them."""
    settings = current.settings
    kinds = [setting.kind for setting in settings]
    amounts = [setting.amount for setting in settings]
    cuts = [setting.truncation for setting in settings]
    return [*(getattr(current, name) for name in FIELDS), *kinds, *amounts, *cuts]


def _amount(setting: Setting) -> dict[str, Any]:
    """Return what the slider of a setting is like."""
    unit = UNITS.get(setting.kind)
    most = state.LARGEST[unit or "std"]
    return {
        "value": setting.amount,
        "maximum": most if setting.amount > USUAL else min(most, USUAL),
        "label": unit or "std",
        "visible": unit is not None,
    }


def _cut(setting: Setting) -> dict[str, Any]:
    """Return what the field for a setting's truncation is like."""
    return {"value": setting.truncation, "visible": setting.kind == "normal"}


def _perturbers(settings: Sequence[Setting]) -> list[Any]:
    """Return the controls of all rows: kinds, amounts, truncations."""
    amounts = [gr.Slider(**_amount(setting)) for setting in settings]
    cuts = [gr.Number(**_cut(setting)) for setting in settings]
    return [*(setting.kind for setting in settings), *amounts, *cuts]


def _next_seed(seed: float | None) -> int:
    return int(seed or 0) + 1


def _more_views(views: float) -> int:
    return min(int(views) + MORE, state.VIEWS)


def _download(name: str, text: str) -> str:
    """Return a link that downloads a text, which is in the link."""
    content = base64.b64encode(text.encode()).decode()
    return f'<a download="{name}" href="data:text/plain;base64,{content}">download {name}</a>'
