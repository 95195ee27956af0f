"""The page in the browser: `wbdit app`, and `launch` for a Hub Space. Needs the extra `wbdit_diffusers[app]`."""

from .page import build_page, launch


__all__ = ["build_page", "launch"]
