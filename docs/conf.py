"""The documentation site: `make docs`. The build downloads nothing."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))

import command_line  # noqa: E402
import docstrings  # noqa: E402
import elsewhere  # noqa: E402

import wbdit_diffusers  # noqa: E402
from wbdit_diffusers.training import config  # noqa: E402


config.DataConfig.label_keys = []  # shown as a list and not as its factory


project = "wbdit_diffusers"
author = "The wbdit_diffusers authors"
copyright = author  # noqa: A001
release = version = wbdit_diffusers.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]
suppress_warnings = ["myst.header"]  # pages of the lab notebook skip levels of headings

# Pages
myst_enable_extensions = ["colon_fence", "attrs_inline"]
myst_heading_anchors = 3
nb_execution_mode = "cache"  # runs the tutorial again only if its cells have changed
nb_execution_in_temp = True  # the tutorial's files are not part of the site
nb_execution_timeout = 1800  # seconds per cell, enough on a busy machine
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_output_stderr = "remove"  # progress bars

# API
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings state types and shapes
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True, "special-members": "__call__"}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Yields", "returns_style")]
toc_object_entries_show_parents = "hide"
add_module_names = False
python_use_unqualified_type_names = True

# Look
html_theme = "furo"
html_title = f"wbdit_diffusers {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
html_favicon = "_static/logo.svg"
html_logo = "_static/logo.svg"
html_theme_options = {
    "sidebar_hide_name": False,
    "light_css_variables": {"color-brand-primary": "#1f5a96", "color-brand-content": "#1f5a96"},
    "dark_css_variables": {"color-brand-primary": "#7db4ea", "color-brand-content": "#7db4ea"},
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
pygments_style = "tango"
pygments_dark_style = "monokai"


def shorten_signature(app, what, name, obj, options, signature, return_annotation):
    """Shortens the signature of a configuration. Its seventy fields are listed below it, with their defaults."""
    if obj is config.TrainingConfig:
        return "(*, output_dir, **fields)", None
    if what == "class" and obj.__module__ == config.__name__:
        return "", None
    return None


def setup(app):
    elsewhere.copy_pages()
    app.connect("source-read", elsewhere.fix_page_links)
    app.connect("source-read", command_line.add_commands)
    app.connect("env-get-outdated", command_line.always_outdated)
    # Priority 100 puts this before napoleon, which reads the result.
    app.connect("autodoc-process-docstring", docstrings.to_rst, priority=100)
    app.connect("autodoc-process-signature", shorten_signature)
