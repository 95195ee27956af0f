"""The layout of the page, and its server. `handlers.py` has the functions behind its controls."""

import threading
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from ..evaluation.figure import embedding
from ..pretrained import PBMC
from ..version import __version__
from . import handlers


MAX_CELLS, MAX_MINUTES, MAX_MEGABYTES = 5000, 10, 100
FILE_TYPES = [".h5ad", ".h5"]
# Gradio's own fonts would come from another server.
FONT, FONT_MONO = ("ui-sans-serif", "system-ui", "sans-serif"), ("ui-monospace", "monospace")
THEME = gr.themes.Soft(primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=FONT, font_mono=FONT_MONO)
# Gradio's own subdued text, labels, selected tabs and buttons have a contrast under 4.5.
SUBDUED = "body_text_color_subdued block_info_text_color block_title_text_color block_label_text_color".split()
CHOSEN = "button_primary_background_fill checkbox_label_background_fill_selected color_accent link_text_color".split()
THEME.set(**dict.fromkeys(SUBDUED, "*neutral_600"), **{f"{name}_dark": "*neutral_300" for name in SUBDUED})
THEME.set(**dict.fromkeys(CHOSEN, "*primary_700"), **{f"{name}_dark": "*primary_700" for name in CHOSEN[:2]})
THEME.set(block_title_background_fill="none", block_label_background_fill="*background_fill_primary")
THEME.set(block_title_background_fill_dark="none", block_label_background_fill_dark="*background_fill_primary")
# A figure keeps its size, so that its text can be read: one that is too wide scrolls.
CSS = """
.gradio-container {width: 100%; min-width: 0 !important; max-width: 1480px !important; margin: 0 auto !important;}
.dark {--color-accent: var(--primary-300) !important;}
@media (max-width: 600px) {.main.fillable {padding: 1rem !important;}}
.facts p {font-size: 0.85rem; color: var(--body-text-color-subdued); margin: 0;}
.prose blockquote {border-left: 4px solid #b45309; background: #fef3c7; padding: 0.5em 0.8em; margin: 0.5em 0;}
.prose blockquote p {color: #451a03 !important; font-size: 0.9rem;}
.figure div:has(> img) {display: block !important; width: 0; min-width: 100%; overflow-x: auto;}
.figure img {zoom: 0.65; max-width: none !important; width: auto !important;}
"""
TITLE = """
# Single cells by white-box diffusion
Generates single-cell RNA-seq counts, compares them with real cells, and trains on your cells. All data stay on the
machine that serves this page.
"""
ABOUT = f"""
### What this is
A White-Box Diffusion Transformer ([arXiv 2411.06785](https://arxiv.org/abs/2411.06785)) denoises gene programs and a
library size. A count likelihood turns them into integer counts. The downloaded file is an AnnData with counts in `X`,
labels and library sizes in `obs`, and program activities in `obsm`. `uns["wbdit"]` records how they were made.

### How to read the figures
- **Map**: all cells in one joint embedding. Generated cells should overlap real cells of their type.
- **Markers**: three marker genes of each type, chosen in the real cells. Both panels should look alike.
- **Programs**: mean activity of gene programs by type, in standard deviations of the training cells.
- **Quality**: how well three classifiers separate generated cells from held-out cells, compared with other real cells.

### Limits
Generated cells reflect the training data, its donors and its protocol, and nothing beyond them. They are not patients
and not measurements: do not use them for clinical decisions. Uploaded files may have {MAX_MEGABYTES} MB, and trainings
may have {handlers.MAX_TRAINING_CELLS:,} cells and {MAX_MINUTES} minutes.

wbdit_diffusers {__version__} · Apache-2.0
"""
LOSS_NOTE = """
The loss of the cells that are held out from training. It should fall and then level off. If it is still falling at
the end, a longer training gives better cells.
"""


