"""The commands of docs/ten_minutes.md run: from a file to a pipeline that loads by its Hub id."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT


BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# The same commands with less work
SMALLER = {
    "--max_train_minutes 4": "--max_train_steps 5 --codec_max_steps 20 --decoder_steps 5 --num_programs 6",
    "--num_cells 5000": "--num_cells 50",
    "--output_dir report": "--output_dir report --num_samples 1 --no-baselines --num_inference_steps 2",
}
RUN = """
import shlex, sys
from wbdit_diffusers.cli import main
import wbdit_diffusers.evaluation.classifiers as classifiers

classifiers.NUM_TREES, classifiers.NUM_ROUNDS = 20, 20
for line in sys.stdin.read().splitlines():
    main(shlex.split(line)[1:])
"""


@pytest.mark.slow
def test_the_page_leads_to_a_pipeline_on_the_hub(hub, hub_environment, tmp_path):
    text = (ROOT / "docs" / "ten_minutes.md").read_text().split("## Without a command line")[0]
    blocks = BLOCK.findall(text)
    commands = [line for kind, code in blocks if kind == "bash" for line in code.replace("\\\n", "").splitlines()]
    assert len(commands) <= 11 and "hf auth login" in commands  # here HF_TOKEN
    for whole, smaller in SMALLER.items():
        assert sum(whole in command for command in commands) == 1, f"the page has no {whole} any more: fix this test"
        commands = [command.replace(whole, smaller) for command in commands]

    def run(*arguments: str, given: str = ""):
        command = [sys.executable, *arguments]
        settings = {"cwd": tmp_path, "env": hub_environment, "capture_output": True, "text": True}
        result = subprocess.run(command, input=given, **settings)
        assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
        return result.stdout

    assert commands[0].startswith('cd "$(mktemp -d ')  # a new folder, as `tmp_path` is here
    first = re.match(r'python -c "(.*)"$', commands[1])
    run("-c", first.group(1))
    # `wbdit explain` takes two minutes and has its own tests.
    taken = [command for command in commands if command.startswith("wbdit ") and "explain" not in command]
    assert len(taken) == 5
    said = run("-c", RUN, given="\n".join(taken))
    assert "50 cells × 765 genes" in said and "Published: " in said and "/me/wbdit-pbmc" in said
    assert (tmp_path / "report" / "report.png").is_file()
    last = [code for kind, code in blocks if kind == "python"][-1].replace("num_cells=1000", "num_cells=20")
    assert 'from_pretrained("me/wbdit-pbmc")' in last
    (tmp_path / "wbdit-pbmc").rename(tmp_path / "moved")  # so that it comes from the Hub
    assert run("-c", f"{last}\nprint(cells.shape)").strip().endswith("(20, 765)")
    assert "me/wbdit-pbmc" in hub.repos
