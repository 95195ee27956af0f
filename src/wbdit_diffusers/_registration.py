"""Tells Diffusers where our classes are, once a process imports Diffusers. Our own import stays light.

Diffusers looks up a pipeline by name in its own package, and components through two tables of base classes. With our
entries, `model_index.json` holds `["wbdit_diffusers", "WhiteBoxDiTModel"]`.
"""

import importlib.util
import sys
from collections.abc import Iterable
from typing import Any


PACKAGE = __package__
TABLES = "diffusers.pipelines.pipeline_loading_utils"
PIPELINES = ("ScRNAGenerationPipeline", "ScRNAInpaintPipeline", "ScRNAToScRNAPipeline", "ScRNAPipeline")


class _Finder:
    """Calls [`_fill_tables`] after Diffusers has made its tables."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != TABLES:
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (run(module), _fill_tables())
        return spec


def register():
    """Registers our classes with Diffusers, now or as soon as it is imported."""
    if TABLES in sys.modules:
        _fill_tables()
    else:
        sys.meta_path.insert(0, _Finder())


def _fill_tables():
    add_classes(PACKAGE, ["ModelMixin", "ScRNAProcessor"])  # `ModelMixin`, so that any model may replace ours
    diffusers = sys.modules["diffusers"]
    # Diffusers imports the submodule of a class when the class is used. This one is our whole package.
    sys.modules[f"diffusers.{PACKAGE}"] = sys.modules[PACKAGE]
    getattr(diffusers, "_class_to_module", {}).update(dict.fromkeys(PIPELINES, PACKAGE))


def add_classes(module_name: str, class_names: Iterable[str]):
    """Adds classes of a module, which have `save_pretrained` and `from_pretrained`, to the tables."""
    tables, methods = sys.modules[TABLES], dict.fromkeys(class_names, ["save_pretrained", "from_pretrained"])
    tables.LOADABLE_CLASSES.setdefault(module_name, {}).update(methods)
    tables.ALL_IMPORTABLE_CLASSES.update(methods)


def add_components(index: dict[str, Any]):
    """Adds the components in a model_index.json whose classes are in modules that the user has imported."""
    for value in index.values():
        if isinstance(value, list) and value[0] in sys.modules and value[0] not in (PACKAGE, "diffusers"):
            add_classes(value[0], [value[1]])
