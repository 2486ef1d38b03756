"""The demo page itself, in Gradio, which is imported when a page is built."""

from __future__ import annotations

import dataclasses
import html
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from flax_resnet.errors import UserError
from flax_resnet.serving.answers import Answer, Answers, Evidence, enlarged, pixels_rgb

# Uploads and pictures are deleted so many seconds after they came, looked for as often as that.
KEPT_SECONDS, SWEEP_SECONDS = 600, 60
WAITING = 20
SESSIONS = 100
CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important;
  margin: 0 auto !important; }
.gradio-container main { width: 100%; }
footer { display: none !important; }
.about h1 { font-size: 1.5rem; margin: 0; }
.about .facts, .hint { opacity: 0.75; margin: 0.2rem 0; overflow-wrap: anywhere; }
.wrong { margin: 0; padding: 0.6rem 0.8rem; border-radius: 6px; color: #8a1c1c;
  background: #fdecec; border: 1px solid #f3bcbc; }
.classes ol { list-style: none; margin: 0; padding: 0; }
.classes li { position: relative; display: flex; justify-content: space-between; gap: 1rem;
  margin: 0 0 0.3rem; padding: 0.25rem 0.6rem; border-radius: 4px; overflow: hidden;
  background: rgba(128, 128, 128, 0.12); }
.classes li:first-child { font-weight: 600; }
.classes i { position: absolute; inset: 0 auto 0 0; background: rgba(37, 99, 235, 0.28); }
.classes span { position: relative; font-variant-numeric: tabular-nums; }
.timing span { display: inline-block; margin-right: 1.5rem; font-variant-numeric: tabular-nums; }
#image img { width: 100%; height: 100%; object-fit: contain; }
#image .image-frame { padding-top: 1.7rem; }
#seen .image-container, #overlay .image-container { padding-top: 2rem; }
"""


@dataclasses.dataclass(frozen=True)
class About:
    """What the head of the page says."""

    title: str
    """The network, and the data where they are known."""
    facts: tuple[str, ...]
    """Short statements below it."""


def gradio() -> Any:
    """The package.

    Raises:
      UserError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its dependencies' deprecations are not the user's
            import gradio
    except ImportError as error:
        raise UserError(
            f"the page needs Gradio ({error}): pip install 'flax_resnet[serve]'"
        ) from error
    return gradio


def build(answers: Answers, about: About, examples: Sequence[Path] = ()) -> Any:
    """The page, a ``gradio.Blocks`` that is not launched yet.

    Args:
      answers: gives what it shows.
      about: its head.
      examples: image files that a visitor may click on.

    Raises:
      UserError: Gradio is not installed.
    """
    gr = gradio()
    side = "x".join(map(str, answers.of.preprocessing.shape[:2]))
    with gr.Blocks(
        title=about.title,
        analytics_enabled=False,
        delete_cache=(SWEEP_SECONDS, KEPT_SECONDS),
        fill_width=True,
    ) as page:
        gr.HTML(_head(about), elem_classes="about")
        seen_pixels = gr.State(None, time_to_live=KEPT_SECONDS)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = _uploaded(
                    gr,
                    label=f"Image (at most {answers.limits.megabytes:g} MB)",
                    sources=["upload", "clipboard"],
                    height=300,
                    elem_id="image",
                    buttons=[],
                )
                if examples:
                    image.keep_in_cache |= {str(path) for path in examples}
                    gr.Examples(
                        [[str(path)] for path in examples],
                        image,
                        label="Examples",
                        api_visibility="private",
                    )
            with gr.Column(scale=4, min_width=300):
                status = gr.HTML(_hint(), elem_id="status")
                with gr.Column(visible=False) as results:
                    classes = gr.HTML(elem_id="classes", elem_classes="classes")
                    choice = gr.Radio(
                        label="Grad-CAM for", elem_id="choice", visible=answers.no_evidence is None
                    )
                    with gr.Row():
                        seen = _picture(gr, f"What the network sees ({side})", "seen")
                        overlay = _picture(gr, "Where the evidence lies", "overlay")
                    timing = gr.HTML(elem_id="timing", elem_classes="timing")
        shown = [status, classes, results, choice, seen, overlay, timing, seen_pixels]
        _connect(gr, answers, image, shown)
    return page.queue(max_size=WAITING, api_open=False, default_concurrency_limit=1)


def _connect(gr: Any, answers: Answers, image: Any, shown: Sequence[Any]) -> None:
    """What happens when an image or a class is chosen; one computation at a time."""
    status, classes, results, choice, seen, overlay, timing, seen_pixels = shown

    def look(path: str | None) -> dict[Any, Any]:
        if path is None:
            return nothing(_hint())
        try:
            answer = answers.read(path)
            evidence = _evidence(answers, answer, answer.classes[0])
        except UserError as error:
            return nothing(_wrong(str(error)))
        choices = list(zip(answer.names, answer.classes, strict=True))
        return {
            status: gr.update(value=_note(answer.note), visible=bool(answer.note)),
            classes: _bars(answer),
            results: gr.update(visible=True),
            choice: gr.update(choices=choices, value=answer.classes[0]),
            seen: enlarged(pixels_rgb(answer.pixels)),
            overlay: evidence and evidence.overlay,
            timing: _timing(answers, answer, evidence),
            seen_pixels: answer,
        }

    def said(text: str) -> Any:
        return gr.update(value=text, visible=True)

    def nothing(text: str) -> dict[Any, Any]:
        empty = dict.fromkeys((seen, overlay, seen_pixels))
        hidden = gr.update(visible=False)
        return {**empty, status: said(text), results: hidden, classes: "", timing: ""}

    def explain(index: int | None, answer: Answer | None) -> dict[Any, Any]:
        if answer is None or index not in answer.classes:
            return {status: said(_wrong("this image is no longer kept: drop it again"))}
        evidence = _evidence(answers, answer, index)
        return {
            overlay: evidence and evidence.overlay,
            timing: _timing(answers, answer, evidence),
        }

    # Private: no endpoints for clients. The two kinds of work wait for each other.
    options = {
        "concurrency_id": "device",
        "concurrency_limit": 1,
        "api_visibility": "private",
        "show_progress": "minimal",
        "show_progress_on": [image],
    }
    gr.on([image.change], look, image, shown, **options)
    gr.on([choice.input], explain, [choice, seen_pixels], [status, overlay, timing],
          **options)  # fmt: skip


def _evidence(answers: Answers, answer: Answer, index: int) -> Evidence | None:
    return None if answers.no_evidence else answers.evidence(answer.pixels, index)


def _uploaded(gr: Any, **options: Any) -> Any:
    """A gradio.Image that gives the path of the very bytes that were uploaded.

    Pillow is asked neither to convert the image nor whether it is one. The methods are replaced on
    the object: a subclass would have Gradio write a file of stubs beside this module.
    """
    image = gr.Image(**options)
    move = image.async_move_resource_to_block_cache

    def path_of(payload: Any) -> str | None:
        return payload.path if payload is not None else None

    async def only_files(url_or_path: Any) -> str | None:
        if str(url_or_path).lower().startswith(("http:", "https:")):
            raise gr.Error("addresses are not fetched: upload a file", print_exception=False)
        return await move(url_or_path)

    image.preprocess, image.async_move_resource_to_block_cache = path_of, only_files
    return image


def _picture(gr: Any, label: str, name: str) -> Any:
    return gr.Image(
        label=label, elem_id=name, format="png", interactive=False, height=300,
        buttons=["fullscreen"], alt_text=label,
    )  # fmt: skip


def _head(about: About) -> str:
    facts = " · ".join(map(html.escape, about.facts))
    return f'<h1>{html.escape(about.title)}</h1><p class="facts">{facts}</p>'


def _hint() -> str:
    return '<p class="hint">Drop an image, or choose one.</p>'


def _wrong(message: str) -> str:
    text = html.escape(message[:1].upper() + message[1:])
    return f'<p class="wrong" role="alert">{text}.</p>'


def _note(note: str) -> str:
    return f'<p class="hint">{html.escape(note)}</p>' if note else ""


def _bars(answer: Answer) -> str:
    items = (
        f'<li><i style="width: {100 * p:.2f}%"></i><span>{html.escape(name)}</span>'
        f"<span>{p:.4f}</span></li>"
        for name, p in zip(answer.names, answer.probabilities, strict=True)
    )
    return f"<ol>{''.join(items)}</ol>"


def _timing(answers: Answers, answer: Answer, evidence: Evidence | None) -> str:
    parts = {"decode and resize": answer.decode_ms, "network": answer.network_ms}
    if evidence is not None:
        parts["Grad-CAM"] = evidence.ms
    times = " ".join(f"<span>{name} {ms:.1f} ms</span>" for name, ms in parts.items())
    missing = answers.no_evidence
    return times + (f"<p>No Grad-CAM: {html.escape(missing)}.</p>" if missing else "")


def device_facts(module: Any) -> tuple[str, str]:
    """(the device that computes, the type of number that it computes in)."""
    device = jax.devices()[0]
    kind = device.platform.upper() if device.platform == "cpu" else device.device_kind
    return kind, str(jax.numpy.dtype(getattr(module, "dtype", None) or "float32"))
