"""Registers our classes with Diffusers.

Diffusers looks up the class of a component in two tables. Without an entry, a class is saved under its module path, a
processor is not saved at all, and a Hub id can't be loaded. With the entry, `model_index.json` holds
`["wbdit_diffusers", "WhiteBoxDiTModel"]`, so each class must be an attribute of the package.
"""

from diffusers.pipelines import pipeline_loading_utils


def register(*class_names: str):
    """Adds classes with `save_pretrained` and `from_pretrained` to the tables."""
    methods = {name: ["save_pretrained", "from_pretrained"] for name in class_names}
    pipeline_loading_utils.LOADABLE_CLASSES["wbdit_diffusers"] = methods
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(methods)
