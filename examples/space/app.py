"""The page of `wbdit app` as a Hugging Face Space. WBDIT_MODEL names the pipeline that it begins with."""

import os

from wbdit_diffusers.app import launch


launch(os.environ.get("WBDIT_MODEL"), host="0.0.0.0", port=7860)
