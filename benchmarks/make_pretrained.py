"""Makes the pipeline that comes with the package, from 700 PBMCs that come with Scanpy; in 15 minutes on two cores.

    python benchmarks/make_pretrained.py

It is trained, judged and written as `wbdit train`, `wbdit evaluate` and `wbdit push --dry_run` do.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from wbdit_diffusers.data import CellSplit, load_pbmc
from wbdit_diffusers.pretrained import FOLDER, PBMC


DATA = {
    "data_name": "pbmc68k_reduced of Scanpy: 700 of the 68k PBMCs of donor A",
    "data_license": "CC BY 4.0",
    "data_source": "10x Genomics; Zheng et al. 2017, doi 10.1038/ncomms14049, SRP073767",
}


def wbdit(*words: str, **flags: str | Path):
    command = [sys.executable, "-m", "wbdit_diffusers.cli", *words]
    subprocess.run(command + [text for name, value in flags.items() for text in (f"--{name}", str(value))], check=True)


def main():
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        cells, model, report = work / f"{PBMC}.h5ad", work / PBMC, work / "report"
        load_pbmc().write_h5ad(cells)
        wbdit("train", dataset=cells, label_keys="cell_type", output_dir=model)
        wbdit("evaluate", str(model), dataset=cells, output_dir=report)
        wbdit("push", str(model), repo_id=PBMC, report=report, dry_run=work / "repository", **DATA)
        # Which cells were held out: the report can be made again, and the network looked into. The index of the model
        # names no remote code, which is for the Hub.
        for name in (CellSplit.FILE_NAME, "model_index.json"):
            shutil.copyfile(model / name, work / "repository" / name)
        for path in (work / "repository").rglob("*.py"):
            path.unlink()
        size = sum(path.stat().st_size for path in (work / "repository").rglob("*") if path.is_file())
        shutil.rmtree(FOLDER / PBMC, ignore_errors=True)
        shutil.copytree(work / "repository", FOLDER / PBMC)
    print(f"{size:,} bytes in {FOLDER / PBMC}.")


if __name__ == "__main__":
    main()
