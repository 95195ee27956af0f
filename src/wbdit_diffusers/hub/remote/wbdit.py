"""Where Diffusers finds the class of a component: in the package wbdit_diffusers."""

from wbdit_diffusers import *  # noqa: F403