def _generate_tab(model: str) -> tuple[gr.Dropdown, gr.Radio, gr.File]:
    """Choices on the left, cells and figures on the right."""
    line, dropdowns, num_steps, fitting, has_counts = handlers.describe(model)
    with gr.Row():
        with gr.Column(scale=2, min_width=240):
            info = "A folder that a training wrote, or a Hub id."
            pipeline = gr.Dropdown([(Path(model).name, model)], label="Pipeline", info=info, allow_custom_value=True)
            facts = gr.Markdown(line, elem_classes="facts")
            info = "Equally many cells of each combination. Default: as frequent as in training."
            labels = [gr.Dropdown(**one, info=info, multiselect=True) for one in dropdowns]
            num_cells = gr.Number(500, label="Number of cells", precision=0, minimum=1, maximum=MAX_CELLS)
            with gr.Accordion("Library size, guidance, steps, seed, map", open=False):
                info = "Expected total counts of each cell. Default: generated."
                library_size = gr.Number(None, label="Library size", info=info, minimum=1, visible=has_counts)
                info = "1: none. Higher: types are more distinct and less diverse."
                guidance_scale = gr.Slider(0, 4, 1, step=0.05, label="Guidance", info=info)
                num_inference_steps = gr.Slider(1, 200, num_steps, step=1, precision=0, label="Denoising steps")
                info = "The same seed gives the same cells."
                seed = gr.Number(0, label="Seed", info=info, precision=0, minimum=0, maximum=2**32 - 1)
                method = gr.Radio([("UMAP", "umap"), ("t-SNE", "tsne"), ("PCA", "pca")], value="umap", label="Map")
            sources = [handlers.NOTHING, handlers.PBMC, handlers.FILE]
            source = gr.Radio(sources, value=fitting, label="Compare with")
            with gr.Column(visible=False) as upload_column:
                label = f".h5ad or 10x .h5, up to {MAX_MEGABYTES} MB"
                upload = gr.File(label=label, file_types=FILE_TYPES, height=110)
                upload_line = gr.Markdown("No file yet.", elem_classes="facts")
            button = gr.Button("Generate", variant="primary")
            progress = gr.HTML(min_height=90, elem_classes="progress")  # which covers no text
        with gr.Column(scale=5, min_width=560):
            summary = gr.Markdown("### No cells yet\nChoose the cells, then press **Generate**.")
            download = gr.DownloadButton("Download .h5ad", interactive=False)
            plots = []
            for name in ("Map", "Markers", "Programs"):
                with gr.Tab(name, render_children=True):
                    plots.append(gr.Plot(show_label=False, format="png", elem_classes="figure"))
            with gr.Tab("Quality", render_children=True):
                verdict = gr.Markdown()
    outputs = [facts, num_inference_steps, source, library_size, *labels]
    pipeline.change(handlers.choose_pipeline, [pipeline, source], outputs, show_progress_on=progress)
    source.change(lambda name: gr.update(visible=name == handlers.FILE), source, upload_column)
    upload.change(handlers.choose_file, upload, upload_line)
    settings = [num_cells, library_size, guidance_scale, num_inference_steps, seed, method, source, upload]
    button.click(
        handlers.generate,
        [pipeline, *labels, *settings],
        [summary, download, *plots, verdict],
        show_progress_on=progress,
    )
    return pipeline, source, upload


def _train_tab(pipeline: gr.Dropdown, source: gr.Radio, upload: gr.File):
    """File and choices on the left, status and loss curve on the right."""
    with gr.Row():
        with gr.Column(scale=2, min_width=240):
            label = f"Counts of up to {handlers.MAX_TRAINING_CELLS:,} cells"
            cells = gr.File(label=label, file_types=FILE_TYPES, height=130)
            line = gr.Markdown("No file yet.", elem_classes="facts")
            info = "Columns of obs to generate cells by, the cell type first. They may be none."
            most = handlers.MAX_LABEL_KEYS
            label_keys = gr.Dropdown([], label="Labels", info=info, multiselect=True, max_choices=most)
            minutes = gr.Slider(0.5, MAX_MINUTES, 4, step=0.5, label="Maximum number of minutes")
            start = gr.Button("Train", variant="primary")
            stop = gr.Button("Stop")
        with gr.Column(scale=5, min_width=560):
            status = gr.Markdown("A fifth of the cells is held out from training.")
            archive = gr.DownloadButton("Download the pipeline", interactive=False)
            losses = gr.Plot(show_label=False, format="png", elem_classes="figure")
            gr.Markdown(LOSS_NOTE, elem_classes="facts")
    cells.change(handlers.choose_training_file, cells, [line, label_keys])
    outputs = [status, losses, archive, pipeline, source, upload]
    start.click(handlers.train, [cells, label_keys, minutes], outputs, show_progress="hidden")
    stop.click(handlers.stop_training, concurrency_limit=None)


def launch(
    model: str | Path | None = None, host: str = "127.0.0.1", port: int | None = None, wait: bool = True
) -> gr.Blocks:
    """
    Serves the page. Nothing is sent elsewhere, and nothing is loaded from elsewhere.

    It starts with `model`, by default the pipeline in this package, on the first free port from 7860. With
    `wait=False`, the page's `close()` ends it instead of Ctrl+C.
    """
    # Files of visitors are looked for every hour, and removed after four.
    with gr.Blocks(title="wbdit", analytics_enabled=False, delete_cache=(3600, 4 * 3600)) as page:
        gr.Markdown(TITLE)
        with gr.Tabs():
            with gr.Tab("Generate", render_children=True):  # otherwise a hidden tab gets no updates
                pipeline, source, upload = _generate_tab(str(model or PBMC))
            with gr.Tab("Train on my cells", render_children=True):
                _train_tab(pipeline, source, upload)
            with gr.Tab("About"):
                gr.Markdown(ABOUT)
        page.unload(handlers.stop_training)
    # The first map would take longer to compile than to draw.
    threading.Thread(target=embedding, args=([np.random.default_rng(0).normal(size=(100, 40))],), daemon=True).start()
    page.queue(default_concurrency_limit=1, max_size=20)
    look: dict[str, Any] = {"theme": THEME, "css": CSS, "footer_links": []}
    safety: dict[str, Any] = {"share": False, "ssr_mode": False, "max_file_size": MAX_MEGABYTES * 2**20}
    server: dict[str, Any] = {"server_name": host, "server_port": port, "prevent_thread_lock": True, "quiet": True}
    _, url, _ = page.launch(show_error=True, **server, **safety, **look)
    print(f"Open {url} in a browser. Ctrl+C closes the page.", flush=True)
    if wait:
        page.block_thread()
    return page
