"""The page: what stands where. What its buttons do is in `handlers.py`."""

from pathlib import Path
from typing import Any

import gradio as gr

from ..pretrained import PBMC
from ..version import __version__
from . import handlers
from .run import MAX_CELLS as MAX_TRAINING_CELLS
from .run import MAX_MINUTES
from .uploads import MAX_MEGABYTES


FILE_TYPES = [".h5ad", ".h5"]
THEME = gr.themes.Soft(
    primary_hue=gr.themes.colors.teal,
    secondary_hue=gr.themes.colors.teal,
    neutral_hue=gr.themes.colors.slate,
    radius_size=gr.themes.sizes.radius_md,
    font=("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"),
    font_mono=("ui-monospace", "Consolas", "monospace"),
)
CSS = """
.gradio-container {
  max-width: 1480px !important; margin: 0 auto !important;
  --block-title-background-fill: transparent; --block-title-padding: 0;
  --block-title-text-color: var(--body-text-color);
  --block-label-background-fill: transparent; --block-label-text-color: var(--body-text-color);
}
.block {border-width: 0 !important;}
#title h1 {font-size: 1.7rem; margin: 0.4rem 0 0.1rem 0;}
#title p {color: var(--body-text-color-subdued); margin: 0;}
.facts p {font-size: 0.85rem; color: var(--body-text-color-subdued); margin: 0 0 0 0.1rem;}
#summary h3 {margin: 0;}
#summary p {color: var(--body-text-color-subdued); margin: 0;}
"""
TITLE = """
# Single cells by white-box diffusion
Generates single-cell RNA-seq counts, compares them with real cells, and trains on yours. Everything stays on the
machine that serves this page.
"""
ABOUT = f"""
### What this is
A White-Box Diffusion Transformer ([arXiv 2411.06785](https://arxiv.org/abs/2411.06785)) denoises gene programs and a
library size, which a count likelihood turns into integer counts. The file that you download is an AnnData with counts
in `X`, types and library sizes in `obs`, program activities in `obsm`, and what is needed to make the same cells again
in `uns["wbdit"]`; Scanpy opens it.

### How to read the figures
- **Map**: all cells in one joint embedding. Generated cells should lie where real ones of their type lie.
- **Markers**: three genes that set each type apart in the real cells. Both halves should look alike.
- **Programs**: mean activity of gene programs by type, in standard deviations of the training cells.
- **Quality**: how well a random forest tells generated cells from real ones, beside how well it tells real cells from
  other real ones. It is a quick look; `wbdit evaluate` is the judgement.

### Limits
Generated cells resemble the training data, its donors and its protocol, and nothing else. They are no patients and no
measurement: not for clinical use. Uploaded files have {MAX_MEGABYTES} MB at most, trainings {MAX_TRAINING_CELLS:,}
cells and {MAX_MINUTES} minutes.

wbdit_diffusers {__version__} · Apache-2.0
"""


def build_page(model: str | Path | None = None) -> gr.Blocks:
    """
    The page, not yet served.

    Args:
        model (`str` or `Path`, *optional*):
            The pipeline that it begins with: a folder or a Hub id; the one that comes with the package by default.

    Returns:
        `gradio.Blocks`: to be served by [`launch`].

    Raises:
        ValueError: If `model` cannot be loaded.
    """
    model = str(model or PBMC)
    # Old files of visitors are looked for every hour, and removed after four.
    with gr.Blocks(title="wbdit", analytics_enabled=False, delete_cache=(3600, 4 * 3600)) as page:
        gr.Markdown(TITLE, elem_id="title")
        with gr.Tabs():
            with gr.Tab("Generate", render_children=True):  # else what is not seen gets no updates
                pipeline, source, upload = _generate_tab(model)
            with gr.Tab("Train on my cells", render_children=True):
                _train_tab(pipeline, source, upload)
            with gr.Tab("About"):
                gr.Markdown(ABOUT)
        page.unload(handlers.stop_training)
    return page.queue(default_concurrency_limit=1, max_size=20)


