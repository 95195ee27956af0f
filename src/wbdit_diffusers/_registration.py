"""Tells Diffusers that it can save and load our classes.

`DiffusionPipeline.save_pretrained` and `from_pretrained` look a component's class up in two tables. A class that is in
neither can be saved only under its full module path, which would freeze our file layout, is dropped from the folder
when it is no `ModelMixin` (the processor), and can't be loaded from a Hub id at all. With these entries
`model_index.json` records `["wbdit_diffusers", "WhiteBoxDiTModel"]`, found again in whatever module it lives.

Diffusers imports `wbdit_diffusers` by that name when it loads such a file, so everything listed here must be an
attribute of the package.
"""

from diffusers.pipelines import pipeline_loading_utils


def register(*class_names: str):
    """Adds classes with `save_pretrained` and `from_pretrained` to the tables."""
    methods = {name: ["save_pretrained", "from_pretrained"] for name in class_names}
    pipeline_loading_utils.LOADABLE_CLASSES["wbdit_diffusers"] = methods
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(methods)
