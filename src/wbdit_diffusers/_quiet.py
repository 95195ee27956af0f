"""A warning of Diffusers that says nothing, left out."""

import logging


def drop_empty_warnings():
    """
    `ModelMixin.to(dtype)` of Diffusers 0.42 warns of "modules that should be kept in float32: []", for every model,
    where it means to warn of those that have some. The others are still told.
    """
    models = logging.getLogger("diffusers.models.modeling_utils")
    models.addFilter(lambda record: "should be kept in float32: []." not in record.getMessage())