def _generate_tab(model: str) -> tuple[gr.Dropdown, gr.Radio, gr.File]:
    line, types, num_steps, compare_with = handlers.describe(model)
    with gr.Row():
        with gr.Column(scale=2, min_width=330):
            with gr.Group():
                pipeline = gr.Dropdown(
                    [(Path(model).name, model)],
                    value=model,
                    label="Pipeline",
                    info="A folder that a training wrote, or a Hub id.",
                    allow_custom_value=True,
                    elem_id="pipeline",
                )
                facts = gr.Markdown(line, elem_classes="facts", container=True)
            with gr.Group():
                cell_types = gr.Dropdown(
                    types,
                    label="Cell types",
                    info="As many of each. None: as frequent as in training.",
                    multiselect=True,
                    elem_id="cell_types",
                )
                num_cells = gr.Number(500, label="Number of cells", precision=0, elem_id="num_cells")
                with gr.Accordion("Guidance, steps, seed, kind of map", open=False):
                    guidance_scale = gr.Slider(
                        0, 4, 1, step=0.05, label="Guidance", info="1: none. More: types more distinct, less diverse."
                    )
                    num_inference_steps = gr.Slider(1, 200, num_steps, step=1, label="Denoising steps")
                    seed = gr.Number(0, label="Seed", info="The same seed gives the same cells.", precision=0)
                    method = gr.Radio(["t-SNE", "UMAP", "PCA"], value="t-SNE", label="Map")
            with gr.Group():
                source = gr.Radio(
                    [handlers.NOTHING, handlers.PBMC, handlers.FILE],
                    value=compare_with,
                    label="Compare with",
                    elem_id="source",
                )
                upload = gr.File(
                    label=f".h5ad or 10x .h5, up to {MAX_MEGABYTES} MB",
                    file_types=FILE_TYPES,
                    height=110,
                    visible=False,
                    elem_id="upload",
                )
                upload_line = gr.Markdown(visible=False, elem_classes="facts", container=True)
            button = gr.Button("Generate", variant="primary", size="lg", elem_id="generate")
        with gr.Column(scale=5, min_width=560):
            with gr.Row(equal_height=True):
                summary = gr.Markdown(
                    "### No cells yet\nChoose on the left, then press **Generate**.", elem_id="summary", min_height=56
                )
                download = gr.DownloadButton("Download .h5ad", interactive=False, scale=0, min_width=180)
            with gr.Tabs():
                with gr.Tab("Map", render_children=True):
                    map_plot = gr.Plot(show_label=False, format="png", elem_id="map")
                with gr.Tab("Markers", render_children=True):
                    marker_plot = gr.Plot(show_label=False, format="png", elem_id="markers")
                with gr.Tab("Programs", render_children=True):
                    program_plot = gr.Plot(show_label=False, format="png", elem_id="programs")
                with gr.Tab("Quality", render_children=True):
                    judgement_plot = gr.Plot(show_label=False, format="png", elem_id="judgement")
                    verdict = gr.Markdown(elem_id="verdict")
    pipeline.change(handlers.choose_pipeline, [pipeline, source], [facts, cell_types, num_inference_steps, source])
    source.change(handlers.choose_source, source, [upload, upload_line], show_progress="hidden")
    upload.change(handlers.choose_file, upload, upload_line)
    drawn = gr.State(time_to_live=3600)
    shared: dict[str, Any] = {"show_progress_on": summary, "concurrency_id": "cells"}
    button.click(
        handlers.generate,
        [pipeline, cell_types, num_cells, guidance_scale, num_inference_steps, seed, source, upload],
        [drawn, summary, download, map_plot, marker_plot, program_plot, judgement_plot, verdict],
        **shared,
    ).success(handlers.draw_map, [drawn, method], map_plot, **shared).success(
        handlers.draw_markers, drawn, [marker_plot, program_plot], **shared
    ).success(handlers.judge, drawn, [judgement_plot, verdict], **shared)
    return pipeline, source, upload


def _train_tab(pipeline: gr.Dropdown, source: gr.Radio, upload: gr.File):
    with gr.Row():
        with gr.Column(scale=2, min_width=330):
            with gr.Group():
                cells = gr.File(
                    label=f"Counts of up to {MAX_TRAINING_CELLS:,} cells",
                    file_types=FILE_TYPES,
                    height=130,
                    elem_id="training_cells",
                )
                label_key = gr.Dropdown(
                    [handlers.NO_LABELS], label="Cell types", info="The column of obs to condition on."
                )
                minutes = gr.Slider(0.5, MAX_MINUTES, 4, step=0.5, label="Minutes at most")
                line = gr.Markdown("No file yet.", elem_classes="facts", container=True)
            with gr.Row():
                start = gr.Button("Train", variant="primary", size="lg", elem_id="train")
                stop = gr.Button("Stop", size="lg", min_width=80)
        with gr.Column(scale=5, min_width=560):
            with gr.Row(equal_height=True):
                status = gr.Markdown(
                    "A fifth of the cells is held out, and judged on afterwards.", elem_id="status", min_height=40
                )
                archive = gr.DownloadButton("Download the pipeline", interactive=False, scale=0, min_width=270)
            losses = gr.Plot(show_label=False, format="png", elem_id="losses")
            gr.Markdown(
                "Programs of held-out cells vary less than those they were fitted to, so that their loss starts lower."
                " It should fall for as long as that of training cells does.",
                elem_classes="facts",
            )
    cells.change(handlers.choose_training_file, cells, [line, label_key])
    # The losses are the progress: Gradio's own would veil them.
    start.click(
        handlers.train,
        [cells, label_key, minutes],
        [status, losses, archive, pipeline, source, upload],
        show_progress="hidden",
        concurrency_id="training",
    )
    stop.click(handlers.stop_training, concurrency_limit=None)


def launch(
    model: str | Path | None = None, host: str = "127.0.0.1", port: int | None = None, wait: bool = True
) -> gr.Blocks:
    """
    Serves the page. Nothing is sent anywhere: no analytics, no fonts or scripts from elsewhere.

    Args:
        model (`str` or `Path`, *optional*):
            The pipeline that it begins with: a folder or a Hub id; the one that comes with the package by default.
        host (`str`, defaults to `"127.0.0.1"`): The address to listen on; of this machine alone by default.
        port (`int`, *optional*): The port; the first free one from 7860 on by default.
        wait (`bool`, defaults to `True`): Whether to return only when it ends.

    Returns:
        `gradio.Blocks`: the page; `close()` ends it.

    Raises:
        ValueError: If `model` cannot be loaded.
        OSError: If the port is taken.
    """
    page = build_page(model)
    _, url, _ = page.launch(
        **{"server_name": host, "server_port": port, "prevent_thread_lock": True, "quiet": True},
        **{"share": False, "ssr_mode": False, "mcp_server": False, "footer_links": [], "show_error": True},
        max_file_size=MAX_MEGABYTES * 2**20,
        theme=THEME,
        css=CSS,
    )
    print(f"Open {url} in a browser; Ctrl+C ends it.", flush=True)
    if wait:
        page.block_thread()
    return page
