"""The dataset card of a prepared folder."""

import html
from pathlib import Path
from typing import Any


def write_card(folder: Path, metadata: dict[str, Any]):
    """
    Writes README.md, whose head tells the Hub and `datasets` which file is which split.

    Args:
        folder (`Path`): The prepared folder.
        metadata (`dict`): What stands in its `prepared.json`.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    splits = {split: sum(files.values()) for split, files in metadata["splits"].items()}
    data = DatasetCardData(
        tags=["single-cell", "scRNA-seq", "wbdit_diffusers"],
        configs=[
            {
                "config_name": "cells",
                "default": True,
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits],
            },
            {"config_name": "genes", "data_files": "genes.parquet"},
        ],
    )
    holds = "integer counts" if metadata["values"] == "counts" else "values on a log scale"
    rows = "\n".join(f"| {split} | {number:,} |" for split, number in splits.items())
    labels = "\n".join(
        f"- {_escape(key)}: {', '.join(map(_escape, names[:30]))}{', …' if len(names) > 30 else ''}"
        for key, names in metadata["labels"].items()
    )
    files = ", ".join(map(_escape, metadata["files"]))
    text = f"""---
{data.to_yaml()}
---

# Single cells

{sum(splits.values()):,} cells × {metadata["num_genes"]:,} genes, {holds}, shuffled. Prepared from
{files} ({metadata["num_cells_in_files"]:,} cells) by
`wbdit prepare`: cells with fewer than {metadata["min_counts"]} counts or {metadata["min_genes"]} expressed genes
were left out, and the test split was drawn at random within each label.

| split | cells |
|---|---|
{rows}

Each row is a cell: `genes` are row numbers of `genes.parquet`, `expressions` the values of these genes; all others are
zero. `cell` is its name, `total_counts` its counts over all genes of its file.

{labels}

```python
from datasets import load_dataset
from wbdit_diffusers.data import read_cells

cells = load_dataset("THIS_FOLDER", "cells", split="train")  # rows
adata = read_cells("THIS_FOLDER", split="train")  # or an AnnData, in memory
```
"""
    DatasetCard(text, ignore_metadata_errors=True).save(folder / "README.md")


def _escape(text: str) -> str:
    """A name from a file is text in a card, and nothing else."""
    return "`" + html.escape(" ".join(text.replace("`", "'").split())) + "`"
