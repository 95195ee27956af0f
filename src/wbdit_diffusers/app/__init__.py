"""The page in the browser: `wbdit app`, and `launch` for a Hub Space. Needs the extra `wbdit_diffusers[app]`."""

from .page import launch


__all__ = ["launch"]
